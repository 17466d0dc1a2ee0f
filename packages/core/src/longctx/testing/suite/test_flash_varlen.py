"""Exact attention over packed sequences, empty ones and single tokens among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.protocols.attention import AttentionOutput
from longctx.reference import flash as oracle
from longctx.testing.subject import Subject
from longctx.testing.suite.test_flash import check_flash, check_rows, coarse_qkv

__all__ = ["TestFlashCapturesPackedLengths", "TestFlashPackedSequences"]

LENGTHS = [
    ([65], [65]),
    ([1, 1, 1], [1, 1, 1]),
    ([3, 129, 1, 64], [3, 129, 1, 64]),
    ([7, 0, 65, 9, 0], [9, 4, 65, 2, 0]),
    ([0, 127, 1, 5], [5, 255, 63, 0]),
    ([0, 0], [3, 0]),
    ([1] * 40 + [255, 2], [200] + [3] * 40 + [255]),
]
OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "full": ((), {}),
    "causal": ((), {"causal": True}),
    "window": (("window",), {"causal": True, "window": (20, 0)}),
    "both-sides": (("window",), {"window": (3, 40)}),
    "softcap": (("softcap",), {"causal": True, "softcap": 2.0}),
}


def cumulative(subject: Subject, lengths: Sequence[int]) -> Tensor:
    """Return the ``cu_seqlens`` of sequences."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=subject.device)


def capture(call: Callable[[], AttentionOutput]) -> tuple[torch.cuda.CUDAGraph, AttentionOutput]:
    """Record a call in a CUDA graph; return the graph and the result that replays write."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.longctx_op("flash_attention")
class TestFlashPackedSequences:
    """``cu_seqlens_q`` and ``cu_seqlens_k``."""

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    def test_each_sequence_is_on_its_own(
        self, subject: Subject, lengths: tuple[list[int], list[int]], options: str
    ) -> None:
        features, chosen = OPTIONS[options]
        subject.require("varlen", *features)
        q_lens, k_lens = lengths
        subject.require_length(sum(q_lens), sum(k_lens))
        q, k, v = subject.qkv(1, sum(q_lens), sum(k_lens))
        ends = {
            "cu_seqlens_q": cumulative(subject, q_lens),
            "cu_seqlens_k": cumulative(subject, k_lens),
        }
        check_flash(subject, q, k, v, **ends, **chosen)

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads", "head_dim"), [(8, 1, 64), (16, 2, 128), (3, 3, 64), (4, 2, 256)]
    )
    def test_heads(self, subject: Subject, q_heads: int, kv_heads: int, head_dim: int) -> None:
        subject.require("varlen", q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        subject.require_length(199)
        made = subject.qkv(1, 199, 199, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        ends = cumulative(subject, [63, 1, 0, 130, 5])
        check_flash(subject, *made, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)

    def test_sinks_enter_every_sequence(self, subject: Subject) -> None:
        subject.require("varlen", "sinks")
        subject.require_length(129)
        ends = {
            "cu_seqlens_q": cumulative(subject, [64, 5, 0, 60]),
            "cu_seqlens_k": cumulative(subject, [60, 0, 4, 65]),
        }
        sinks = subject.randn(4, dtype=torch.float32)
        check_flash(subject, *subject.qkv(1, 129, 129), causal=True, sinks=sinks, **ends)

    def test_lengths_of_the_keys_default_to_those_of_the_queries(self, subject: Subject) -> None:
        subject.require("varlen")
        subject.require_length(129)
        q, k, v = subject.qkv(1, 129, 129)
        ends = cumulative(subject, [100, 29])
        attend = longctx.flash_attention_with_lse
        both = subject.run(attend, q, k, v, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)
        one = subject.run(attend, q, k, v, causal=True, cu_seqlens_q=ends)
        assert torch.equal(one.out, both.out)
        assert torch.equal(one.lse, both.lse)

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    def test_what_one_sequence_holds_does_not_reach_another(
        self, subject: Subject, causal: bool
    ) -> None:
        """A NaN stays in its sequence, also where tiles reach into the next one."""
        subject.require("varlen")
        subject.require_length(255)
        q, k, v = subject.qkv(1, 255, 255)
        lengths = [70, 1, 30, 54, 100]
        ends = cumulative(subject, lengths)
        options: dict[str, Any] = {"causal": causal, "cu_seqlens_q": ends, "cu_seqlens_k": ends}
        spoilt = [(0, 70), (71, 101), (155, 255)]
        dirty = [t.clone() for t in (q, k, v)]
        for start, stop in spoilt:
            for tensor in dirty:
                tensor[:, start:stop] = torch.nan
        out, lse = subject.run(longctx.flash_attention_with_lse, *dirty, **options)
        exact = oracle.flash_attention(q.double(), k.double(), v.double(), **options)
        low = oracle.flash_attention(*coarse_qkv(q, k, v), **options)
        for clean in (slice(70, 71), slice(101, 155)):
            subject.check(out[:, clean], exact[0][:, clean], low[0][:, clean], "out")
            subject.check(lse[..., clean], exact[1][..., clean], low[1][..., clean], "lse")

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    def test_sequences_of_many_tiles(self, subject: Subject, causal: bool) -> None:
        subject.require("varlen", q_heads=2, kv_heads=1)
        subject.require_length(1401)
        made = subject.qkv(1, 1401, 1401, q_heads=2, kv_heads=1)
        ends = cumulative(subject, [400, 1, 1000])
        check_flash(subject, *made, causal=causal, cu_seqlens_q=ends, cu_seqlens_k=ends)


# the torch backend reads packed lengths on the host in fp32, as the docstring of the op says
@pytest.mark.longctx_op("flash_attention", dtypes=("bf16", "fp16"))
class TestFlashCapturesPackedLengths:
    """Lengths live on the device: a CUDA graph reads them when it is replayed."""

    def test_lengths_may_change_between_replays(self, subject: Subject) -> None:
        subject.require("varlen")
        subject.require_cuda()
        total, attend = 512, longctx.flash_attention_with_lse
        q, k, v = subject.qkv(1, total, total)
        ends = cumulative(subject, [100, 200, 212])

        def call() -> AttentionOutput:
            return attend(
                q, k, v, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends, backend=subject.backend
            )

        graph, captured = capture(call)
        for lengths in ([100, 200, 212], [1, 0, 511], [0, 512, 0], [255, 2, 255]):
            ends.copy_(cumulative(subject, lengths))
            for tensor in (q, k, v):
                tensor.copy_(subject.randn(*tensor.shape))
            graph.replay()
            torch.cuda.synchronize()
            options: dict[str, Any] = {
                "causal": True,
                "cu_seqlens_q": ends,
                "cu_seqlens_k": ends,
            }
            exact = oracle.flash_attention(q.double(), k.double(), v.double(), **options)
            check_rows(
                subject, captured, exact, oracle.flash_attention(*coarse_qkv(q, k, v), **options)
            )
