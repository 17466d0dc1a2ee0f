"""The indexer's choice is the exact top-k of its scores, whatever they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import dsa as oracle
from longctx.testing.subject import Subject
from longctx.testing.suite.test_index_scores import (
    FP8,
    MOST_DIFFERENT,
    indexer_inputs,
    key_ranges,
    relative_difference,
    whole_numbers,
)

__all__ = ["TestIndexTopk", "TestIndexTopkHardScores"]

DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def require(subject: Subject, *features: str, **request: Any) -> None:
    """Skip the test if the backend does not declare the request in the data type at test."""
    fp8 = ("fp8",) if subject.dtype == FP8 else ()
    subject.require(*features, *fp8, kv_heads=1, **request)


def check_choice(subject: Subject, made: Inputs, top_k: int, **options: Any) -> Tensor:
    """Choose among exact scores and compare every index with the oracle's; return them."""
    q, k, k_scale, weights = made
    plan = subject.run(longctx.index_topk, q, k, k_scale, weights, top_k, **options)
    indices: Tensor = plan.indices
    assert (plan.head_axis, plan.page_size) == ("shared", 1)
    assert indices.dtype == torch.int32
    assert indices.shape == (q.shape[0], q.shape[1], 1, top_k)
    options.pop("deterministic", None)
    exact = oracle.index_topk(q, k, k_scale, weights.double(), top_k, **options)
    wrong = (indices != exact).any(-1).nonzero()
    assert not len(wrong), f"{len(wrong)} rows differ, the first is (batch, row) {wrong[0, :2]}"
    return indices


