"""The indexer on a device: 64-bit addresses, bounded memory, bounds that change in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import dsa as oracle
from longctx.settings import budget_bytes
from longctx.testing.subject import Subject
from longctx.testing.suite.test_flash_offsets import far_apart, require_memory
from longctx.testing.suite.test_index_scores import (
    FP8,
    check_scores,
    indexer_inputs,
    key_ranges,
    whole_numbers,
)
from longctx.testing.suite.test_index_topk import DTYPES, check_choice, require
from longctx.testing.suite.test_lightning import capture

__all__ = ["TestIndexScoresOffsets", "TestIndexTopkDevice"]

FAR = [("q", 0), ("q", 1), ("q", 2), ("k", 0), ("k", 1), ("weights", 1), ("k_scale", 0)]
"""Inputs, and the axis along which one's last entry lies 2**31 elements away."""


@pytest.mark.longctx_op("index_scores", dtypes=DTYPES)
class TestIndexScoresOffsets:
    """64-bit addresses of the inputs and of the matrix of scores."""

    @pytest.mark.parametrize(("name", "axis"), FAR)
    def test_inputs(self, subject: Subject, name: str, axis: int) -> None:
        require(subject)
        subject.require_length(129)
        q, k, k_scale, weights = whole_numbers(subject, 2, 65, 129)
        made = {"q": q, "k": k, "weights": weights, "k_scale": k_scale}
        made[name] = far_apart(subject, made[name], axis)
        check_scores(subject, **made)

    def test_scores(self, subject: Subject) -> None:
        """The square of 46,351 is 2**31 and a million."""
        subject.require_cuda()
        if subject.dtype == FP8:
            pytest.skip("the scores have one data type: tested with the other inputs")
        require(subject)
        length, tail = 46_351, 127
        require_memory(subject, length**2, torch.float32)
        q, k, weights = indexer_inputs(subject, 1, length, length)
        scores = subject.run(longctx.index_scores, q, k, weights)
        for rows in (slice(0, tail), slice(length - tail, length)):
            keys = k[:, : rows.stop]
            exact = oracle.index_scores(q[:, rows], keys, weights[:, rows].double())
            low = oracle.index_scores(q[:, rows], keys, weights[:, rows])
            subject.check(scores[:, rows, : rows.stop], exact, low, f"scores of rows {rows}")
            assert (scores[:, rows, rows.stop :] == -torch.inf).all()


@pytest.mark.longctx_op("index_topk", dtypes=DTYPES)
class TestIndexTopkDevice:
    """What a GPU adds: addresses, memory, graphs."""

    @pytest.mark.parametrize(("name", "axis"), FAR)
    def test_inputs_far_apart(self, subject: Subject, name: str, axis: int) -> None:
        require(subject)
        subject.require_length(129)
        q, k, k_scale, weights = whole_numbers(subject, 2, 65, 129)
        made = {"q": q, "k": k, "weights": weights, "k_scale": k_scale}
        made[name] = far_apart(subject, made[name], axis)
        check_choice(subject, (made["q"], made["k"], made["k_scale"], made["weights"]), 20)

    def test_memory_stays_within_the_setting(self, subject: Subject) -> None:
        """32,768 queries and keys: their matrix would take 4 GiB, the setting is 512 MiB."""
        subject.require_cuda()
        require(subject)
        length = 2**15
        q, k, k_scale, weights = whole_numbers(subject, 1, length, length)
        longctx.index_topk(q[:, :65], k, k_scale, weights[:, :65], 64, backend=subject.backend)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        plan = longctx.index_topk(q, k, k_scale, weights, 64, backend=subject.backend)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - plan.indices.nbytes
        assert extra <= budget_bytes("LONGCTX_INDEX_BUDGET_MIB"), f"{extra / 2**20:.0f} MiB"

    def test_captured_bounds_and_scores_may_change(self, subject: Subject) -> None:
        subject.require_cuda()
        require(subject, "key-range")
        made = whole_numbers(subject, 2, 65, 1000)
        bounds = key_ranges(subject, 2, 65, 1000)
        graph, plan = capture(
            lambda: longctx.index_topk(
                *made, 64, causal=False, **bounds, deterministic=True, backend=subject.backend
            )
        )
        for _ in range(2):
            _refill(made, whole_numbers(subject, 2, 65, 1000))
            fresh = key_ranges(subject, 2, 65, 1000)
            _refill(tuple(bounds.values()), tuple(fresh.values()))
            graph.replay()
            q, k, k_scale, weights = made
            exact = oracle.index_topk(q, k, k_scale, weights.double(), 64, causal=False, **bounds)
            assert torch.equal(plan.indices, exact)


def _refill(held: tuple[Tensor, ...], fresh: tuple[Tensor, ...]) -> None:
    for one, other in zip(held, fresh, strict=True):
        one.copy_(other)
