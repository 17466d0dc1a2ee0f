"""``longctx demo``: facts hidden in a long text, asked for by each method, with what it cost."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longctx_models.engine import LongContextLLM
from longctx_models.evaluation.needle import Fact, plant, question_prompt
from longctx_models.generation import Generation
from longctx_models.memory import peak_memory
from longctx_models.methods import Method
from longctx_models.plotting import heat_map, length_label

__all__ = [
    "DEFAULT_METHODS",
    "DEPTHS",
    "FACTS",
    "Answer",
    "Demo",
    "Report",
    "Row",
    "parse_lengths",
    "read_text",
]

DEFAULT_METHODS = ("dense", "a-shape", "star", "token-sparse", "streaming-llm")
BUNDLED_TEXT = Path(__file__).parent / "data" / "jargon_file.txt"
MAX_ANSWER_TOKENS = 48

DEPTHS = (0.1, 0.3, 0.45, 0.7, 0.9)
"""Not at a quarter or a half: star's blocks end there, and it loses a fact that a border cuts."""
FACTS = (
    Fact(
        "The wifi password of the blue house is hunter27.",
        "What is the wifi password of the blue house?",
        "hunter27",
    ),
    Fact("Alice's locker code is 4821.", "What is Alice's locker code?", "4821"),
    Fact(
        "The captain of the northern ferry is Tobias Wren.",
        "Who is the captain of the northern ferry?",
        "Tobias Wren",
    ),
    Fact(
        "The serial number of the spare engine is 9048172.",
        "What is the serial number of the spare engine?",
        "9048172",
    ),
    Fact(
        "The favourite colour of the old gardener was violet.",
        "What was the favourite colour of the old gardener?",
        "violet",
    ),
)
"""What is planted, the first at the first depth and so on."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answer:
    """One question put to one method at one length.

    Attributes
    ----------
    question, text : str
        What was asked and what the model wrote.
    depth : float or None
        Where its fact stands in the text, 0 to 1; None for a question of the user's.
    right : bool or None
        Whether the planted value is the answer; None where nothing was planted.
    """

    question: str
    text: str
    depth: float | None
    right: bool | None


@dataclass(frozen=True)
class Row:
    """One method at one length.

    Attributes
    ----------
    method : str
    length : int
        Prompt length in tokens, question included (the longest one).
    answers : tuple of Answer
    density : float
        Attended pairs / causal pairs of the prefill.
    prefill_seconds : float
        To read the text once.
    decode_tokens_per_second : float
    peak_bytes : int or None
        Memory on top of the loaded model; None where it cannot be measured.
    """

    method: str
    length: int
    answers: tuple[Answer, ...]
    density: float
    prefill_seconds: float
    decode_tokens_per_second: float
    peak_bytes: int | None

    @property
    def correct(self) -> int:
        """Number of right answers."""
        return sum(bool(answer.right) for answer in self.answers)


@dataclass(frozen=True)
class Report:
    """Everything that the demo measured."""

    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the rows as JSON-ready values."""
        return {"rows": [asdict(row) | {"correct": row.correct} for row in self.rows]}

    def show(self, console: Console) -> None:
        """Print the answers at the greatest length, and the table of all rows."""
        longest = [row for row in self.rows if row.length == max(r.length for r in self.rows)]
        answers = Table(title=f"answers at {length_label(longest[0].length)} tokens")
        answers.add_column("question")
        answers.add_column("depth", justify="right")
        for row in longest:
            answers.add_column(row.method, overflow="fold")
        for position, asked in enumerate(longest[0].answers):
            depth = "" if asked.depth is None else f"{asked.depth:.0%}"
            answers.add_row(
                escape(asked.question), depth, *(_marked(row.answers[position]) for row in longest)
            )
        console.print(answers)
        table = Table(title="methods")
        table.add_column("length", justify="right", no_wrap=True)
        table.add_column("method", no_wrap=True, min_width=len("streaming-llm"))
        for name in ("correct", "density", "prefill s", "decode tok/s", "peak"):
            table.add_column(name, justify="right", overflow="fold")
        for row in self.rows:
            known = [answer for answer in row.answers if answer.right is not None]
            table.add_row(
                length_label(row.length),
                row.method,
                f"{row.correct}/{len(known)}" if known else "-",
                f"{row.density:.3f}",
                f"{row.prefill_seconds:.2f}",
                f"{row.decode_tokens_per_second:.0f}",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
                end_section=row.method == self.rows[-1].method,
            )
        console.print(table)

    def plot(self, path: Path) -> None:
        """Write the depth x length heat map of every method as a PNG."""
        scores: dict[str, dict[tuple[float, int], float]] = {}
        for row in self.rows:
            for answer in row.answers:
                if answer.depth is not None:
                    cell = (answer.depth, row.length)
                    scores.setdefault(row.method, {})[cell] = float(bool(answer.right))
        lengths = sorted({row.length for row in self.rows})
        heat_map(path, scores, depths=DEPTHS, lengths=lengths, title="answers from planted facts")


