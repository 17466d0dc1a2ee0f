"""Merging partial results: order, empty parts, gaps of any size, agreement with the whole."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

import longctx
from longctx.protocols.attention import AttentionOutput
from longctx.reference import decode as oracle
from longctx.reference import flash as flash_oracle
from longctx.testing.subject import Subject
from longctx.testing.suite.test_flash import check_found
from longctx.testing.suite.test_flash_offsets import far_apart

__all__ = ["TestMergeAttention"]


def _parts(
    subject: Subject, parts: int, rows: int = 65, heads: int = 4, dim: int = 64, gap: float = 1.0
) -> tuple[Tensor, Tensor]:
    subject.require_length(rows)
    outs = subject.randn(parts, 2, rows, heads, dim)
    return outs, subject.randn(parts, 2, heads, rows, dtype=torch.float32, scale=gap)


def _check(subject: Subject, outs: Tensor, lses: Tensor) -> AttentionOutput:
    got: AttentionOutput = subject.run(longctx.merge_attention, outs, lses)
    assert got.out.dtype == outs.dtype
    assert got.lse.dtype == torch.float32
    assert got.out.is_contiguous()
    assert got.lse.is_contiguous()
    subject.check_all(
        got,
        oracle.merge_attention(outs.double(), lses.double()),
        oracle.merge_attention(outs, lses),
    )
    return got


@pytest.mark.longctx_op("merge_attention")
class TestMergeAttention:
    """Attention over disjoint sets of keys becomes attention over their union."""

    @pytest.mark.parametrize("parts", [1, 2, 3, 7, 33])
    @pytest.mark.parametrize("gap", [0.1, 5.0, 120.0, 3e4])
    def test_gaps_of_any_size(self, subject: Subject, gap: float, parts: int) -> None:
        """``exp`` of a difference over 88 overflows fp32; a shift by the maximum does not."""
        subject.require(kv_heads=4)
        _check(subject, *_parts(subject, parts, gap=gap))

    @pytest.mark.parametrize("rows", [1, 3, 127, 257])
    @pytest.mark.parametrize(("heads", "dim"), [(1, 64), (8, 128), (3, 256)])
    def test_shapes(self, subject: Subject, heads: int, dim: int, rows: int) -> None:
        subject.require(q_heads=heads, kv_heads=heads, head_dim=dim)
        _check(subject, *_parts(subject, 3, rows, heads, dim))

    @pytest.mark.parametrize("top", [-1000.0, 0.0, 1000.0])
    def test_a_part_far_below_vanishes(self, subject: Subject, top: float) -> None:
        subject.require(kv_heads=4)
        outs, lses = _parts(subject, 3)
        lses[0], lses[1], lses[2] = top - 300, top, top - 20_000
        got = subject.run(longctx.merge_attention, outs, lses)
        check_found(subject, got, outs[1], top)

    def test_equal_parts_weigh_the_same(self, subject: Subject) -> None:
        """Four parts of lse 0: the mean, and lse log 4."""
        subject.require(kv_heads=4)
        outs, lses = _parts(subject, 4)
        out, lse = subject.run(longctx.merge_attention, outs, torch.zeros_like(lses))
        exact = outs.double().mean(0)
        subject.check(out, exact, exact.to(subject.dtype))
        count = lse.double().exp()
        assert torch.equal(count.round(), torch.full_like(count, 4))

    def test_empty_parts_add_nothing_whatever_they_hold(self, subject: Subject) -> None:
        subject.require(kv_heads=4)
        outs, lses = _parts(subject, 5, gap=30.0)
        empty = subject.randint(0, 3, (5, 2, 4, 65)) == 0
        lses.masked_fill_(empty, -torch.inf)
        rows = empty.transpose(2, 3).unsqueeze(4)
        clean = _check(subject, outs.masked_fill(rows, 0), lses)
        for anything in (torch.nan, torch.inf, -torch.inf):
            dirty = outs.masked_fill(rows, anything)
            got = subject.run(longctx.merge_attention, dirty, lses)
            assert torch.equal(got.out, clean.out)
            assert torch.equal(got.lse, clean.lse)

    @pytest.mark.parametrize("parts", [1, 4])
    def test_nothing_but_empty_parts_is_an_empty_part(self, subject: Subject, parts: int) -> None:
        subject.require(kv_heads=4)
        outs, lses = _parts(subject, parts)
        outs[:, 0], lses[:, 0] = torch.nan, -torch.inf  # the other batch entry is an ordinary one
        out, lse = subject.run(longctx.merge_attention, outs, lses)
        assert (out[0] == 0).all()
        assert (lse[0] == -torch.inf).all()
        assert out[1].isfinite().all()
        assert lse[1].isfinite().all()

    def test_order_does_not_matter(self, subject: Subject) -> None:
        subject.require(kv_heads=4)
        outs, lses = _parts(subject, 4, rows=9, gap=40.0)
        lses[1, 0] = -torch.inf
        for order in permutations(range(4)):
            _check(subject, outs[list(order)], lses[list(order)])

    def test_groups_of_parts_merge_alike(self, subject: Subject) -> None:
        """Merged parts are parts again."""
        subject.require(kv_heads=4)
        outs, lses = _parts(subject, 6, gap=20.0)
        lses[:2, :, :, 10:20] = -torch.inf  # a whole group is empty there
        groups = [
            subject.run(longctx.merge_attention, outs[part], lses[part])
            for part in (slice(0, 2), slice(2, 5), slice(5, 6))
        ]
        merged = subject.run(
            longctx.merge_attention, [g.out for g in groups], [g.lse for g in groups]
        )
        exact = oracle.merge_attention(outs.double(), lses.double())
        # the outputs are rounded twice: once a group, once in the end
        low_groups = [
            oracle.merge_attention(outs[part].double(), lses[part].double())
            for part in (slice(0, 2), slice(2, 5), slice(5, 6))
        ]
        low = oracle.merge_attention(
            torch.stack([out.to(subject.dtype) for out, _ in low_groups]),
            torch.stack([lse.float() for _, lse in low_groups]),
        )
        subject.check_all(merged, exact, low)

    @pytest.mark.parametrize("sizes", [(1, 254), (85, 85, 85), (0, 255, 0), (3,) * 85])
    def test_merged_parts_are_the_whole(self, subject: Subject, sizes: tuple[int, ...]) -> None:
        """Softmax over each part of the keys, from the oracle, and over all of them."""
        subject.require(kv_heads=4)
        subject.require_length(255)
        q, k, v = subject.qkv(2, 65, 255)
        parts = [
            flash_oracle.flash_attention(q.float(), *(t.float() for t in pair))
            for pair in zip(
                torch.split(k, list(sizes), 1), torch.split(v, list(sizes), 1), strict=True
            )
        ]
        outs, lses = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        outs = outs.to(subject.dtype)
        got = subject.run(longctx.merge_attention, outs, lses)
        exact = flash_oracle.flash_attention(q.double(), k.double(), v.double())
        subject.check_all(got, exact, oracle.merge_attention(outs, lses))

    def test_lists_and_tensors_are_alike(self, subject: Subject) -> None:
        subject.require(kv_heads=4)
        outs, lses = _parts(subject, 3)
        one = subject.run(longctx.merge_attention, outs, lses)
        other = subject.run(longctx.merge_attention, list(outs), tuple(lses))
        assert torch.equal(one.out, other.out)
        assert torch.equal(one.lse, other.lse)

    def test_strides_do_not_matter(self, subject: Subject) -> None:
        subject.require(kv_heads=4)
        outs, lses = _parts(subject, 3)
        head_major = outs.transpose(2, 3).contiguous().transpose(2, 3)
        _check(subject, head_major, lses)
        parts_within = outs.permute(1, 2, 3, 0, 4).contiguous().permute(3, 0, 1, 2, 4)
        _check(subject, parts_within, lses)
        wide = lses.new_full((3, 2, 4, 70), torch.nan)
        wide[..., :65] = lses
        _check(subject, outs, wide[..., :65])

    @pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0)])
    def test_no_rows(self, subject: Subject, batch: int, rows: int) -> None:
        subject.require(kv_heads=4)
        outs = subject.randn(3, batch, rows, 4, 64)
        lses = subject.randn(3, batch, 4, rows, dtype=torch.float32)
        out, lse = subject.run(longctx.merge_attention, outs, lses)
        assert out.shape == (batch, rows, 4, 64)
        assert lse.shape == (batch, 4, rows)

    @pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["parts", "batch", "rows", "heads"])
    def test_offsets_beyond_32_bits(self, subject: Subject, axis: int) -> None:
        subject.require(kv_heads=4)
        outs, lses = _parts(subject, 3, rows=129)
        _check(subject, far_apart(subject, outs, axis), lses)
