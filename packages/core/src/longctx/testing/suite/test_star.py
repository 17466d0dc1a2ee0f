"""Phase 1 of Star Attention: the context in blocks, each behind the first tokens."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.protocols.attention import AttentionOutput
from longctx.reference import flash as flash_oracle
from longctx.reference import star as oracle
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_flash import check_rows, coarse_qkv
from longctx.testing.suite.test_flash_offsets import far_apart
from longctx.testing.suite.test_flash_refusals import check_refusal

__all__ = ["TestStarContext"]


def check_context(
    subject: Subject, q: Tensor, k: Tensor, v: Tensor, block_size: int, anchor_size: int
) -> AttentionOutput:
    """Check phase 1 against its mask, and the number of keys that each query sees."""
    attend = longctx.star_context_attention_with_lse
    sizes: dict[str, Any] = {"block_size": block_size, "anchor_size": anchor_size}
    got: AttentionOutput = subject.run(attend, q, k, v, **sizes)
    exact = oracle.star_context_attention(q.double(), k.double(), v.double(), **sizes)
    check_rows(subject, got, exact, oracle.star_context_attention(*coarse_qkv(q, k, v), **sizes))
    flat = subject.run(attend, torch.zeros_like(q), k, v, **sizes)
    seen = oracle.star_context_mask(q.shape[1], k.shape[1], **sizes).sum(1).to(subject.device)
    count = flat.lse.double().exp().round()
    assert torch.equal(count, seen.double().expand_as(count)), "pairs were miscounted"
    return got


def _hosts(q: Tensor, k: Tensor, v: Tensor, *, anchor_size: int) -> tuple[Tensor, Tensor]:
    """Return what hosts with blocks of 64 compute, each for itself, as the paper has it."""
    outs, lses = [], []
    for start in range(0, q.shape[1], 64):
        own = list(range(start, min(start + 64, q.shape[1])))
        tokens = own if start == 0 else [*range(anchor_size), *own]
        out, lse = flash_oracle.flash_attention(
            q[:, tokens], k[:, tokens], v[:, tokens], causal=True
        )
        outs.append(out[:, -len(own) :])
        lses.append(lse[..., -len(own) :])
    return torch.cat(outs, 1), torch.cat(lses, 2)


@pytest.mark.longctx_op("star_context_attention")
class TestStarContext:
    """Phase 1: ``j <= i and (i // b == j // b or j < a)``, in absolute positions."""

    @pytest.mark.parametrize("anchor", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("block_size", [1, 48, 64, 65, 2000])
    @pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (129, 129), (65, 1000), (1, 255)])
    def test_equals_its_mask(
        self, subject: Subject, q_len: int, k_len: int, block_size: int, anchor: float
    ) -> None:
        subject.require()
        subject.require_length(k_len)
        made = subject.qkv(1, q_len, k_len)
        check_context(subject, *made, block_size, int(block_size * anchor))

    @pytest.mark.parametrize(
        ("block_size", "anchor_size"), [(1024, 1024), (1000, 7), (300, 129), (512, 0)]
    )
    def test_long(self, subject: Subject, block_size: int, anchor_size: int) -> None:
        """The last of the blocks is ragged."""
        subject.require(q_heads=1, kv_heads=1)
        subject.require_length(LENGTHS[-1])
        made = subject.qkv(1, 400, LENGTHS[-1], q_heads=1, kv_heads=1)
        check_context(subject, *made, block_size, anchor_size)

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads", "head_dim"),
        [(3, 3, 64), (4, 1, 64), (8, 2, 128), (16, 1, 128), (16, 2, 64), (4, 2, 256)],
    )
    def test_heads(self, subject: Subject, q_heads: int, kv_heads: int, head_dim: int) -> None:
        subject.require(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        subject.require_length(129)
        made = subject.qkv(2, 65, 129, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        check_context(subject, *made, 48, 20)

    @pytest.mark.parametrize("length", [1, 65, 255])
    @pytest.mark.parametrize("excess", [0, 1, 1000])
    def test_one_block_is_dense_attention(
        self, subject: Subject, excess: int, length: int
    ) -> None:
        subject.require()
        subject.require_length(length)
        made = subject.qkv(1, length, length)
        got = check_context(subject, *made, length + excess, min(length, 20))
        exact = flash_oracle.flash_attention(*(t.double() for t in made), causal=True)
        check_rows(
            subject, got, exact, flash_oracle.flash_attention(*coarse_qkv(*made), causal=True)
        )

    @pytest.mark.parametrize("anchor_size", [10, 64])
    def test_equals_the_recipe_of_the_paper(self, subject: Subject, anchor_size: int) -> None:
        """Each host attends causally over ``[anchor, its own block]`` and keeps the block."""
        subject.require()
        subject.require_length(300)
        made = subject.qkv(1, 300, 300)
        exact = _hosts(*(t.double() for t in made), anchor_size=anchor_size)
        low = _hosts(*coarse_qkv(*made), anchor_size=anchor_size)
        got = subject.run(
            longctx.star_context_attention_with_lse, *made, block_size=64, anchor_size=anchor_size
        )
        check_rows(subject, got, exact, low)

    @pytest.mark.parametrize("cuts", [(1,), (64, 128), (5, 40, 90, 250), tuple(range(60, 90))])
    def test_prefill_in_chunks_is_one_prefill(
        self, subject: Subject, cuts: tuple[int, ...]
    ) -> None:
        subject.require()
        subject.require_length(255)
        q, k, v = subject.qkv(1, 255, 255)
        sizes: dict[str, Any] = {"block_size": 64, "anchor_size": 30}
        parts = [
            subject.run(
                longctx.star_context_attention_with_lse,
                q[:, start:stop], k[:, :stop], v[:, :stop], **sizes,
            )
            for start, stop in pairwise((0, *cuts, 255))
        ]  # fmt: skip
        outs, lses = zip(*parts, strict=True)
        exact = oracle.star_context_attention(q.double(), k.double(), v.double(), **sizes)
        low = oracle.star_context_attention(*coarse_qkv(q, k, v), **sizes)
        check_rows(subject, (torch.cat(outs, 1), torch.cat(lses, 2)), exact, low)

    def test_scale(self, subject: Subject) -> None:
        subject.require()
        subject.require_length(129)
        made = subject.qkv(1, 129, 129)
        options: dict[str, Any] = {"block_size": 48, "anchor_size": 16, "scale": 0.4}
        got = subject.run(longctx.star_context_attention_with_lse, *made, **options)
        exact = oracle.star_context_attention(*(t.double() for t in made), **options)
        check_rows(
            subject, got, exact, oracle.star_context_attention(*coarse_qkv(*made), **options)
        )

    def test_no_tokens(self, subject: Subject) -> None:
        subject.require()
        out, lse = subject.run(
            longctx.star_context_attention_with_lse, *subject.qkv(2, 0, 0),
            block_size=4, anchor_size=2,
        )  # fmt: skip
        assert out.shape == (2, 0, 4, 64)
        assert lse.shape == (2, 4, 0)

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "sequence", "heads"])
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_offsets_beyond_32_bits(self, subject: Subject, name: str, axis: int) -> None:
        subject.require()
        tensors = dict(zip("qkv", subject.qkv(2, 129, 255), strict=True))
        tensors[name] = far_apart(subject, tensors[name], axis)
        check_context(subject, tensors["q"], tensors["k"], tensors["v"], 100, 40)

    @pytest.mark.parametrize(
        ("message", "change"),
        [
            ("block_size must be at least 1, got 0", {"block_size": 0}),
            ("anchor_size must be at least 0, got -1", {"anchor_size": -1}),
            ("anchor_size must be at most block_size", {"anchor_size": 5}),
            ("scale must be finite", {"scale": math.nan}),
        ],
    )
    def test_bad_sizes_say_what_is_wrong(
        self, subject: Subject, message: str, change: dict[str, Any]
    ) -> None:
        options = {"block_size": 4, "anchor_size": 4} | change
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            subject.run(longctx.star_context_attention, *subject.qkv(1, 8, 8), **options)
        assert message in str(caught.value)

    def test_queries_without_their_keys_are_refused(self, subject: Subject) -> None:
        with pytest.raises(ValueError, match="q_len=9, k_len=8"):
            subject.run(
                longctx.star_context_attention, *subject.qkv(1, 9, 8), block_size=4, anchor_size=4
            )

    def test_a_gradient_is_refused(self, subject: Subject) -> None:
        q, k, v = subject.qkv(1, 8, 8)
        q.requires_grad_()
        options = {"block_size": 4, "anchor_size": 4}
        check_refusal(
            subject,
            lambda: subject.run(longctx.star_context_attention, q, k, v, **options),
            gradient=True,
        )