@pytest.mark.longctx_op("index_topk", dtypes=DTYPES)
class TestIndexTopk:
    """Scores that are exact in any order of summation, with many ties among them."""

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize(
        ("q_len", "k_len", "top_k"),
        [
            (1, 63, 8),
            (65, 129, 1),
            (63, 255, 16),
            (129, 127, 33),
            (37, 1000, 100),
            (1, 4099, 512),
            (9, 4099, 2048),
        ],
    )
    def test_fewer_than_there_are(
        self, subject: Subject, q_len: int, k_len: int, top_k: int, causal: bool
    ) -> None:
        require(subject)
        subject.require_length(q_len, k_len)
        check_choice(subject, whole_numbers(subject, 2, q_len, k_len), top_k, causal=causal)

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("more", [-1, 0, 1, 70])
    @pytest.mark.parametrize("length", [63, 129])
    def test_about_as_many_as_there_are(
        self, subject: Subject, length: int, more: int, causal: bool
    ) -> None:
        """Early causal rows see fewer keys than are wanted: theirs, then -1."""
        require(subject)
        subject.require_length(length)
        made = whole_numbers(subject, 2, length, length)
        indices = check_choice(subject, made, length + more, causal=causal)
        if causal and more >= 0:
            seen = torch.arange(1, length + 1, device=subject.device)
            assert torch.equal((indices[0, :, 0] >= 0).sum(-1), seen)
            assert torch.equal(indices[0, :, 0].amax(-1), seen.int() - 1)

    @pytest.mark.parametrize(("q_len", "k_len", "top_k"), [(65, 9, 3), (129, 127, 64)])
    def test_rows_before_the_first_key(
        self, subject: Subject, q_len: int, k_len: int, top_k: int
    ) -> None:
        require(subject)
        subject.require_length(q_len)
        indices = check_choice(subject, whole_numbers(subject, 2, q_len, k_len), top_k)
        assert (indices[:, : q_len - k_len] == -1).all()

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize(
        ("q_len", "k_len", "top_k"), [(65, 129, 16), (129, 65, 16), (33, 1000, 100), (33, 130, 90)]
    )
    def test_key_ranges(
        self, subject: Subject, q_len: int, k_len: int, top_k: int, causal: bool
    ) -> None:
        require(subject, "key-range")
        subject.require_length(q_len, k_len)
        made = whole_numbers(subject, 2, q_len, k_len)
        bounds = key_ranges(subject, 2, q_len, k_len)
        check_choice(subject, made, top_k, causal=causal, **bounds)
        for name, bound in bounds.items():
            check_choice(subject, made, top_k, causal=causal, **{name: bound})

    @pytest.mark.parametrize(("heads", "dim"), [(1, 64), (4, 128), (32, 64), (64, 128)])
    def test_heads_and_dims(self, subject: Subject, heads: int, dim: int) -> None:
        require(subject, q_heads=heads, head_dim=dim)
        subject.require_length(255)
        check_choice(subject, whole_numbers(subject, 1, 33, 255, heads, dim), 20)

    def test_no_scales(self, subject: Subject) -> None:
        if subject.dtype == FP8:
            pytest.skip("fp8 keys need their scales")
        require(subject)
        subject.require_length(255)
        q, k, _, weights = whole_numbers(subject, 2, 33, 255)
        plan = subject.run(longctx.index_topk, q, k, None, weights, 20)
        assert torch.equal(plan.indices, oracle.index_topk(q, k, None, weights.double(), 20))

    @pytest.mark.parametrize(("q_len", "k_len"), [(3, 0), (0, 9)])
    def test_no_keys_and_no_queries(self, subject: Subject, q_len: int, k_len: int) -> None:
        require(subject)
        indices = check_choice(subject, whole_numbers(subject, 2, q_len, k_len), 5)
        assert (indices == -1).all()

    def test_chunks_of_queries_choose_like_the_whole(self, subject: Subject) -> None:
        require(subject)
        subject.require_length(255)
        q, k, k_scale, weights = whole_numbers(subject, 2, 255, 255)
        whole = check_choice(subject, (q, k, k_scale, weights), 20)
        for a, b in pairwise((0, 1, 64, 129, 200, 255)):
            part = q[:, a:b], k[:, :b], k_scale[:, :b], weights[:, a:b]
            plan = subject.run(longctx.index_topk, *part, 20)
            assert torch.equal(plan.indices, whole[:, a:b])

    def test_views(self, subject: Subject) -> None:
        """Head-major queries; keys and scales in a longer cache whose free slots hold NaN."""
        require(subject)
        subject.require_length(255)
        q, k, k_scale, weights = whole_numbers(subject, 2, 65, 255)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        cache = torch.full((2, 300, 80), math.nan, device=subject.device).to(k.dtype)
        cache[:, :255, :64] = k
        scales = torch.full((2, 300), math.nan, device=subject.device)
        scales[:, :255] = k_scale
        weights = weights.repeat_interleave(2, 1)[:, ::2]
        made = q, cache[:, :255, :64], scales[:, :255], weights
        for options in ({}, {"causal": False}):
            check_choice(subject, made, 20, **options)

    def test_training_tensors_are_taken(self, subject: Subject) -> None:
        if subject.dtype == FP8:
            pytest.skip("fp8 tensors have no gradients")
        require(subject)
        q, k, k_scale, weights = whole_numbers(subject, 1, 9, 33)
        made = q.requires_grad_(), k.requires_grad_(), k_scale, weights.requires_grad_()
        assert not check_choice(subject, made, 5).requires_grad

    def test_real_scores(self, subject: Subject) -> None:
        """Random numbers: what is chosen scores as high as the oracle's choice."""
        require(subject, q_heads=4, head_dim=128)
        subject.require_length(1000)
        q, k, weights = indexer_inputs(subject, 2, 65, 1000, dim=128, dtype=torch.float32)
        k_scale = None
        if subject.dtype == FP8:
            k = k * subject.randn(2, 1000, 1, dtype=torch.float32).exp()
            q, q_scale = oracle.quantize_fp8(q)
            k, k_scale = oracle.quantize_fp8(k)
            weights = weights * q_scale
        else:
            q, k = q.to(subject.dtype), k.to(subject.dtype)
        plan = subject.run(longctx.index_topk, q, k, k_scale, weights, 64)
        chosen = plan.indices[:, :, 0].long()
        assert (chosen.diff(dim=-1) > 0).all()
        exact = oracle.index_scores(q, k, weights.double(), k_scale=k_scale)
        picked = exact.gather(-1, chosen).sort(-1, descending=True).values
        best = exact.topk(64, -1).values
        assert relative_difference(picked, best) < MOST_DIFFERENT

    def test_same_inputs_give_the_same_bits(self, subject: Subject) -> None:
        require(subject)
        subject.require_length(1000)
        made = whole_numbers(subject, 2, 65, 1000)
        first = check_choice(subject, made, 100, deterministic=True)
        for _ in range(20 if subject.device.type == "cuda" else 2):
            again = subject.run(longctx.index_topk, *made, 100, deterministic=True)
            assert torch.equal(again.indices, first)

    def test_other_ties_are_the_only_freedom_of_the_fast_form(self, subject: Subject) -> None:
        require(subject)
        subject.require_length(1000)
        q, k, k_scale, weights = made = whole_numbers(subject, 2, 65, 1000)
        plan = subject.run(longctx.index_topk, *made, 100, deterministic=False)
        chosen = plan.indices[:, :, 0].long()
        assert (chosen.diff(dim=-1) > 0).all()
        scores = oracle.index_scores(q, k, weights, k_scale=k_scale)
        picked = scores.gather(-1, chosen).sort(-1, descending=True).values
        assert torch.equal(picked, scores.topk(100, -1).values)


