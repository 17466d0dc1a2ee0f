"""DeepSeek Sparse Attention's kernels against the fp64 oracle; top-k exactly, with its ties."""

from __future__ import annotations

import math

import pytest
import torch

from longctx import TopKPlan
from longctx.reference import dsa as oracle
from longctx.testing.budget import assert_within_budget
from longctx_triton import dsa
from longctx_triton.launch import index_topk
from longctx_triton.launch.topk_tiles import TopkTiles, topk_tiles

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(8)


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantiser_equals_oracle_bit_for_bit(device, dtype, scale_format):
    x = (torch.randn(3, 5, 4, 128) * torch.randn(3, 5, 4, 1).exp() * 10).to(dtype).to(device)
    x[0, 0] = 0
    x[0, 1, 0, :40] *= 2.0**-9  # subnormal codes
    for view in (x, x.transpose(1, 2), x[:, 1:, 2:, :100], x[0, 0, 0], x.permute(2, 0, 1, 3)):
        values, scale = dsa.quantize_forward(view, scale_format=scale_format)
        expected, expected_scale = oracle.quantize_fp8(view, scale_format=scale_format)
        assert values.is_contiguous()
        assert torch.equal(values.view(torch.uint8), expected.contiguous().view(torch.uint8))
        assert torch.equal(scale, expected_scale)


