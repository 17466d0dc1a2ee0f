"""Decode as a server runs it: captured in a CUDA graph, over caches beyond 2**31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.protocols.attention import AttentionOutput
from longctx.testing.subject import Subject
from longctx.testing.suite.test_decode import check_decode, check_sequences, int32, make_cache
from longctx.testing.suite.test_flash_offsets import far_apart
from longctx.testing.suite.test_flash_varlen import capture

__all__ = ["TestDecodeGraphs", "TestDecodeOffsets"]

FP8 = torch.float8_e4m3fn


@pytest.mark.longctx_op("decode_attention")
class TestDecodeGraphs:
    """One capture serves every length: lengths, pages and contents are read at replay."""

    @pytest.mark.parametrize("q_len", [1, 4])
    @pytest.mark.parametrize("page_size", [None, 16])
    @pytest.mark.parametrize("fp8", [False, True], ids=["same-dtype", "fp8"])
    @pytest.mark.parametrize("window", [None, (100, 0)], ids=["dense", "window"])
    def test_lengths_may_change_between_replays(
        self,
        subject: Subject,
        window: tuple[int, int] | None,
        fp8: bool,
        page_size: int | None,
        q_len: int,
    ) -> None:
        used = {
            "multi-token": q_len > 1,
            "paged": page_size is not None,
            "fp8": fp8,
            "window": window is not None,
        }
        subject.require(*(name for name, on in used.items() if on))
        subject.require_cuda()
        capacity = 2048

        def fresh(*lengths: int) -> tuple[Tensor | None, ...]:
            cache = make_cache(
                subject, lengths, capacity, page_size=page_size, dtype=FP8 if fp8 else None
            )
            return subject.randn(2, q_len, 4, 64), *cache, int32(subject, *lengths)

        held = fresh(capacity, 5)
        q, k, v, table, lengths = held
        assert q is not None
        assert k is not None
        assert v is not None
        assert lengths is not None
        options: dict[str, Any] = {"page_table": table, "window": window}

        def call() -> AttentionOutput:
            return longctx.decode_attention_with_lse(
                q, k, v, cache_seqlens=lengths, **options, backend=subject.backend
            )

        graph, captured = capture(call)
        for now in ((capacity, 5), (4, capacity), (1777, 129), (q_len, 1024), (1000, 1001)):
            for old, new in zip(held, fresh(*now), strict=True):
                if old is not None and new is not None:
                    old.copy_(new)
            graph.replay()
            torch.cuda.synchronize()
            check_sequences(subject, captured, q, k, v, lengths, **options)


@pytest.mark.longctx_op("decode_attention")
class TestDecodeOffsets:
    """64-bit addresses of queries, slots, heads and pages."""

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "slots", "heads"])
    @pytest.mark.parametrize("name", ["k", "v"])
    def test_contiguous_caches(self, subject: Subject, name: str, axis: int) -> None:
        subject.require()
        k, v, _ = make_cache(subject, [255, 129], 255)
        caches = {"k": k, "v": v}
        caches[name] = far_apart(subject, caches[name], axis)
        q = subject.randn(2, 1, 4, 64)
        check_decode(subject, q, caches["k"], caches["v"], int32(subject, 255, 129))

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["pages", "slots", "heads"])
    @pytest.mark.parametrize("name", ["k", "v"])
    def test_paged_caches(self, subject: Subject, name: str, axis: int) -> None:
        """Shuffled pages, so that both the lowest and the highest addresses are in use."""
        subject.require("paged")
        k, v, table = make_cache(subject, [255, 250], 255, page_size=16)
        caches = {"k": k, "v": v}
        caches[name] = far_apart(subject, caches[name], axis)
        q = subject.randn(2, 1, 4, 64)
        check_decode(
            subject, q, caches["k"], caches["v"], int32(subject, 255, 250), page_table=table
        )

    @pytest.mark.parametrize("axis", [0, 1], ids=["pages", "slots"])
    def test_fp8_pages(self, subject: Subject, axis: int) -> None:
        subject.require("paged", "fp8")
        k, v, table = make_cache(subject, [255, 250], 255, page_size=16, dtype=FP8)
        q, k = subject.randn(2, 1, 4, 64), far_apart(subject, k, axis)
        check_decode(subject, q, k, v, int32(subject, 255, 250), page_table=table)

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "tokens", "heads"])
    def test_queries(self, subject: Subject, axis: int) -> None:
        subject.require("multi-token")
        k, v, _ = make_cache(subject, [255, 129], 255)
        q = far_apart(subject, subject.randn(2, 16, 4, 64), axis)
        check_decode(subject, q, k, v, int32(subject, 255, 129))
