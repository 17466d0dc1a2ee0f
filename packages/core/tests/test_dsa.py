"""quantize_fp8, index_scores and topk_attention against the fp64 oracle, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longctx
from longctx import TopKPlan, UnsupportedError
from longctx.reference import dsa as oracle
from longctx.reference.flash import flash_attention as dense
from longctx.testing.budget import assert_within_budget

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(17)


@pytest.mark.parametrize(
    ("amax", "fp32_scale", "ue8m0_scale"),
    [
        (448.0, 1.0, 1.0),
        (449.0, 449 / 448, 2.0),
        (896.0, 2.0, 2.0),
        (math.nextafter(896.0, 897.0), 2.0, 2.0),  # fp32 rounds the amax itself back
        (896.0001, 896.0001 / 448, 4.0),
        (1.75, 2.0**-8, 2.0**-8),
        (0.0, 1e-4 / 448, 2.0**-22),
        (1e-5, 1e-4 / 448, 2.0**-22),
        (-3.5, 2.0**-7, 2.0**-7),
    ],
)
def test_scales_by_hand(amax, fp32_scale, ue8m0_scale):
    row = torch.tensor([[0.0, amax, amax / 3]])
    assert longctx.quantize_fp8(row).scale.item() == pytest.approx(fp32_scale, rel=1e-7)
    assert longctx.quantize_fp8(row, scale_format="ue8m0").scale.item() == ue8m0_scale


def test_values_by_hand_round_to_even_and_keep_subnormals():
    exact = {
        17.0: 16.0, 19.0: 20.0, 18.0: 18.0, 17.01: 18.0, -17.0: -16.0, 240.0: 240.0, 430.0: 416.0,
        2.0**-9: 2.0**-9, 2.0**-10: 0.0, 1.5 * 2.0**-9: 2.0**-8, 448.0: 448.0, -448.0: -448.0,
    }  # fmt: skip
    values, scale = longctx.quantize_fp8(torch.tensor([list(exact)]))
    assert scale.item() == 1.0
    assert values.dtype == FP8
    assert values.float()[0].tolist() == list(exact.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    st.sampled_from(["fp32", "ue8m0"]),
)
def test_quantiser_properties(row, scale_format):
    x = torch.tensor([row])
    values, scale = longctx.quantize_fp8(x, scale_format=scale_format)
    wide, s = values.double(), scale.double().unsqueeze(-1)
    assert wide.abs().max() <= 448
    # half a unit in the last place of a 4-bit significand, or half the least subnormal
    bound = torch.maximum(x.double().abs() * 2.0**-4, s * 2.0**-10) * (1 + 1e-6)
    assert ((wide * s - x.double()).abs() <= bound).all()
    mirrored, same_scale = longctx.quantize_fp8(-x, scale_format=scale_format)
    assert torch.equal(mirrored.float(), -values.float())
    assert torch.equal(same_scale, scale)
    if scale_format == "ue8m0":
        plain = longctx.quantize_fp8(x).scale
        assert math.frexp(scale.item())[0] == 0.5
        assert plain <= scale < 2 * plain


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantiser_equals_oracle_bit_for_bit(dtype, scale_format):
    x = (torch.randn(2, 5, 3, 128) * torch.randn(2, 5, 3, 1).exp() * 10).to(dtype)
    x[0, 0] = 0
    values, scale = longctx.quantize_fp8(x.transpose(1, 2), scale_format=scale_format)
    expected, expected_scale = oracle.quantize_fp8(x.transpose(1, 2), scale_format=scale_format)
    assert values.shape == (2, 3, 5, 128)
    assert scale.shape == (2, 3, 5)
    assert scale.dtype == torch.float32
    assert torch.equal(values.view(torch.uint8), expected.contiguous().view(torch.uint8))
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_rows_that_are_not_finite_show_it_and_harm_no_other_row(bad):
    x = torch.ones(2, 4)
    x[0, 1] = bad
    for scale_format in ("fp32", "ue8m0"):
        values, scale = longctx.quantize_fp8(x, scale_format=scale_format)
        assert not scale[0].isfinite()
        assert values[0, 1].float().isnan()
        assert values[1].float().isfinite().all()


def indexer(q_len, k_len, heads=3, dim=16, batch=2, dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = torch.randn(batch, q_len, heads, dim).to(dtype)
    k = torch.randn(batch, k_len, dim).to(dtype)
    return q, k, torch.randn(batch, q_len, heads, dtype=wide)  # weights of both signs


def ranges(batch, q_len, k_len):
    low = torch.randint(0, k_len // 2, (batch, q_len), dtype=torch.int32)
    high = torch.randint(k_len // 2, k_len + 1, (batch, q_len), dtype=torch.int32)
    high[0, 0] = low[0, 0]  # a query that sees nothing
    return {"key_start": low, "key_end": high}


@pytest.mark.parametrize("budget", ["256", "0.001"])
@pytest.mark.parametrize(("q_len", "k_len"), [(7, 19), (19, 7), (1, 33), (13, 13)])
@pytest.mark.parametrize("causal", [True, False])
def test_scores_equal_oracle(monkeypatch, q_len, k_len, causal, budget):
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", budget)
    q, k, weights = indexer(q_len, k_len)
    for bounds in ({}, ranges(2, q_len, k_len)):
        scores = longctx.index_scores(q, k, weights, causal=causal, **bounds)
        exact = oracle.index_scores(q, k, weights.double(), causal=causal, **bounds)
        assert scores.dtype == torch.float32
        assert (scores[scores.isfinite()] < 0).any() or k_len < 10
        torch.testing.assert_close(scores, exact.float(), rtol=1e-5, atol=1e-5)


def test_one_bound_alone_means_an_open_range():
    q, k, weights = indexer(4, 9)
    low = torch.full((2, 4), 5, dtype=torch.int32)
    above = longctx.index_scores(q, k, weights, causal=False, key_start=low)
    below = longctx.index_scores(q, k, weights, causal=False, key_end=low)
    assert above.isneginf().sum(-1).unique().tolist() == [5]
    assert below.isneginf().sum(-1).unique().tolist() == [4]
    whole = longctx.index_scores(q, k, weights, causal=False)
    assert torch.equal(torch.maximum(above, below), whole)


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_fp8_scores_equal_the_dequantised_ones(scale_format):
    q, k, weights = indexer(6, 40, heads=4, dim=128)
    q8, q_scale = longctx.quantize_fp8(q * 7, scale_format=scale_format)
    k8, k_scale = longctx.quantize_fp8(k, scale_format=scale_format)
    scores = longctx.index_scores(q8, k8, weights * q_scale, k_scale=k_scale)
    q_back, k_back = q8.double() * q_scale.unsqueeze(-1), k8.double() * k_scale.unsqueeze(-1)
    exact = oracle.index_scores(q_back, k_back, weights.double())
    seen = exact.isfinite()
    assert torch.equal(scores.isneginf(), ~seen)
    x, y = scores[seen].double(), exact[seen]
    assert 1 - 2 * (x @ y) / (x @ x + y @ y) < 5e-6
    unquantised = oracle.index_scores(q * 7, k, weights)
    assert (scores - unquantised)[seen].abs().max() > 1e-3  # quantisation did happen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_widened_exactly(dtype):
    q, k, weights = indexer(5, 30, dtype=dtype)
    scores = longctx.index_scores(q, k, weights)
    torch.testing.assert_close(
        scores, oracle.index_scores(q.float(), k.float(), weights), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("bounded", [False, True])
def test_gradcheck(bounded):
    q, k, weights = (
        t.requires_grad_() for t in indexer(4, 7, heads=2, dim=3, batch=1, dtype=torch.float64)
    )
    bounds = ranges(1, 4, 7) if bounded else {}

    def finite(*inputs):
        scores = longctx.index_scores(*inputs, **bounds)
        return scores.masked_fill(scores.isneginf(), 0)

    assert torch.autograd.gradcheck(finite, (q, k, weights))


def test_gradients_equal_those_of_the_oracle_in_chunks(monkeypatch):
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", "0.002")
    exact = [t.requires_grad_() for t in indexer(20, 31, dtype=torch.float64)]
    inputs = [t.detach().float().requires_grad_() for t in exact]
    upstream = torch.randn(2, 20, 31)
    oracle_scores = oracle.index_scores(*exact)
    keep = oracle_scores.isfinite()
    # a softmax loss sends zeros to hidden pairs; any other value there must not count either
    torch.autograd.backward(oracle_scores.masked_fill(~keep, 0), upstream.double())
    torch.autograd.backward(longctx.index_scores(*inputs), upstream)
    for mine, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_gradients_of_bf16_inputs_keep_their_dtypes():
    q, k, weights = (t.requires_grad_() for t in indexer(4, 9, dtype=torch.bfloat16))
    longctx.index_scores(q, k, weights).softmax(-1).square().sum().backward()
    assert (q.grad.dtype, k.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert weights.grad.dtype == torch.float32


def test_gradient_through_quantised_inputs_is_refused():
    q, k, weights = indexer(4, 9)
    k_scale = torch.ones(2, 9)
    q8, k8 = q.to(FP8), k.to(FP8)
    weights.requires_grad_()
    for inputs in ((q, k), (q8, k8)):
        with pytest.raises(UnsupportedError, match=r"no gradient through fp8 inputs or k_scale"):
            longctx.index_scores(*inputs, weights, k_scale=k_scale)
        with torch.no_grad():
            longctx.index_scores(*inputs, weights, k_scale=k_scale)


def chosen(batch, q_len, sets, top_k, units):
    """Random unique indices, about a third of them -1, one row empty."""
    order = torch.rand(batch, q_len, sets, units).argsort(-1)[..., :top_k]
    indices = torch.where(torch.rand(order.shape) < 0.33, -1, order)
    indices[0, 0] = -1
    return indices.to(torch.int32)


def attention_case(q_heads, kv_heads, q_len, k_len, dim=16, value_dim=16, dtype=torch.float32):
    q = torch.randn(2, q_len, q_heads, dim).to(dtype)
    k = torch.randn(2, k_len, kv_heads, dim).to(dtype)
    return q, k, torch.randn(2, k_len, kv_heads, value_dim).to(dtype)


@pytest.mark.parametrize("budget", ["256", "0.004"])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("head_axis", ["shared", "kv"])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim", "value_dim"), [(4, 4, 16, 16), (6, 2, 16, 8), (3, 1, 8, 8)]
)
def test_attention_equals_oracle(
    monkeypatch, q_heads, kv_heads, dim, value_dim, head_axis, page_size, budget
):
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", budget)
    q, k, v = attention_case(q_heads, kv_heads, 11, 26, dim, value_dim)
    sets = kv_heads if head_axis == "kv" else 1
    plan = TopKPlan(chosen(2, 11, sets, 5, -(-26 // page_size)), head_axis, page_size)
    for sinks in (None, torch.randn(q_heads)):
        out, lse = longctx.topk_attention_with_lse(q, k, v, plan, scale=0.3, sinks=sinks)
        exact, exact_lse = oracle.topk_attention(
            q.double(), k.double(), v.double(), plan, scale=0.3, sinks=sinks
        )
        torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-5)
        assert out[0, 0].eq(0).all()
        assert lse[0, :, 0].isneginf().all() if sinks is None else lse[0, :, 0].equal(sinks)
        assert torch.equal(longctx.topk_attention(q, k, v, plan, scale=0.3, sinks=sinks), out)


@pytest.mark.parametrize("k_len", [15, 16, 17, 40])
def test_all_keys_chosen_is_dense_attention(k_len):
    top_k = 17
    q, k, v = attention_case(4, 2, k_len, k_len)
    index_q, index_k, weights = indexer(k_len, k_len)
    plan = longctx.index_topk(index_q, index_k, None, weights, top_k)
    out, lse = longctx.topk_attention_with_lse(q, k, v, plan)
    whole, whole_lse = (t.float() for t in dense(q.double(), k.double(), v.double(), causal=True))
    same = torch.isclose(out, whole, rtol=1e-4, atol=1e-5).all(-1).all(-1).all(0)
    assert same[:top_k].all()
    # beyond k keys the choice is a true one: a selector that takes everything would pass above
    assert k_len <= top_k or not same[top_k:].any()
    torch.testing.assert_close(lse[..., :top_k], whole_lse[..., :top_k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mla_values_are_the_first_channels_of_the_keys(heads, dtype):
    q = torch.randn(1, 4, heads, 576).to(dtype)
    latent = torch.randn(1, 70, 1, 576).to(dtype)
    plan = TopKPlan(chosen(1, 4, 1, 32, 70))
    scale = 192**-0.5
    out, lse = longctx.topk_attention_with_lse(q, latent, latent[..., :512], plan, scale=scale)
    assert out.shape == (1, 4, heads, 512)
    exact, exact_lse = oracle.topk_attention(
        q.double(), latent.double(), latent[..., :512].double(), plan, scale=scale
    )
    low, low_lse = oracle.topk_attention(q, latent, latent[..., :512], plan, scale=scale)
    assert_within_budget(out, exact, low, name="out")
    assert_within_budget(lse, exact_lse, low_lse, name="lse")
    separate = longctx.topk_attention(q, latent, latent[..., :512].clone(), plan, scale=scale)
    torch.testing.assert_close(separate, out)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("mla", [False, True])
def test_what_nobody_chose_may_hold_nan(page_size, mla):
    q, k, v = attention_case(4, 2, 6, 24)
    v = k[..., :8] if mla else v
    plan = TopKPlan(chosen(2, 6, 1, 3, 24 // page_size), page_size=page_size)
    plan.indices[plan.indices == 0] = -1  # key 0, where a careless -1 would land, is unchosen
    clean = longctx.topk_attention(q, k, v, plan)
    used = plan.to_mask(6, 24).any(2).any(1)
    k = k.masked_fill(~used[..., None, None], math.nan)
    v = k[..., :8] if mla else v.masked_fill(~used[..., None, None], math.nan)
    assert k.isnan().any()
    assert torch.equal(longctx.topk_attention(q, k, v, plan), clean)


def test_strided_inputs_need_no_copy():
    q, k, v = attention_case(4, 2, 6, 24)
    plan = TopKPlan(chosen(2, 6, 1, 8, 24))
    expected = longctx.topk_attention(q, k, v, plan)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(longctx.topk_attention(*turned, plan), expected)


def test_values_that_begin_where_the_keys_do_need_not_be_their_channels():
    q, k, _ = attention_case(4, 2, 6, 24)
    plan = TopKPlan(chosen(2, 6, 1, 8, 24))
    v = k[:, :1].expand(k.shape)
    expected = longctx.topk_attention(q, k, v.clone(), plan)
    torch.testing.assert_close(longctx.topk_attention(q, k, v, plan), expected)


def test_attention_has_no_gradient_and_says_so():
    q, k, v = attention_case(4, 2, 6, 24)
    plan = TopKPlan(chosen(2, 6, 1, 8, 24))
    with pytest.raises(UnsupportedError, match="no backward pass"):
        longctx.topk_attention(q.requires_grad_(), k, v, plan)
