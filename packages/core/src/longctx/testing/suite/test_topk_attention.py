"""Attention over chosen keys: holes, pages, sinks, sets a KV head, MLA, and all keys chosen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx import TopKPlan
from longctx.reference.flash import flash_attention as dense
from longctx.reference.flash import masked_attention
from longctx.testing.subject import Subject
from longctx.testing.suite.test_flash_offsets import far_apart
from longctx.testing.suite.test_index_scores import indexer_inputs
from longctx.testing.suite.test_lightning import capture, farthest

__all__ = ["TestTopkAttention", "TestTopkAttentionMla"]

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def random_choice(
    subject: Subject, batch: int, q_len: int, sets: int, top_k: int, units: int
) -> Tensor:
    """Return unique indices in any order, a third of them -1; the first row has none."""
    made = torch.rand(batch, q_len, sets, units, generator=subject.generator)
    indices = made.argsort(-1)[..., :top_k]
    holes = torch.rand(indices.shape, generator=subject.generator) < 1 / 3
    indices = indices.masked_fill(holes, -1)
    indices[:, 0] = -1
    return indices.to(subject.device, torch.int32)


def run_and_check(
    subject: Subject, made: Triple, plan: TopKPlan, sinks: Tensor | None = None, **options: Any
) -> Pair:
    """Run topk_attention on q, k, v, check it against the oracle, return its result."""
    got = subject.run(longctx.topk_attention_with_lse, *made, plan, sinks=sinks, **options)
    check_results(subject, got, *references(made, plan, sinks, **options))
    return got[0], got[1]


def references(
    made: Triple, plan: TopKPlan, sinks: Tensor | None = None, **options: Any
) -> tuple[Pair, Pair]:
    """Return the oracle's ``(out, lse)`` in fp64 and in the precision at test.

    The latter is the worse of two orders of the keys, for the order of sums is the backend's.
    """
    q, k, v = made
    mask = plan.to_mask(q.shape[1], k.shape[1])
    mask = mask.repeat_interleave(q.shape[2] // mask.shape[1], 1)
    wide_sinks = None if sinks is None else sinks.double()
    exact = masked_attention(q.double(), k.double(), v.double(), mask, sinks=wide_sinks, **options)
    turned = masked_attention(q, k.flip(1), v.flip(1), mask.flip(3), sinks=sinks, **options)
    straight = masked_attention(q, k, v, mask, sinks=sinks, **options)
    out, lse = (
        farthest(*three) for three in zip(exact, zip(straight, turned, strict=True), strict=True)
    )
    return exact, (out, lse)


def check_results(subject: Subject, got: Any, exact: Pair, low: Pair) -> None:
    """Check data types, layouts, outputs and log-sum-exps."""
    out, lse = got
    assert (out.dtype, lse.dtype) == (subject.dtype, torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    subject.check_all((out, lse), exact, low)


def check_numbers_of_keys(subject: Subject, made: Triple, plan: TopKPlan) -> None:
    """Check rows whose scores are all 0: ``exp(lse)`` is the number of keys.

    Half precision does not know the score of a key as well as this number.
    """
    q, k, v = made
    _, lse = run_and_check(subject, (torch.zeros_like(q), k, v), plan)
    count = plan.to_mask(q.shape[1], k.shape[1]).sum(-1).double()
    assert torch.equal(lse.double().exp().round(), count.expand(-1, q.shape[2], -1))


@pytest.mark.longctx_op("topk_attention")
class TestTopkAttention:
    """GQA and MQA over single keys and pages."""

    @pytest.mark.parametrize(
        ("q_len", "k_len", "top_k"),
        [(1, 63, 16), (65, 129, 1), (63, 65, 64), (129, 127, 33), (33, 1000, 129), (9, 4099, 512)],
    )
    def test_sizes(self, subject: Subject, q_len: int, k_len: int, top_k: int) -> None:
        subject.require()
        subject.require_length(q_len, k_len)
        plan = TopKPlan(random_choice(subject, 2, q_len, 1, top_k, k_len))
        run_and_check(subject, subject.qkv(2, q_len, k_len), plan)

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (8, 2), (8, 1), (16, 1), (6, 2), (32, 2)]
    )
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_grouped_heads(
        self, subject: Subject, head_dim: int, q_heads: int, kv_heads: int
    ) -> None:
        heads = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
        subject.require(**heads)
        subject.require_length(255)
        plan = TopKPlan(random_choice(subject, 1, 33, 1, 40, 255))
        run_and_check(subject, subject.qkv(1, 33, 255, **heads), plan, scale=0.3)

    @pytest.mark.parametrize("top_k", [1, 63, 64, 65, 300])
    def test_every_index_counts_once(self, subject: Subject, top_k: int) -> None:
        subject.require()
        subject.require_length(1000)
        plan = TopKPlan(random_choice(subject, 2, 65, 1, top_k, 1000))
        check_numbers_of_keys(subject, subject.qkv(2, 65, 1000), plan)

    @pytest.mark.parametrize("place", [0, 31, 32, 100])
    def test_one_key_alone_gives_its_value(self, subject: Subject, place: int) -> None:
        """To the bit, wherever in the row its index stands; after the query, too."""
        subject.require()
        subject.require_length(255)
        q, k, v = subject.qkv(2, 129, 255)
        chosen = subject.randint(0, 255, (2, 129))
        indices = torch.full((2, 129, 1, 101), -1, dtype=torch.int32, device=subject.device)
        indices[:, :, 0, place] = chosen
        out = subject.run(longctx.topk_attention, q, k, v, TopKPlan(indices))
        rows = chosen.long().view(2, 129, 1, 1).expand(-1, -1, 2, 64)
        assert torch.equal(out, v.gather(1, rows).repeat_interleave(2, 2))

    def test_rows_without_keys_are_zero(self, subject: Subject) -> None:
        subject.require()
        subject.require_length(129)
        indices = random_choice(subject, 2, 65, 1, 20, 129)
        indices[0, 30:50] = -1
        indices[1] = -1
        out, lse = run_and_check(subject, subject.qkv(2, 65, 129), TopKPlan(indices))
        empty = (indices == -1).all(-1).squeeze(-1)
        assert (out[empty] == 0).all()
        assert torch.equal(lse == -torch.inf, empty.unsqueeze(1).expand(-1, 4, -1))

    @pytest.mark.parametrize("spread", [2.0, 30.0])
    def test_sinks(self, subject: Subject, spread: float) -> None:
        subject.require("sinks")
        subject.require_length(129)
        sinks = subject.randn(4, dtype=torch.float32, scale=spread)
        plan = TopKPlan(random_choice(subject, 2, 65, 1, 20, 129))
        out, lse = run_and_check(subject, subject.qkv(2, 65, 129), plan, sinks=sinks)
        assert (out[:, 0] == 0).all()
        assert torch.equal(lse[:, :, 0], sinks.expand(2, 4))

    @pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
    @pytest.mark.parametrize("page_size", [1, 16])
    def test_a_set_each_kv_head(self, subject: Subject, page_size: int, sinks: bool) -> None:
        features = ["per-kv-head", *(["pages"] if page_size > 1 else [])]
        subject.require(*features, *(["sinks"] if sinks else []), q_heads=6, kv_heads=3)
        subject.require_length(255)
        made = subject.qkv(2, 65, 255, q_heads=6, kv_heads=3)
        units = -(-255 // page_size)
        plan = TopKPlan(random_choice(subject, 2, 65, 3, 12, units), "kv", page_size)
        logits = subject.randn(6, dtype=torch.float32) if sinks else None
        run_and_check(subject, made, plan, logits)

    @pytest.mark.parametrize(("q_len", "k_len"), [(1, 255), (65, 129), (129, 127)])
    @pytest.mark.parametrize("page_size", [2, 16, 64, 100])
    def test_pages(self, subject: Subject, page_size: int, q_len: int, k_len: int) -> None:
        """The last page is ragged, and keys of a page that are behind the query are masked."""
        subject.require("pages")
        subject.require_length(q_len, k_len)
        made = subject.qkv(2, q_len, k_len)
        units = -(-k_len // page_size)
        indices = random_choice(subject, 2, q_len, 1, min(5, units), units)
        plan = TopKPlan(indices, page_size=page_size)
        run_and_check(subject, made, plan)
        check_numbers_of_keys(subject, made, plan)

    @pytest.mark.parametrize("page_size", [1, 16])
    def test_what_nobody_chose_may_hold_nan(self, subject: Subject, page_size: int) -> None:
        """Key 0 among it, where an index of -1 would be read without care."""
        subject.require(*(["pages"] if page_size > 1 else []))
        subject.require_length(255)
        q, k, v = subject.qkv(2, 65, 255)
        indices = random_choice(subject, 2, 65, 1, 3, -(-255 // page_size))
        indices[indices == 0] = -1
        plan = TopKPlan(indices, page_size=page_size)
        used = plan.to_mask(65, 255).any(2).any(1)
        exact, low = references((q, k, v), plan)
        for tensor in (k, v):
            tensor[~used] = math.nan
        assert k[:, 0].isnan().all()
        got = subject.run(longctx.topk_attention_with_lse, q, k, v, plan)
        check_results(subject, got, exact, low)

    def test_views(self, subject: Subject) -> None:
        """Head-major queries; keys in a longer cache, whose free slots hold NaN."""
        subject.require()
        subject.require_length(129)
        q = subject.randn(2, 4, 65, 64).transpose(1, 2)
        k, v = (subject.randn(2, 200, 2, 64) for _ in range(2))
        for tensor in (k, v):
            tensor[:, 129:] = math.nan
        plan = TopKPlan(random_choice(subject, 2, 65, 1, 20, 129))
        run_and_check(subject, (q, k[:, :129], v[:, :129]), plan)

    def test_a_context_of_131072_keys(self, subject: Subject) -> None:
        subject.require(q_heads=2, kv_heads=1)
        subject.require_length(4099)  # the work depends on the number of chosen keys alone
        q, k, v = subject.qkv(1, 3, 131_072, q_heads=2, kv_heads=1)
        indices = random_choice(subject, 1, 3, 1, 2048, 131_072)
        out, lse = subject.run(longctx.topk_attention_with_lse, q, k, v, TopKPlan(indices))
        places = torch.arange(2048, dtype=torch.int32, device=subject.device)
        for n, chosen in enumerate(indices[0, :, 0]):
            row, keys = slice(n, n + 1), chosen.clamp(min=0).long()
            plan = TopKPlan(places.where(chosen >= 0, -1).view(1, 1, 1, -1))
            exact, low = references((q[:, row], k[:, keys], v[:, keys]), plan)
            got = out[:, row].contiguous(), lse[..., row].contiguous()
            check_results(subject, got, exact, low)

    @pytest.mark.parametrize("length", [63, 129])
    def test_all_keys_chosen_by_the_indexer_is_dense_attention(
        self, subject: Subject, length: int
    ) -> None:
        subject.require()
        subject.require(op="index_topk", kv_heads=1)
        subject.require_length(length)
        q, k, v = subject.qkv(2, length, length)
        index_q, index_k, weights = indexer_inputs(subject, 2, length, length)
        choose = longctx.index_topk
        plan = subject.run(choose, index_q, index_k, None, weights, length + 3)
        got = subject.run(longctx.topk_attention_with_lse, q, k, v, plan)
        exact = dense(q.double(), k.double(), v.double(), causal=True)
        check_results(subject, got, exact, dense(q, k, v, causal=True))
        fewer = subject.run(choose, index_q, index_k, None, weights, 16)
        out, _ = run_and_check(subject, (q, k, v), fewer)
        # a selector that takes everything would pass above
        assert (out[:, 16:] - got.out[:, 16:]).abs().amax((2, 3)).min() > 0

    @pytest.mark.parametrize(("batch", "q_len", "k_len"), [(0, 3, 9), (2, 0, 9), (2, 5, 0)])
    def test_nothing_to_attend(self, subject: Subject, batch: int, q_len: int, k_len: int) -> None:
        subject.require()
        indices = torch.full((batch, q_len, 1, 4), -1, dtype=torch.int32, device=subject.device)
        made = subject.qkv(batch, q_len, k_len)
        out, lse = subject.run(longctx.topk_attention_with_lse, *made, TopKPlan(indices))
        assert out.shape == (batch, q_len, 4, 64)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()

    @pytest.mark.parametrize(
        ("name", "axis"), [(n, a) for n in "qkv" for a in (0, 1, 2)] + [("indices", 1)]
    )
    def test_inputs_far_apart(self, subject: Subject, name: str, axis: int) -> None:
        """One input at a time has its last entry along an axis 2**31 elements away."""
        subject.require()
        subject.require_length(129)
        made = dict(zip("qkv", subject.qkv(2, 65, 129), strict=True))
        made["indices"] = random_choice(subject, 2, 65, 1, 20, 129)
        made["indices"][:, -1] = -1
        made["indices"][:, -1, 0, 0] = 128  # the last query sees the last key
        made[name] = far_apart(subject, made[name], axis)
        run_and_check(subject, (made["q"], made["k"], made["v"]), TopKPlan(made["indices"]))

    def test_captured_indices_may_change(self, subject: Subject) -> None:
        subject.require_cuda()
        subject.require()
        q, k, v = subject.qkv(2, 65, 129)
        indices = random_choice(subject, 2, 65, 1, 20, 129)
        graph, got = capture(
            lambda: longctx.topk_attention_with_lse(
                q, k, v, TopKPlan(indices), backend=subject.backend
            )
        )
        for _ in range(2):
            indices.copy_(random_choice(subject, 2, 65, 1, 20, 129))
            graph.replay()
            exact, low = references((q, k, v), TopKPlan(indices))
            check_results(subject, got, exact, low)


@pytest.mark.longctx_op("topk_attention")
class TestTopkAttentionMla:
    """Absorbed MLA: one KV head of 576 channels, whose first 512 are the values."""

    @pytest.mark.parametrize("separate", [False, True], ids=["view", "copy"])
    @pytest.mark.parametrize("heads", [8, 16, 128])
    def test_heads(self, subject: Subject, heads: int, separate: bool) -> None:
        _require_mla(subject, heads)
        subject.require_length(127)
        q, latent = _latent_inputs(subject, 1, 9, 127, heads)
        v = latent[..., :512].clone() if separate else latent[..., :512]
        plan = TopKPlan(random_choice(subject, 1, 9, 1, 65, 127))
        run_and_check(subject, (q, latent, v), plan, scale=0.02)

    def test_unchosen_rows_of_nan_and_sinks(self, subject: Subject) -> None:
        _require_mla(subject, 16, "sinks")
        subject.require_length(255)
        q, latent = _latent_inputs(subject, 2, 33, 255)
        indices = random_choice(subject, 2, 33, 1, 5, 255)
        indices[indices == 0] = -1
        plan = TopKPlan(indices)
        sinks = subject.randn(16, dtype=torch.float32)
        unused = ~plan.to_mask(33, 255).any(2).any(1)
        exact, low = references((q, latent, latent[..., :512]), plan, sinks, scale=0.02)
        latent[unused] = math.nan
        assert latent[:, 0].isnan().all()
        got = subject.run(
            longctx.topk_attention_with_lse, q, latent, latent[..., :512], plan,
            scale=0.02, sinks=sinks,
        )  # fmt: skip
        check_results(subject, got, exact, low)

    def test_every_index_counts_once(self, subject: Subject) -> None:
        _require_mla(subject, 16)
        subject.require_length(1000)
        q, latent = _latent_inputs(subject, 1, 33, 1000)
        plan = TopKPlan(random_choice(subject, 1, 33, 1, 300, 1000))
        check_numbers_of_keys(subject, (q, latent, latent[..., :512]), plan)


def _require_mla(subject: Subject, heads: int, *features: str) -> None:
    subject.require("mla", *features, q_heads=heads, kv_heads=1, head_dim=576, value_dim=512)


def _latent_inputs(
    subject: Subject, batch: int, q_len: int, k_len: int, heads: int = 16
) -> tuple[Tensor, Tensor]:
    """Return q and latent rows of whole numbers: sums of 576 products, exact in any order."""
    q = subject.randint(-3, 4, (batch, q_len, heads, 576), torch.float32)
    latent = subject.randint(-3, 4, (batch, k_len, 1, 576), torch.float32)
    return q.to(subject.dtype), latent.to(subject.dtype)
