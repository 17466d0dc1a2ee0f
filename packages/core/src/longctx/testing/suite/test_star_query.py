"""Phase 2 of Star Attention: query tokens over the keys of all shards, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.protocols.attention import AttentionOutput
from longctx.reference import flash as flash_oracle
from longctx.reference import star as oracle
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_flash import (
    check_found,
    check_rows,
    coarse,
    coarse_qkv,
    coded_keys,
)
from longctx.testing.suite.test_flash_offsets import far_apart
from longctx.testing.suite.test_flash_refusals import check_refusal

__all__ = ["TestStarQuery"]

Shards = list[tuple[Tensor, Tensor]]


def split(k: Tensor, v: Tensor, lengths: Sequence[int]) -> Shards:
    """Return shards of the given lengths."""
    return list(
        zip(torch.split(k, list(lengths), 1), torch.split(v, list(lengths), 1), strict=True)
    )


def check_query(subject: Subject, q: Tensor, shards: Shards, **options: Any) -> AttentionOutput:
    """Check phase 2 against one softmax over the keys of all shards."""
    got: AttentionOutput = subject.run(longctx.star_query_attention_with_lse, q, shards, **options)
    wide = [(k.double(), v.double()) for k, v in shards]
    exact = oracle.star_query_attention(q.double(), wide, **options)
    narrow = [(coarse(k), coarse(v)) for k, v in shards]
    low = oracle.star_query_attention(coarse(q), narrow, **options)
    check_rows(subject, got, exact, low)
    return got


SHARDS = [
    ((130,), 0),
    ((65, 65), -1),
    ((65, 65), 0),
    ((0, 110, 0, 20), 3),
    ((20, 1, 64, 1, 44), 2),
    ((99, 0, 31, 0), -2),
]


@pytest.mark.longctx_op("star_query_attention")
class TestStarQuery:
    """Phase 2: one softmax over all shards, causal on the shard of the queries alone."""

    @pytest.mark.parametrize("q_len", [1, 7, 20])
    @pytest.mark.parametrize(("lengths", "owner"), SHARDS, ids=str)
    def test_equals_one_softmax(
        self, subject: Subject, lengths: tuple[int, ...], owner: int, q_len: int
    ) -> None:
        subject.require()
        subject.require_length(130)
        q, k, v = subject.qkv(2, q_len, 130)
        check_query(subject, q, split(k, v, lengths), query_shard=owner)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_every_length(self, subject: Subject, length: int) -> None:
        subject.require()
        subject.require_length(length)
        q_len = min(65, length)
        q, k, v = subject.qkv(1, q_len, length)
        first = (length - q_len) // 3
        check_query(subject, q, split(k, v, (first, length - first - q_len, q_len)))

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads", "head_dim"),
        [(3, 3, 64), (4, 1, 64), (8, 2, 128), (16, 1, 128), (16, 2, 64), (4, 2, 256)],
    )
    def test_heads(self, subject: Subject, q_heads: int, kv_heads: int, head_dim: int) -> None:
        subject.require(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        subject.require_length(129)
        q, k, v = subject.qkv(2, 9, 129, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        check_query(subject, q, split(k, v, (60, 40, 29)), scale=0.2)

    @pytest.mark.parametrize(
        "lengths", [(255,), (10, 245), (64, 0, 185, 6), (1,) * 40 + (215,)], ids=len
    )
    def test_any_split_is_dense_attention(
        self, subject: Subject, lengths: tuple[int, ...]
    ) -> None:
        subject.require()
        subject.require_length(255)
        q, k, v = subject.qkv(1, 6, 255)
        got = subject.run(longctx.star_query_attention_with_lse, q, split(k, v, lengths))
        exact = flash_oracle.flash_attention(q.double(), k.double(), v.double(), causal=True)
        check_rows(
            subject, got, exact, flash_oracle.flash_attention(*coarse_qkv(q, k, v), causal=True)
        )

    def test_order_of_the_shards_does_not_matter(self, subject: Subject) -> None:
        subject.require()
        subject.require_length(129)
        q, k, v = subject.qkv(1, 5, 129)
        shards = split(k, v, (60, 40, 29))
        for order in permutations(range(3)):
            moved = [shards[n] for n in order]
            check_query(subject, q, moved, query_shard=order.index(2))

    @pytest.mark.parametrize("owner", [0, 1, 2])
    def test_the_shard_of_the_queries_alone_is_causal(self, subject: Subject, owner: int) -> None:
        """Every query finds the last key of the other shards; of its own, what comes before it.

        A causal mask on all shards, aligned at their ends, hides remote keys from early queries.
        """
        subject.require()
        subject.require_length(130)
        q_len, lengths = 9, (65, 70, 63)
        keys = [coded_keys(subject, 1, length, 2, 64) for length in lengths]
        shards = [(k, subject.randn(*k.shape)) for k in keys]
        for target, (k, v) in enumerate(shards):
            last = torch.full((q_len,), lengths[target] - 1, device=subject.device)
            if target == owner:
                last = last - torch.arange(q_len - 1, -1, -1, device=subject.device)
            q = k[:, last].repeat_interleave(2, 2)
            got = subject.run(
                longctx.star_query_attention_with_lse, q, shards, query_shard=owner, scale=1.0
            )
            check_found(subject, got, v[:, last].repeat_interleave(2, 2), 64 * 64)

    def test_each_key_is_counted_once(self, subject: Subject) -> None:
        """With scores of 0, ``exp(lse)`` is the number of keys that a query sees."""
        subject.require()
        subject.require_length(1000)
        q, k, v = subject.qkv(1, 16, 1000)
        for lengths, owner in (((400, 0, 584, 16), 3), ((333, 300, 367), 1)):
            lse = subject.run(
                longctx.star_query_attention_with_lse, torch.zeros_like(q),
                split(k, v, lengths), query_shard=owner,
            ).lse  # fmt: skip
            seen = torch.arange(985, 1001, device=subject.device).double()
            assert torch.equal(lse.double().exp().round(), seen.expand_as(lse))

    @pytest.mark.parametrize("gap", [120.0, 2000.0])
    def test_far_apart_shards_merge_exactly(self, subject: Subject, gap: float) -> None:
        """``exp(gap)`` overflows fp32: the highest shard alone is left."""
        subject.require()
        q = torch.zeros_like(subject.randn(1, 1, 4, 64))
        q[..., 0] = 1
        shards = []
        for level in (0.0, gap, -gap):
            k = torch.zeros_like(subject.randn(1, 1, 2, 64))
            k[..., 0] = level
            shards.append((k, subject.randn(1, 1, 2, 64)))
        for order in permutations(range(3)):
            got = subject.run(
                longctx.star_query_attention_with_lse, q, [shards[n] for n in order], scale=1.0
            )
            check_found(subject, got, shards[1][1].repeat_interleave(2, 2), gap)

    def test_no_queries(self, subject: Subject) -> None:
        subject.require()
        q, k, v = subject.qkv(2, 0, 0)
        out, lse = subject.run(longctx.star_query_attention_with_lse, q, [(k, v), (k, v)])
        assert out.shape == (2, 0, 4, 64)
        assert lse.shape == (2, 4, 0)

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "sequence", "heads"])
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_offsets_beyond_32_bits(self, subject: Subject, name: str, axis: int) -> None:
        subject.require()
        tensors = dict(zip("qkv", subject.qkv(2, 129, 255), strict=True))
        tensors[name] = far_apart(subject, tensors[name], axis)
        other = subject.randn(2, 60, 2, 64), subject.randn(2, 60, 2, 64)
        check_query(subject, tensors["q"], [other, (tensors["k"], tensors["v"])])

    @pytest.mark.parametrize(
        ("message", "lengths", "options"),
        [
            ("at least one (k, v) pair, got none", (), {}),
            ("between -1 and 0 for 1 shards, got 1", (6,), {"query_shard": 1}),
            ("must hold the 4 queries' own keys, it holds 3", (6, 3), {}),
            ("scale must be finite", (6,), {"scale": math.inf}),
        ],
    )
    def test_bad_shards_say_what_is_wrong(
        self,
        subject: Subject,
        message: str,
        lengths: tuple[int, ...],
        options: dict[str, Any],
    ) -> None:
        q, k, v = subject.qkv(1, 4, sum(lengths))
        shards = split(k, v, lengths) if lengths else []
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            subject.run(longctx.star_query_attention, q, shards, **options)
        assert message in str(caught.value)

    def test_a_shard_that_does_not_fit_is_named(self, subject: Subject) -> None:
        q, k, v = subject.qkv(1, 4, 8)
        bad = k[..., :32].contiguous(), v
        with pytest.raises(ValueError, match=r"shard 1 of 2 does not fit: .*agree in head_dim"):
            subject.run(longctx.star_query_attention, q, [(k, v), bad])

    def test_a_gradient_is_refused(self, subject: Subject) -> None:
        q, k, v = subject.qkv(1, 4, 8)
        k.requires_grad_()
        check_refusal(
            subject,
            lambda: subject.run(longctx.star_query_attention, q, [(k, v)]),
            gradient=True,
        )
