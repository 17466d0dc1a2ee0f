"""Decode over paged and fp8 caches: page sizes, shuffled tables, factors of the heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_decode import check_decode, int32, make_cache
from longctx.testing.suite.test_flash import check_found, coded_keys

__all__ = ["TestDecodeFP8Cache", "TestDecodePagedCache"]

FP8 = torch.float8_e4m3fn
PAGE_SIZES = (1, 7, 16, 64, 100, 256)


@pytest.mark.longctx_op("decode_attention")
class TestDecodePagedCache:
    """Pages in any order; entries of the table that no sequence uses hold nonsense."""

    @pytest.mark.parametrize("page_size", PAGE_SIZES)
    @pytest.mark.parametrize("q_len", [1, 5])
    def test_page_sizes(self, subject: Subject, q_len: int, page_size: int) -> None:
        subject.require("paged", *(("multi-token",) if q_len > 1 else ()))
        subject.require_length(1000)
        lengths = [q_len, 1000, max(page_size * 2, q_len), 257]  # whole pages, and broken ones
        q = subject.randn(4, q_len, 4, 64)
        k, v, table = make_cache(subject, lengths, 1010, page_size=page_size)
        check_decode(subject, q, k, v, int32(subject, *lengths), page_table=table)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_every_length(self, subject: Subject, length: int) -> None:
        subject.require("paged")
        subject.require_length(length)
        lengths = [length, length // 2 + 1]
        k, v, table = make_cache(subject, lengths, length, page_size=16)
        q = subject.randn(2, 1, 4, 64)
        check_decode(subject, q, k, v, int32(subject, *lengths), page_table=table)

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads", "head_dim"),
        [(3, 3, 64), (8, 2, 128), (16, 1, 128), (16, 2, 64), (4, 2, 256)],
    )
    @pytest.mark.parametrize("page_size", [16, 100])
    def test_heads(
        self, subject: Subject, page_size: int, q_heads: int, kv_heads: int, head_dim: int
    ) -> None:
        subject.require("paged", q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        subject.require_length(300)
        k, v, table = make_cache(
            subject, [129, 300], 300, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim
        )
        q = subject.randn(2, 1, q_heads, head_dim)
        check_decode(subject, q, k, v, int32(subject, 129, 300), page_table=table)

    @pytest.mark.parametrize("page_size", [7, 64])
    @pytest.mark.parametrize("q_len", [1, 6])
    def test_everything_at_once(self, subject: Subject, q_len: int, page_size: int) -> None:
        features = ("multi-token",) if q_len > 1 else ()
        subject.require("paged", "window", "softcap", "sinks", *features)
        subject.require_length(1000)
        lengths = [1000, q_len, 129]
        k, v, table = make_cache(subject, lengths, 1000, page_size=page_size)
        check_decode(
            subject, subject.randn(3, q_len, 4, 64), k, v, int32(subject, *lengths),
            page_table=table, window=(90, 0), softcap=4.0, scale=0.3,
            sinks=subject.randn(4, dtype=torch.float32),
        )  # fmt: skip

    def test_sequences_may_share_pages(self, subject: Subject) -> None:
        """A common prefix is held once, as prefix caching does."""
        subject.require("paged")
        subject.require_length(129)
        k, v, _ = make_cache(subject, [160], 160, page_size=16)
        used = (~k[:, 0, 0, 0].isnan()).nonzero().flatten()
        table = used[torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [0, 0, 0, 0, 0]])]
        lengths = int32(subject, 80, 70, 16)
        q = subject.randn(3, 1, 4, 64)
        check_decode(subject, q, k, v, lengths, page_table=table.to(torch.int32))

    @pytest.mark.parametrize("layout", ["joint", "head-major"])
    def test_strides_of_the_pages_do_not_matter(self, subject: Subject, layout: str) -> None:
        """``[pages, 2, page_size, heads, dim]`` and ``[pages, heads, page_size, dim]``."""
        subject.require("paged")
        subject.require_length(255)
        k, v, table = make_cache(subject, [255, 40], 255, page_size=16)
        if layout == "joint":
            k, v = torch.stack([k, v], 1).unbind(1)
        else:
            k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
        q = subject.randn(2, 1, 4, 64)
        check_decode(subject, q, k, v, int32(subject, 255, 40), page_table=table)

    def test_views_of_a_page_table(self, subject: Subject) -> None:
        """The rows of a larger table, as a server keeps one for all its sequences."""
        subject.require("paged")
        subject.require_length(255)
        k, v, table = make_cache(subject, [255, 40, 120], 255, page_size=16)
        assert table is not None
        large = table.new_full((3, table.shape[1] + 5), -1)
        large[:, : table.shape[1]] = table
        q = subject.randn(3, 1, 4, 64)
        lengths = int32(subject, 255, 40, 120)
        check_decode(subject, q, k, v, lengths, page_table=large[:, : table.shape[1]])

    def test_every_query_finds_its_own_key(self, subject: Subject) -> None:
        subject.require("paged", "multi-token")
        subject.require_length(1000)
        lengths, q_len, page_size = int32(subject, 1000, 63, 400), 3, 16
        _, v, table = make_cache(subject, lengths.tolist(), 1000, page_size=page_size)
        assert table is not None
        k = coded_keys(subject, *v.shape)
        last = lengths.view(-1, 1, 1) - q_len + torch.arange(q_len, device=subject.device)[:, None]
        wanted = (last - subject.randint(0, 1000, (3, q_len, 4)) % lengths.view(-1, 1, 1)).clamp(0)
        pages = table.gather(1, (wanted // page_size).flatten(1).long()).view_as(wanted).long()
        heads = torch.arange(4, device=subject.device) // 2
        chosen = pages, (wanted % page_size).long(), heads
        got = subject.run(
            longctx.decode_attention_with_lse, k[chosen], k, v,
            cache_seqlens=lengths, page_table=table, scale=1.0,
        )  # fmt: skip
        check_found(subject, got, v[chosen], 64 * 64)


@pytest.mark.longctx_op("decode_attention")
class TestDecodeFP8Cache:
    """An e4m3 cache with a factor a sequence and KV head, queries in the dtype under test."""

    @staticmethod
    def _factors(subject: Subject, batch: int, kv_heads: int, names: str = "kv") -> dict[str, Any]:
        made = {
            f"{name}_scale": 0.1 + torch.rand(batch, kv_heads, generator=subject.generator)
            for name in names
        }
        return {name: factor.to(subject.device) for name, factor in made.items()}

    @pytest.mark.parametrize("page_size", [None, 1, 16, 100])
    @pytest.mark.parametrize("q_len", [1, 5])
    def test_pages(self, subject: Subject, q_len: int, page_size: int | None) -> None:
        features = (*(("multi-token",) if q_len > 1 else ()), *(("paged",) if page_size else ()))
        subject.require("fp8", *features)
        subject.require_length(1000)
        lengths = [1000, q_len, 129]
        k, v, table = make_cache(subject, lengths, 1010, page_size=page_size, dtype=FP8)
        check_decode(
            subject, subject.randn(3, q_len, 4, 64), k, v, int32(subject, *lengths),
            page_table=table, **self._factors(subject, 3, 2),
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads", "head_dim"),
        [(3, 3, 64), (8, 2, 128), (16, 1, 128), (16, 2, 64), (4, 2, 256)],
    )
    def test_heads(self, subject: Subject, q_heads: int, kv_heads: int, head_dim: int) -> None:
        subject.require("fp8", q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        subject.require_length(300)
        k, v, _ = make_cache(
            subject, [129, 300], 300, kv_heads=kv_heads, head_dim=head_dim, dtype=FP8
        )
        q = subject.randn(2, 1, q_heads, head_dim)
        factors = self._factors(subject, 2, kv_heads)
        check_decode(subject, q, k, v, int32(subject, 129, 300), **factors)

    @pytest.mark.parametrize("names", ["", "k", "v"])
    def test_either_factor_may_be_left_out(self, subject: Subject, names: str) -> None:
        subject.require("fp8")
        subject.require_length(129)
        k, v, _ = make_cache(subject, [129, 64], 129, dtype=FP8)
        q, factors = subject.randn(2, 1, 4, 64), self._factors(subject, 2, 2, names)
        check_decode(subject, q, k, v, int32(subject, 129, 64), **factors)

    def test_everything_at_once(self, subject: Subject) -> None:
        subject.require("fp8", "paged", "multi-token", "window", "softcap", "sinks")
        subject.require_length(1000)
        k, v, table = make_cache(subject, [1000, 77], 1003, page_size=16, dtype=FP8)
        check_decode(
            subject, subject.randn(2, 3, 4, 64), k, v, int32(subject, 1000, 77), page_table=table,
            window=(130, 0), softcap=3.0, scale=0.1, sinks=subject.randn(4, dtype=torch.float32),
            **self._factors(subject, 2, 2),
        )  # fmt: skip

    @pytest.mark.parametrize("page_size", [None, 16])
    def test_factors_belong_to_sequences_and_kv_heads(
        self, subject: Subject, page_size: int | None
    ) -> None:
        """Powers of two and coded keys: every output is a value times its own factor."""
        subject.require("fp8", *(("paged",) if page_size else ()), q_heads=6, kv_heads=3)
        subject.require_length(64)
        _, v, table = make_cache(subject, [64, 64], 64, page_size=page_size, kv_heads=3, dtype=FP8)
        k = coded_keys(subject, *v.shape).to(FP8)
        # the keys of a sequence in order, whatever the pages
        every_k, every_v = (
            (t if table is None else t.view(torch.uint8)[table.long()].view(FP8).flatten(1, 2))
            .float()
            .repeat_interleave(2, 2)
            for t in (k, v)
        )
        wanted = subject.randint(0, 64, (2, 1, 6, 1), torch.int64).expand(-1, -1, -1, 64)
        q = every_k.gather(1, wanted).to(subject.dtype)
        scales: list[Tensor] = [
            2.0 ** torch.arange(low, low + 6.0, device=subject.device).view(2, 3)
            for low in (0, -3)
        ]
        out, lse = subject.run(
            longctx.decode_attention_with_lse, q, k, v, cache_seqlens=int32(subject, 64, 64),
            page_table=table, k_scale=scales[0], v_scale=scales[1], scale=1.0,
        )  # fmt: skip
        k_factor, v_factor = (factor.repeat_interleave(2, 1) for factor in scales)
        found = (out.float() / v_factor[:, None, :, None]).to(out.dtype)
        score = 64 * 64 * k_factor.unsqueeze(2)
        check_found(subject, (found, lse), every_v.gather(1, wanted), score)
