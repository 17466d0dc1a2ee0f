"""Sampling against a straightforward oracle, and the detokeniser against whole decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longctx_models.sampling import Sampler, SamplingOptions, token_probabilities
from longctx_models.tokenizer import Detokenizer, StopFilter


def oracle(logits: list[float], options: SamplingOptions) -> dict[int, float]:
    """Return the distribution by sorting and counting, one token after the other."""
    order = sorted(range(len(logits)), key=lambda n: (-logits[n], n))
    if options.top_k is not None:
        order = order[: options.top_k]
    best = logits[order[0]]
    weights = torch.tensor(
        [(logits[n] - best) / options.temperature for n in order], dtype=torch.float64
    ).exp()
    weights = weights / weights.sum()
    kept: dict[int, float] = {}
    total = 0.0
    for n, weight in zip(order, weights.tolist(), strict=True):
        if options.top_p is not None and options.top_p < 1 and total >= options.top_p:
            break
        kept[n] = weight
        total += weight
    return {n: weight / total for n, weight in kept.items()}


# top_p avoids the sums that equal scores can reach: no rounding decides what is kept
LOGITS = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=12)


@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.sampled_from([0.123, 0.456, 0.789, 0.987, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_distribution_equals_the_oracle(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    options = SamplingOptions(temperature, top_k, top_p)
    probabilities, tokens = token_probabilities(torch.tensor(logits), options)
    expected = oracle(logits, options)
    assert tokens.tolist() == list(expected)
    assert probabilities.tolist() == pytest.approx(list(expected.values()), abs=1e-5)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 0.5])
    options = SamplingOptions(1.0, top_k=4, top_p=0.95, seed=0)
    sampler = Sampler(options)
    draws = 20000
    counts = torch.zeros(5)
    for _ in range(draws):
        counts[sampler(logits)] += 1
    expected = oracle(logits.tolist(), options)
    assert set(counts.nonzero().flatten().tolist()) == set(expected)
    for token, probability in expected.items():
        deviation = (probability * (1 - probability) / draws) ** 0.5
        assert float(counts[token] / draws) == pytest.approx(probability, abs=5 * deviation)


def test_seeds_repeat_and_differ() -> None:
    logits = torch.zeros(50)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(1.0, seed=seed))
        return [sampler(logits) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(2.0, top_k=1), SamplingOptions(1e-30)]
)
def test_the_best_token_wins(options: SamplingOptions) -> None:
    logits: Tensor = torch.tensor([1.0, 30.0, 29.9, -5.0])
    assert Sampler(options)(logits) == 1


class Bytes:
    """A tokenizer whose ids are byte values."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@given(data=st.binary(max_size=60) | st.text(max_size=30).map(str.encode), prompt=st.binary())
@settings(max_examples=300, deadline=None)
def test_pieces_make_the_whole_text(data: bytes, prompt: bytes) -> None:
    whole = prompt.decode("utf-8", "replace")
    detokenizer = Detokenizer(Bytes(), prompt)  # type: ignore[arg-type]
    pieces = [detokenizer.push(byte) for byte in data]
    text = "".join(pieces) + detokenizer.flush()
    if whole.endswith("\ufffd"):
        assert text == data.decode("utf-8", "replace")
    else:
        assert whole + text == (prompt + data).decode("utf-8", "replace")


@given(
    parts=st.lists(st.text("ab ", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_stop_filter_equals_cutting_the_whole_text(parts: list[str], stops: list[str]) -> None:
    stop_filter = StopFilter(stops)
    shown = ""
    for part in parts:
        shown += stop_filter.push(part)
        if stop_filter.stopped:
            break
    else:
        shown += stop_filter.flush()
    text = "".join(parts)
    found = [text.find(stop) for stop in stops if stop in text]
    assert stop_filter.stopped == bool(found)
    if not found:
        assert shown == text
    else:
        # a part may end two stops at once: the earliest start among those complete then counts
        assert text.startswith(shown)
        assert any(text.startswith(stop, len(shown)) for stop in stops)