class Demo:
    """The comparison: lengths x methods x questions.

    Parameters
    ----------
    llm : LongContextLLM
    text : bytes
        The haystack, UTF-8.
    methods : sequence of Method
    lengths : sequence of int
        Prompt lengths in tokens; longer ones than the text or the model has are refused.
    questions : sequence of str
        Asked about the text as it is; empty: `FACTS` are planted and asked for.
    """

    def __init__(
        self,
        llm: LongContextLLM,
        text: bytes,
        *,
        methods: Sequence[Method],
        lengths: Sequence[int],
        questions: Sequence[str] = (),
    ) -> None:
        self.llm, self.text, self.methods, self.lengths = llm, text, methods, lengths
        self.questions = tuple(questions) or tuple(fact.question for fact in FACTS)
        self.planted = not questions
        self._bytes_per_token = self._measure_tokens()
        for length in lengths:
            if self._context_bytes(length) > len(text):
                tokens = int(len(text) / self._bytes_per_token)
                raise ValueError(
                    f"the text has about {tokens} tokens, {length} were asked for: give a longer "
                    "text or a smaller --length"
                )
            if length > llm.max_positions:
                raise ValueError(
                    f"the model is made for {llm.max_positions} tokens, {length} were asked for: "
                    "give a smaller --length"
                )

    def run(self, progress: Progress | None = None) -> Report:
        """Run every method at every length; ``progress`` is told (rows done, rows in all)."""
        self._warm_up()
        rows: list[Row] = []
        total = len(self.lengths) * len(self.methods)
        for length in self.lengths:
            context = self._context(length)
            for method in self.methods:
                rows.append(self._row(method, length, context))
                if progress is not None:
                    progress(len(rows), total)
        return Report(tuple(rows))

    def _row(self, method: Method, length: int, context: str) -> Row:
        with peak_memory(self.llm.device) as peak:
            reading = self.llm.read(context, method=method)
            generations = [
                reading.ask(question_prompt(question).decode(), max_new_tokens=MAX_ANSWER_TOKENS)
                for question in self.questions
            ]
        answers = tuple(
            self._answer(position, generation) for position, generation in enumerate(generations)
        )
        stats = [generation.stats for generation in generations]
        tokens = sum(s.generated_tokens - 1 for s in stats)
        seconds = sum(s.decode_seconds for s in stats)
        return Row(
            method=method.name,
            length=length,
            answers=answers,
            density=reading.density or statistics.mean(s.density for s in stats),
            prefill_seconds=reading.seconds or statistics.median(s.prefill_seconds for s in stats),
            decode_tokens_per_second=tokens / seconds if seconds else 0.0,
            peak_bytes=peak.nbytes,
        )

    def _answer(self, position: int, generation: Generation) -> Answer:
        text = generation.text.strip()
        question = self.questions[position]
        if not self.planted:
            return Answer(question, text, None, None)
        fact = FACTS[position]
        right = re.search(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", text) is not None
        return Answer(question, text, DEPTHS[position], right)

    def _context(self, length: int) -> str:
        size = self._context_bytes(length)
        facts = FACTS if self.planted else ()
        return plant(self.text, facts, DEPTHS[: len(facts)], size).decode()

    def _context_bytes(self, length: int) -> int:
        longest = max(len(question_prompt(question)) for question in self.questions)
        # one token for the beginning of the sequence
        return int((length - 1) * self._bytes_per_token) - longest

    def _measure_tokens(self) -> float:
        if self.llm.tokenizer is None:
            raise ValueError("the demo needs a checkpoint with a tokenizer")
        sample = self.text[: 2**16].decode("utf-8", "ignore")
        return len(sample.encode()) / max(1, len(self.llm.tokenizer.encode(sample, first=False)))

    def _warm_up(self) -> None:
        """Pay for first calls (thread pools, kernel caches) outside the measurements."""
        self.llm.generate("warm", query=" up", max_new_tokens=2)


def read_text(path: Path | None) -> bytes:
    """Return the text of a file, or the bundled one; it must be UTF-8."""
    data = (BUNDLED_TEXT if path is None else path).read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from error
    return data


def parse_lengths(text: str) -> list[int]:
    """Return the lengths of ``"2K,4096"`` as numbers, ascending and unique.

    >>> parse_lengths("8K,4096")
    [4096, 8192]
    """
    lengths = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", part)
        if match is None or int(match[1]) == 0:
            raise ValueError(f"lengths are numbers such as 4096 or 8K, got {part!r}")
        lengths.add(int(match[1]) * (1024 if match[2] else 1))
    return sorted(lengths)


def _marked(answer: Answer) -> str:
    colour = {True: "green", False: "red", None: "default"}[answer.right]
    return f"[{colour}]{escape(answer.text) or '(nothing)'}[/]"
