"""Text to token ids and back, piece by piece while a text is being generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from longctx.errors import CheckpointError

__all__ = ["Detokenizer", "StopFilter", "TextTokenizer"]

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
_MAX_PENDING = 16
_TAIL = 8


class TextTokenizer:
    """A checkpoint's ``tokenizer.json``.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read ``tokenizer.json``.

        Raises
        ------
        CheckpointError
            If it is missing or damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json: save one with transformers "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...)), or load with "
                "tokenizer=None "
                "and prompt with token ids"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for any damage
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Return the ids of a text.

        Parameters
        ----------
        text : str
        first : bool
            Whether it begins the sequence, and so gets the special tokens (BOS) that the tokenizer
            puts there.
        """
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=first).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Detokenizer:
    """Turns generated ids into text as they come, never splitting a character.

    Parameters
    ----------
    tokenizer : TextTokenizer
    prompt : sequence of int
        Ids before the generated ones: some tokenizers write a leading space by what stands before.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        tail = list(prompt[-_TAIL:])
        # a prompt that ends inside a character is no clean boundary to go on from
        self._ids = [] if tokenizer.decode(tail).endswith(_REPLACEMENT) else tail
        self._prefix, self._read = 0, len(self._ids)

    def push(self, token: int) -> str:
        """Take one id and return the text that it completed, which may be empty."""
        self._ids.append(token)
        text = self._pending()
        if not text.endswith(_REPLACEMENT):
            return self._emit(len(self._ids), text)
        if len(self._ids) - self._read > _MAX_PENDING:
            return self._emit_before_open_character()
        return ""

    def flush(self) -> str:
        """Return what is left, incomplete characters as U+FFFD."""
        return self._emit(len(self._ids), self._pending())

    def _pending(self, end: int | None = None) -> str:
        """Return the text of the ids from the read mark to ``end``."""
        known = self._tokenizer.decode(self._ids[self._prefix : self._read])
        return self._tokenizer.decode(self._ids[self._prefix : end])[len(known) :]

    def _emit(self, end: int, text: str) -> str:
        if text:
            self._prefix, self._read = self._read, end
        return text

    def _emit_before_open_character(self) -> str:
        """Emit bytes that no later byte can complete; the last few may still be a character."""
        whole = self._pending()
        for end in range(len(self._ids) - 1, len(self._ids) - 1 - _LONGEST_CHARACTER, -1):
            text = self._pending(end)
            if text + self._tokenizer.decode(self._ids[end:]) == whole:
                return self._emit(end, text)
        return ""


class StopFilter:
    """Cuts a stream of text before the first stop string, wherever token boundaries fall.

    Parameters
    ----------
    stops : sequence of str
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take text and return what can be shown; a possible beginning of a stop is held back."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