PROFILES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda r: r * 40 - 20,
    "all-equal": lambda r: torch.full_like(r, 0.75),
    "all-zero": torch.zeros_like,
    "quarter-of-a-binade": lambda r: 1 + (r * 2**21).floor() * 2.0**-23,
    "last-bits": lambda r: 1 + (r * 2**9).floor() * 2.0**-23,
    "few-values": lambda r: 1 + (r * 5).floor() * 2.0**-23,
    "negative": lambda r: -1 - (r * 2**14).floor() * 2.0**-23,
    "denormal": lambda r: ((r * 120).floor() - 60) * 2.0**-149,
    "beyond-fp16": lambda r: (r - 0.5) * 1e32,
    "infinite": lambda r: torch.where(r < 0.3, torch.where(r < 0.1, -math.inf, math.inf), r),
    "mostly-minus-infinite": lambda r: torch.where(r < 0.95, -math.inf, r),
    "some-nan": lambda r: torch.where(r < 0.3, math.nan, r),
}
"""Rows of scores from uniform random numbers, each one hard for some way of selecting."""

CROWDED = ["quarter-of-a-binade", "last-bits", "few-values", "all-equal", "negative", "random"]
"""Where a histogram of the upper bits puts everything into one bin or two."""


def inputs_for_scores(subject: Subject, values: Tensor, q_len: int) -> Inputs:
    """Return inputs that score key ``s`` as exactly ``values[s]``, for every query.

    One head sees the positive scores, one the negative; sizes come through the keys' scales,
    infinite and NaN ones too.
    """
    q = torch.zeros(1, q_len, 4, 64, device=subject.device)
    q[:, :, 0, 0] = q[:, :, 1, 1] = 1
    k = torch.zeros(1, len(values), 64, device=subject.device)
    k[0, :, 0], k[0, :, 1] = values > 0, values < 0
    weights = torch.zeros(1, q_len, 4, device=subject.device)
    weights[..., 0], weights[..., 1] = 1, -1
    return q.to(subject.dtype), k.to(subject.dtype), values.abs().unsqueeze(0), weights


def profile(subject: Subject, name: str, length: int) -> Tensor:
    """Return one row of scores."""
    uniform = torch.rand(length, generator=subject.generator).to(subject.device)
    return PROFILES[name](uniform).float()


