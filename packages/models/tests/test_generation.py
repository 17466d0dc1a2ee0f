"""Generation: stops, ends, limits, streams, sampling, and every bad argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.errors import LongctxError
from longctx_models.engine import LongContextLLM
from longctx_models.generation import DecodeLoop, GenerationStats, TextStream
from longctx_models.sampling import Sampler, SamplingOptions
from longctx_models.tokenizer import TextTokenizer

VOCABULARY = 256


@pytest.fixture
def llm(checkpoint: Callable[..., Path]) -> LongContextLLM:
    folder = checkpoint("qwen3", vocab_size=VOCABULARY, head_dim=8, max_position_embeddings=600)
    return LongContextLLM.load(folder, device="cpu", dtype=torch.float32)


@pytest.fixture
def tokenizer(llm: LongContextLLM) -> TextTokenizer:
    assert llm.tokenizer is not None
    return llm.tokenizer


def scripted(
    script: bytes,
    tokenizer: TextTokenizer | None,
    *,
    stops: Sequence[str] = (),
    eos: Sequence[int] = (10,),
    limit: int | None = None,
) -> TextStream:
    """Return a stream whose model says exactly ``script``, byte by byte, and then zeros."""
    tokens = iter([*script, *[0] * 100])

    def scores(_: int = 0) -> Tensor:
        logits = torch.zeros(VOCABULARY)
        logits[next(tokens)] = 1.0
        return logits

    return TextStream(
        DecodeLoop(
            prefill=scores,
            step=scores,
            stats=lambda n, a, b: GenerationStats("dense", 3, n, a, b, 1.0, 0),
            sampler=Sampler(SamplingOptions()),
            tokenizer=tokenizer,
            prompt=(1, 65, 66),
            eos_ids=frozenset(eos),
            stops=tuple(stops),
            limit=len(script) if limit is None else limit,
        )
    )


def test_end_token_is_kept_in_the_ids_and_not_in_the_text(tokenizer: TextTokenizer) -> None:
    stream = scripted(b"4711\nmore", tokenizer)
    assert list(stream) == ["4", "7", "1", "1"]
    assert stream.result.text == "4711"
    assert bytes(stream.result.token_ids) == b"4711\n"
    assert stream.result.finish_reason == "eos"


def test_several_end_tokens(tokenizer: TextTokenizer) -> None:
    assert scripted(b"ab;c", tokenizer, eos=(10, 59)).result.text == "ab"


def test_limit(tokenizer: TextTokenizer) -> None:
    result = scripted(b"abcdef", tokenizer, limit=4).result
    assert (result.text, result.finish_reason, len(result.token_ids)) == ("abcd", "length", 4)


@pytest.mark.parametrize(
    ("script", "stops", "pieces", "reason"),
    [
        (b"one STOP two", ["STOP"], ["o", "n", "e", " "], "stop"),
        (b"one STO two", ["STOP"], [*"one ", "STO ", *"two"], "length"),
        (b"SSTOP", ["STOP"], ["S"], "stop"),
        (b"ababac.", ["abac"], ["ab"], "stop"),
        (b"xyz", ["z", "yz"], ["x"], "stop"),
        (b"abc", ["abcd"], ["abc"], "length"),
        (b"STOP", ["STOP"], [], "stop"),
        ("da\u00df \u2713 gut".encode(), ["\u2713 g"], ["d", "a", "\u00df", " "], "stop"),
    ],
)
def test_stop_strings_across_tokens(
    tokenizer: TextTokenizer, script: bytes, stops: list[str], pieces: list[str], reason: str
) -> None:
    stream = scripted(script, tokenizer, stops=stops)
    assert list(stream) == pieces
    assert stream.result.text == "".join(pieces)
    assert stream.result.finish_reason == reason


def test_held_back_text_comes_with_the_end_token(tokenizer: TextTokenizer) -> None:
    stream = scripted(b"say ST\n", tokenizer, stops=["STOP"])
    assert "".join(stream) == "say ST"
    assert stream.result.finish_reason == "eos"


def test_characters_are_never_split(tokenizer: TextTokenizer) -> None:
    text = "na\u00efve \u4f60\u597d \U0001f600!"
    stream = scripted(text.encode(), tokenizer)
    pieces = list(stream)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    cut = scripted("\u4f60".encode()[:2], tokenizer)
    assert list(cut) == ["\ufffd"]


def test_a_closed_stream_has_no_result(tokenizer: TextTokenizer) -> None:
    stream = scripted(b"abc", tokenizer)
    assert next(stream) == "a"
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = stream.result


def test_without_a_tokenizer_there_is_no_text() -> None:
    result = scripted(b"ab\n", None).result
    assert (result.text, bytes(result.token_ids)) == ("", b"ab\n")


def test_streamed_text_equals_generated_text(llm: LongContextLLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.5, "seed": 3}
    whole = llm.generate("A prompt.", **options)
    heard: list[str] = []
    again = llm.generate("A prompt.", on_text=heard.append, **options)
    stream = llm.stream("A prompt.", **options)
    assert whole.text == again.text == "".join(heard) == "".join(stream)
    assert whole.token_ids == stream.result.token_ids
    assert llm.generate("A prompt.", **{**options, "seed": 4}).token_ids != whole.token_ids


def test_chunks_caches_and_pieces_change_nothing(llm: LongContextLLM) -> None:
    ids = [1, *range(40, 240)]
    expected = llm.generate(ids, max_new_tokens=30).token_ids
    for cache, chunk in (("contiguous", 7), ("paged", 33), ("paged", 4096)):
        other = LongContextLLM(llm.model, llm.kernels, cache=cache, prefill_chunk=chunk)
        assert other.generate(ids, max_new_tokens=30).token_ids == expected
        assert other.generate(ids[:50], query=ids[50:], max_new_tokens=30).token_ids == expected


def test_text_prompts_get_one_bos(llm: LongContextLLM) -> None:
    assert llm.prompt("ab", "cd").ids == (1, *b"abcd")
    assert llm.prompt("ab", "cd").context_tokens == 3
    assert llm.prompt([], "cd").ids == (1, *b"cd")
    assert llm.prompt([5, 6], [7]).ids == (5, 6, 7)


def test_statistics(llm: LongContextLLM) -> None:
    result = llm.generate([1, *range(60)], max_new_tokens=10)
    stats = result.stats
    assert (stats.method, stats.prompt_tokens, stats.generated_tokens) == ("dense", 61, 10)
    assert stats.density == 1.0
    assert stats.prefill_seconds > 0
    assert stats.decode_tokens_per_second > 0
    # 3 layers, 2 KV heads of size 8, keys and values, fp32; capacity is rounded up to 128
    assert stats.cache_bytes == 128 * 3 * 2 * 8 * 2 * 4
    assert result.as_dict()["stats"]["prompt_tokens"] == 61


def test_prefill_progress(llm: LongContextLLM) -> None:
    llm.prefill_chunk = 100
    seen: list[tuple[int, int]] = []
    ids = [1] * 250
    llm.generate(ids, max_new_tokens=1, on_prefill=lambda *at: seen.append(at))
    assert seen == [(100, 250), (122, 250), (222, 250), (250, 250)]
    seen.clear()
    llm.generate(
        ids, max_new_tokens=1, method="token-sparse", on_prefill=lambda *at: seen.append(at)
    )
    assert seen[-1] == (250, 250)
    assert seen == sorted(seen)


def test_generation_ends_with_the_positions(llm: LongContextLLM) -> None:
    result = llm.generate([1] * 595, max_new_tokens=50)
    assert len(result.token_ids) == 6
    assert result.finish_reason == "length"
    assert len(llm.generate([1] * 600, max_new_tokens=50).token_ids) == 1
    llm.max_positions = 1000
    assert len(llm.generate([1] * 610, max_new_tokens=5).token_ids) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [1] * 601}, "the prompt has 601 tokens, the model is made for 600: shorten"),
        ({"prompt": [], "query": []}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [5, 256]}, "token id 256 lies outside the vocabulary of 256"),
        ({"prompt": [5, -1]}, "token id -1 lies outside"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be finite and at least 0"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"temperature": math.inf}, "temperature must be finite"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p must be above 0"),
        ({"seed": -1}, "seed must be between"),
        ({"stop": ""}, "a stop string must not be empty"),
        ({"stop": ["a", ""]}, "a stop string must not be empty"),
    ],
)
def test_bad_arguments(llm: LongContextLLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.stream(**{"prompt": [1, 2], **arguments})


def test_text_needs_a_tokenizer(llm: LongContextLLM) -> None:
    bare = LongContextLLM(llm.model, llm.kernels)
    with pytest.raises(ValueError, match="without a tokenizer"):
        bare.generate("text")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        bare.generate([1], stop="x")


@pytest.mark.parametrize("name", ["prefill_chunk", "max_positions"])
def test_bad_sizes(llm: LongContextLLM, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        LongContextLLM(llm.model, llm.kernels, **{name: 0})


def test_overflow_is_an_error(llm: LongContextLLM) -> None:
    with torch.no_grad():
        llm.model.final_norm.fill_(math.inf)
    with pytest.raises(LongctxError, match="not finite"):
        llm.generate([1, 2, 3], max_new_tokens=2)


def test_decoder_regions_compile(llm: LongContextLLM) -> None:
    layer = llm.model.layers[0]
    x = torch.randn(1, 9, 32)
    cos, sin = llm.model.rotary.tables(torch.arange(9), 9)
    compiled = [
        torch.compile(f, backend="aot_eager", fullgraph=True)
        for f in (layer.project, layer.finish)
    ]
    with torch.inference_mode():
        for actual, expected in zip(
            compiled[0](x, cos, sin), layer.project(x, cos, sin), strict=True
        ):
            torch.testing.assert_close(actual, expected)
        out = torch.randn(1, 9, 4, 8)
        torch.testing.assert_close(compiled[1](x, out), layer.finish(x, out))