def test_rounding_of_every_code_and_every_half_way(device):
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[codes.isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    row = torch.cat([codes, middles, middles * (1 + 1e-6), middles * (1 - 1e-6)]).to(device)
    values, scale = dsa.quantize_forward(row, scale_format="fp32")
    assert scale.item() == 1.0
    assert torch.equal(values.view(torch.uint8), row.to(FP8).view(torch.uint8))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_rows_that_are_not_finite_show_it_and_harm_no_other_row(device, bad):
    x = torch.ones(2, 4, device=device)
    x[0, 1] = bad
    for scale_format in ("fp32", "ue8m0"):
        values, scale = dsa.quantize_forward(x, scale_format=scale_format)
        assert not scale[0].isfinite()
        assert values[0, 1].float().isnan()
        assert values[1].float().isfinite().all()


def indexer(device, q_len, k_len, heads=5, dim=64, dtype=torch.float16, batch=2):
    q = torch.randn(batch, heads, q_len, dim, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(batch, k_len, dim + 16, device=device).to(dtype)[..., :dim]
    return q, k, torch.randn(batch, q_len, heads, device=device)


def ranges(device, q_len, k_len, batch=2):
    low = torch.randint(0, k_len // 2 + 1, (batch, q_len), dtype=torch.int32)
    high = torch.randint(k_len // 2, k_len + 1, (batch, q_len), dtype=torch.int32).clamp(min=low)
    high[0, 0] = low[0, 0]  # a query that sees nothing
    return {"key_start": low.to(device), "key_end": high.to(device)}


@pytest.mark.parametrize(("q_len", "k_len"), [(7, 77), (19, 7), (1, 130), (33, 33)])
@pytest.mark.parametrize("causal", [True, False])
def test_scores_equal_oracle(device, q_len, k_len, causal):
    q, k, weights = indexer(device, q_len, k_len)
    k_scale = torch.rand(2, k_len, device=device)
    none = {"key_start": None, "key_end": None}
    for bounds in (none, ranges(device, q_len, k_len)):
        scores = dsa.index_scores_forward(q, k, weights, k_scale=k_scale, causal=causal, **bounds)
        exact = oracle.index_scores(
            q, k, weights.double(), k_scale=k_scale, causal=causal, **bounds
        )
        low = oracle.index_scores(q, k, weights, k_scale=k_scale, causal=causal, **bounds)
        assert_within_budget(scores, exact, low, name="scores")


@pytest.mark.parametrize(("heads", "dim"), [(64, 128), (16, 32), (3, 96)])
def test_scores_of_fp8_equal_oracle(device, monkeypatch, heads, dim):
    monkeypatch.setenv("LONGCTX_TRITON_INDEXER", "fp16")
    q, k, weights = indexer(device, 5, 70, heads, dim, torch.float32, batch=1)
    q8, _ = oracle.quantize_fp8(q)
    k8, k_scale = oracle.quantize_fp8(k)
    options = {"k_scale": k_scale, "causal": True, "key_start": None, "key_end": None}
    scores = dsa.index_scores_forward(q8, k8, weights, **options)
    exact = oracle.index_scores(q8, k8, weights.double(), **options)
    assert_within_budget(scores, exact, oracle.index_scores(q8, k8, weights, **options))


def test_scores_of_fp8_products_are_within_their_accumulator(device):
    q, k, weights = indexer(device, 9, 200, 8, 128, torch.float32, batch=1)
    q8, _ = oracle.quantize_fp8(q)
    k8, k_scale = oracle.quantize_fp8(k)
    options = {"k_scale": k_scale, "causal": False, "key_start": None, "key_end": None}
    scores = dsa.index_scores_forward(q8, k8, weights, **options).double()
    exact = oracle.index_scores(q8, k8, weights.double(), **options)
    both = (scores.square() + exact.square()).sum()
    assert 1 - 2 * (scores * exact).sum() / both < 5e-6  # DeepGEMM's measure and bar


@pytest.mark.parametrize(("q_len", "k_len", "heads"), [(21, 60, 5), (40, 33, 16), (9, 100, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_autograd_of_the_oracle(device, q_len, k_len, heads, causal):
    q, k, weights = indexer(device, q_len, k_len, heads)
    none = {"key_start": None, "key_end": None}
    for bounds in (none, ranges(device, q_len, k_len)):
        dscores = torch.randn(2, q_len, k_len, device=device)
        ours = dsa.index_scores_backward(dscores, q, k, weights, causal=causal, **bounds)
        wide = [t.double().requires_grad_() for t in (q, k, weights)]
        scores = oracle.index_scores(*wide, causal=causal, **bounds)
        loss = (scores.masked_fill(scores == -torch.inf, 0) * dscores).sum()
        for name, ours_, exact, like in zip(
            ("dq", "dk", "dweights"), ours, torch.autograd.grad(loss, wide), (q, k, k), strict=True
        ):
            low = exact.to(like.dtype)
            assert_within_budget(ours_, exact, low, name=name)


def whole_numbers(device, q_len, k_len, dtype, heads=3, dim=32, batch=2):
    """Inputs whose scores are exact in any order of summation, with many ties among them."""
    q = torch.randint(-3, 4, (batch, q_len, heads, dim)).to(dtype)
    k = torch.randint(-3, 4, (batch, k_len, dim)).to(dtype)
    k_scale = 2.0 ** torch.randint(-2, 3, (batch, k_len))
    weights = torch.randint(-2, 3, (batch, q_len, heads)).float()
    return tuple(t.to(device) for t in (q, k, k_scale, weights))


def select(q, k, k_scale, weights, top_k, *, causal=True, key_start=None, key_end=None):
    indices = dsa.index_topk_forward(
        q, k, k_scale, weights, top_k, causal=causal, key_start=key_start, key_end=key_end,
        deterministic=True,
    )  # fmt: skip
    assert indices.dtype == torch.int32
    return indices.unsqueeze(2)


SHAPES = [(3, 181, 16), (6, 30, 1), (9, 9, 8), (9, 9, 10), (1, 150, 8), (9, 5, 3)]


def narrow_tiles(block=16, sample=16):
    """Several blocks and parts a row, few entries that fit, and samples that often mislead."""
    return lambda top_k: TopkTiles(
        block, block, max(32, 1 << (2 * top_k).bit_length()), sample, 4, 64, 4
    )


TILES = {"shipped": topk_tiles, "narrow": narrow_tiles(), "row by row": lambda _: None}


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("budget", ["512", "0.004"])  # all rows at once; a few at a time
@pytest.mark.parametrize(("q_len", "k_len", "top_k"), SHAPES)
def test_topk_equals_oracle_with_ties(device, monkeypatch, q_len, k_len, top_k, budget, tiles):
    monkeypatch.setenv("LONGCTX_INDEX_BUDGET_MIB", budget)
    monkeypatch.setattr(index_topk, "topk_tiles", TILES[tiles])
    q, k, k_scale, weights = whole_numbers(device, q_len, k_len, torch.float16)
    for causal, bounds in ((True, {}), (False, ranges(device, q_len, k_len))):
        chosen = select(q, k, k_scale, weights, top_k, causal=causal, **bounds)
        exact = oracle.index_topk(q, k, k_scale, weights.double(), top_k, causal=causal, **bounds)
        assert torch.equal(chosen, exact)


@pytest.mark.parametrize("top_k", [16, 40])
def test_topk_of_fp8_equals_oracle(device, monkeypatch, top_k):
    monkeypatch.setattr(index_topk, "topk_tiles", narrow_tiles())
    q, k, k_scale, weights = whole_numbers(device, 5, 150, torch.float32)
    q, k = q.to(FP8), k.to(FP8)
    chosen = select(q, k, k_scale, weights, top_k)
    assert torch.equal(chosen, oracle.index_topk(q, k, k_scale, weights.double(), top_k))


PROFILES = {
    "random": lambda n: torch.randn(n),
    "all equal": lambda n: torch.full((n,), 0.75),
    "all zero": lambda n: torch.zeros(n),
    "quarter of a binade": lambda n: 1 + torch.randint(0, 2**21, (n,)) * 2.0**-23,
    "few values": lambda n: 1 + torch.randint(0, 5, (n,)) * 2.0**-23,
    "negative": lambda n: -1 - torch.randint(0, 50, (n,)) * 2.0**-23,
    "denormal": lambda n: torch.randint(-60, 60, (n,)) * 2.0**-149,
    "beyond fp16": lambda n: torch.randn(n) * 1e30,
    "infinite": lambda n: torch.where(
        torch.rand(n) < 0.3, torch.randn(n).sign() * math.inf, torch.randn(n)
    ),
    "mostly -inf": lambda n: torch.where(torch.rand(n) < 0.95, -math.inf, torch.randn(n)),
    "some NaN": lambda n: torch.where(torch.rand(n) < 0.3, math.nan, torch.randn(n)),
}


@pytest.mark.parametrize("tiles", [narrow_tiles(), narrow_tiles(32, 32)])
@pytest.mark.parametrize("multiprocessors", [1, 8])  # rows in turn; parts of a row at once
@pytest.mark.parametrize("profile", PROFILES)
def test_topk_of_difficult_scores(device, monkeypatch, profile, multiprocessors, tiles):
    monkeypatch.setattr(index_topk, "topk_tiles", tiles)
    device_of = index_topk.device_of
    monkeypatch.setattr(
        index_topk, "device_of", lambda d: device_of(d)._replace(processors=multiprocessors)
    )
    values = PROFILES[profile](151).float().to(device)
    # key s scores exactly values[s]: a positive or a negative unit, times its scale
    q = torch.eye(2, 32, device=device).half().expand(1, 5, 2, 32)
    k = torch.zeros(1, 151, 32, device=device).half()
    k[0, :, 0], k[0, :, 1] = values > 0, values < 0
    weights = torch.tensor([1.0, -1.0], device=device).expand(1, 5, 2)
    chosen = select(q, k, values.abs().unsqueeze(0), weights, 11)
    exact = oracle.index_topk(q, k, values.abs().unsqueeze(0), weights, 11)
    assert torch.equal(chosen, exact)


def lists(device, q_len, units, sets, width):
    """Unique entries in any order, holes (-1) anywhere; one row names nothing."""
    order = torch.rand(2, q_len, sets, max(units, width)).argsort(-1)[..., :width].int()
    order[order >= units] = -1
    order[torch.rand(order.shape) < 0.15] = -1
    order[0, 0] = -1
    return order.to(device)


def attend(q, k, v, plan, *, scale, sinks=None):
    return dsa.topk_attention_forward(
        q, k, v, plan.indices, page_size=plan.page_size, scale=scale, sinks=sinks
    )


def attention_agrees(q, k, v, plan, *, scale, sinks=None):
    out, lse = attend(q, k, v, plan, scale=scale, sinks=sinks)
    wide = (t.double() for t in (q, k, v))
    exact = oracle.topk_attention(*wide, plan, scale=scale, sinks=sinks)
    low = oracle.topk_attention(q, k, v, plan, scale=scale, sinks=sinks)
    assert_within_budget(out, exact[0], low[0], name="out")
    assert_within_budget(lse, exact[1], exact[1].float(), name="lse")


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    ("q_len", "k_len", "heads", "axis", "page", "width"),
    [
        (7, 90, (4, 2), "kv", 1, 70),
        (5, 90, (6, 2), "shared", 1, 33),
        (9, 70, (4, 4), "kv", 16, 3),
        (1, 300, (4, 1), "shared", 1, 250),  # decode: cut over the list
        (2, 100, (4, 2), "kv", 7, 9),
        (3, 2, (4, 2), "shared", 1, 5),
        (130, 130, (40, 1), "shared", 1, 20),
    ],
)
def test_attention_equals_oracle(device, q_len, k_len, heads, axis, page, width, with_sinks):
    q = torch.randn(2, heads[0], q_len, 64, device=device).half().transpose(1, 2)
    k, v = (
        torch.randn(2, heads[1], k_len, 64, device=device).half().transpose(1, 2) for _ in "kv"
    )
    indices = lists(device, q_len, -(-k_len // page), heads[1] if axis == "kv" else 1, width)
    sinks = torch.randn(heads[0], device=device) if with_sinks else None
    attention_agrees(q, k, v, TopKPlan(indices, axis, page), scale=0.125, sinks=sinks)


@pytest.mark.parametrize(
    ("dim", "value_dim", "view"),
    [(576, 512, True), (576, 512, False), (128, 128, True), (96, 64, True)],
)
@pytest.mark.parametrize(("q_len", "heads"), [(2, 5), (1, 70)])
def test_latent_attention_equals_oracle(device, dim, value_dim, view, q_len, heads):
    q = torch.randn(2, q_len, heads, dim, device=device).half()
    k = torch.randn(2, 80, 1, dim, device=device).half()
    v = k[..., :value_dim] if view else k[..., :value_dim].contiguous()
    plan = TopKPlan(lists(device, q_len, 80, 1, 50))
    attention_agrees(q, k, v, plan, scale=192**-0.5)


def test_keys_that_nobody_chose_may_hold_anything(device):
    q = torch.randn(2, 3, 4, 64, device=device).half()
    k, v = (torch.randn(2, 60, 2, 64, device=device).half() for _ in "kv")
    plan = TopKPlan(lists(device, 3, 30, 1, 12))
    clean = attend(q, k, v, plan, scale=0.1)
    k[:, 30:], v[:, 30:] = torch.nan, torch.nan
    again = attend(q, k, v, plan, scale=0.1)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_empty_lists_give_zero_and_the_sink(device):
    q = torch.randn(1, 2, 4, 64, device=device).half()
    k = torch.randn(1, 9, 2, 64, device=device).half()
    sinks = torch.tensor([0.5, -1.0, 0.0, 3.0], device=device)
    for width in (0, 6):
        plan = TopKPlan(torch.full((1, 2, 1, width), -1, dtype=torch.int32, device=device))
        out, lse = attend(q, k, k, plan, scale=0.1)
        assert not out.any()
        assert lse.isneginf().all()
        out, lse = attend(q, k, k, plan, scale=0.1, sinks=sinks)
        assert not out.any()
        torch.testing.assert_close(lse, sinks.view(1, 4, 1).expand(1, 4, 2))