@pytest.mark.longctx_op("index_topk", dtypes=DTYPES)
class TestIndexTopkHardScores:
    """Ties, infinities, NaN, and rows whose scores a histogram cannot tell apart."""

    @pytest.mark.parametrize("name", PROFILES)
    def test_profiles(self, subject: Subject, name: str) -> None:
        require(subject)
        subject.require_length(1000)
        length = 1000
        values = profile(subject, name, length)
        made = inputs_for_scores(subject, values, 3)
        scores = oracle.index_scores(made[0], made[1], made[3].double(), k_scale=made[2])
        assert torch.equal(scores[0, -1].float().nan_to_num(7.0), values.nan_to_num(7.0))
        for top_k in (1, 20, 511, length - 1, length, length + 1):
            for causal in (False, True):
                indices = check_choice(subject, made, top_k, causal=causal)
        fit = values > -torch.inf
        assert int((indices[0, -1] >= 0).sum()) == int(fit.sum())  # all, and nothing else

    @pytest.mark.parametrize(
        ("name", "top_k"), [*((name, 2048) for name in CROWDED), ("last-bits", 1)]
    )
    def test_long_rows_in_one_bin(self, subject: Subject, name: str, top_k: int) -> None:
        """70,001 candidates: more than any buffer of candidates in shared memory holds."""
        require(subject)
        subject.require_length(4099)  # the work is linear: what runs this, runs that
        made = inputs_for_scores(subject, profile(subject, name, 70_001), 2)
        check_choice(subject, made, top_k)

    def test_ties_at_the_threshold_take_the_lowest_keys(self, subject: Subject) -> None:
        """Better keys stand behind a crowd of equal ones that does not fit."""
        require(subject)
        subject.require_length(4099)
        values = torch.full((20_011,), 0.5, device=subject.device)
        values[15_000:15_100] = 1.0
        values[20_000:] = 0.25
        (row,) = check_choice(subject, inputs_for_scores(subject, values, 1), 2048)[0, :, 0]
        assert torch.equal(row[:1948], torch.arange(1948, device=row.device).int())
        assert torch.equal(row[1948:], torch.arange(15_000, 15_100, device=row.device).int())

    def test_zeros_of_both_signs_tie(self, subject: Subject) -> None:
        require(subject)
        values = torch.zeros(129, device=subject.device)
        q, k, k_scale, weights = inputs_for_scores(subject, values, 1)
        k[0, ::2, 1] = 1  # 1 times weight -1 times a scale that underflows: -0.0
        k_scale[0, ::2] = 2.0**-149
        weights[..., 1] = -(2.0**-30)
        scores = oracle.index_scores(q, k, weights, k_scale=k_scale)
        assert scores.signbit().any()
        assert (scores == 0).all()
        plan = subject.run(longctx.index_topk, q, k, k_scale, weights, 33)
        assert plan.indices.flatten().tolist() == list(range(33))

    def test_bad_input(self, subject: Subject) -> None:
        require(subject)
        q, k, k_scale, weights = whole_numbers(subject, 1, 6, 9)
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            subject.run(longctx.index_topk, q, k, k_scale, weights, 0)
        with pytest.raises(ValueError, match="q8 and k8 must agree in index_dim"):
            subject.run(longctx.index_topk, q, k[..., :32].contiguous(), k_scale, weights, 3)
        with pytest.raises(ValueError, match=r"q8 must be \(batch, q_len, index_heads"):
            subject.run(longctx.index_topk, q[0], k, k_scale, weights, 3)
        with pytest.raises(TypeError, match="weights must be float32"):
            subject.run(longctx.index_topk, q, k, k_scale, weights.half(), 3)
        with pytest.raises(TypeError, match="q8 must be float32 or bfloat16"):
            subject.run(longctx.index_topk, q.double(), k.double(), k_scale, weights, 3)
