"""The DSA ops trace, pass opcheck, and refuse bad input in one clear sentence."""

from __future__ import annotations

import math

import pytest
import torch

import longctx
from longctx import TokenSetPlan, TopKPlan, UnsupportedError
from longctx.ops import _dsa_library as library

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(29)


def index_inputs(dtype=torch.float32):
    q, k = torch.randn(1, 6, 3, 16).to(dtype), torch.randn(1, 9, 16).to(dtype)
    return q, k, torch.rand(1, 9), torch.randn(1, 6, 3)


def attention_inputs():
    q, k, v = torch.randn(1, 6, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 8)
    return q, k, v, TopKPlan(torch.randint(0, 9, (1, 6, 2, 1), dtype=torch.int32), "kv")


def bounds():
    low = torch.tensor([[0, 1, 2, 0, 1, 2]], dtype=torch.int32)
    return low, low + 5


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_quantize_traces():
    x = torch.randn(3, 5, 16)
    values, scale = compiled(lambda x: longctx.quantize_fp8(x, scale_format="ue8m0"))(x)
    expected = longctx.quantize_fp8(x, scale_format="ue8m0")
    assert torch.equal(values.float(), expected.values.float())
    assert torch.equal(scale, expected.scale)


def test_index_scores_trace_with_gradients():
    q, k, _, weights = index_inputs()
    low, _ = bounds()
    inputs = [t.requires_grad_() for t in (q, k, weights)]

    def loss(q, k, weights):
        return longctx.index_scores(q, k, weights, key_start=low).exp().square().sum()

    traced = torch.autograd.grad(compiled(loss)(*inputs), inputs)
    for mine, eager in zip(traced, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(mine, eager)


def test_topk_and_attention_trace_as_one_graph():
    q8, k8, k_scale, weights = index_inputs(FP8)
    q, k, v, _ = attention_inputs()

    def layer(q8, k8, k_scale, weights, q, k, v):
        plan = longctx.index_topk(q8, k8, k_scale, weights, 4)
        return longctx.topk_attention(q, k, v, plan), plan

    out, plan = compiled(layer)(q8, k8, k_scale, weights, q, k, v)
    expected, expected_plan = layer(q8, k8, k_scale, weights, q, k, v)
    assert isinstance(plan, TopKPlan)
    assert torch.equal(plan.indices, expected_plan.indices)
    torch.testing.assert_close(out, expected)


def test_sizes_may_change_between_calls_of_a_compiled_function():
    run = torch.compile(
        lambda q, k, w: longctx.index_topk(q, k, None, w, 4).indices,
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for q_len in (5, 7, 12):
        q, k, w = (
            torch.randn(1, q_len, 3, 16),
            torch.randn(1, 2 * q_len, 16),
            torch.randn(1, q_len, 3),
        )
        assert torch.equal(run(q, k, w), longctx.index_topk(q, k, None, w, 4).indices)


def test_opcheck():
    q, k, k_scale, weights = index_inputs()
    low, high = bounds()
    check = torch.library.opcheck
    check(library.score_op, (q, k, weights, k_scale, low, high, True, "torch"))
    gradients = [t.clone().requires_grad_() for t in (q, k, weights)]
    check(library.score_op, (*gradients, None, None, None, True, "torch"))
    check(
        library._score_backward_op, (torch.randn(1, 6, 9), q, k, weights, low, high, True, "torch")
    )
    check(library.select_op, (q, k, k_scale, weights, low, high, 4, True, True, "torch"))
    check(library.select_op, (q, k, None, weights, None, None, 12, False, True, "torch"))
    q, k, v, plan = attention_inputs()
    check(library.attend_op, (q, k, v, plan.indices, torch.randn(4), 1, 0.5, "torch"))
    check(library.attend_op, (q, k, v, plan.indices // 3, None, 3, 0.5, "torch"))
    check(library.quantize_op, (torch.randn(3, 16), "fp32", "torch"))


def test_a_bound_backend_is_taken_as_it_is():
    q, k, k_scale, weights = index_inputs()
    select = longctx.bind(
        "index_topk", device="cpu", dtype=torch.float32, head_dim=16, q_heads=3, kv_heads=1
    )
    expected = longctx.index_topk(q, k, k_scale, weights, 3)
    assert torch.equal(select(q, k, k_scale, weights, 3).indices, expected.indices)
    assert "torch" in str(longctx.explain("topk_attention", device="cpu", dtype=torch.float32))


@pytest.mark.parametrize("given", ["key_start", "key_end"])
def test_a_backend_gets_both_bounds_or_none(monkeypatch, given):
    seen = []

    def record(*args, key_start, key_end, **options):
        seen.append((key_start, key_end))
        return torch.zeros(1, 6, 3, dtype=torch.int32)

    monkeypatch.setattr(library, "primitive", lambda *_: record)
    for bounds in ({given: int32(*[4] * 6)}, {}):
        scores(**bounds)
        topk(**bounds)
    expected = ([4] * 6, [9] * 6) if given == "key_start" else ([0] * 6, [4] * 6)
    found = [low if low is None else (low[0].tolist(), high[0].tolist()) for low, high in seen]
    assert found == [expected, expected, None, None]


def scores(**change):
    q, k, _, weights = index_inputs()
    given = {"q": q, "k": k, "weights": weights, "k_scale": None} | change
    return longctx.index_scores(**given)


def topk(k=3, **change):
    q, keys, k_scale, weights = index_inputs()
    given = {"q8": q, "k8": keys, "k_scale": k_scale, "weights": weights} | change
    return longctx.index_topk(given.pop("q8"), given.pop("k8"), given.pop("k_scale"),
                              given.pop("weights"), k, **given)  # fmt: skip


def attend(**change):
    q, k, v, plan = attention_inputs()
    given = {"q": q, "k": k, "v": v, "plan": plan} | change
    return longctx.topk_attention(**given)


def plan_of(value, rows=6, sets=1, batch=1, **options):
    return TopKPlan(torch.full((batch, rows, sets, 1), value, dtype=torch.int32), **options)


def int32(*values):
    return torch.tensor([values], dtype=torch.int32)


R = torch.randn
REFUSALS = [
    (lambda: longctx.quantize_fp8([1.0]), TypeError, r"x must be a Tensor \(\.\.\., channels\)"),
    (lambda: longctx.quantize_fp8(torch.tensor(1.0)), ValueError, "at least one channel"),
    (lambda: longctx.quantize_fp8(R(2, 0)), ValueError, "at least one channel"),
    (lambda: longctx.quantize_fp8(R(4, 4).t()), ValueError, "unit stride"),
    (lambda: longctx.quantize_fp8(R(4).double()), TypeError, "x must be float32 or bfloat16"),
    (lambda: longctx.quantize_fp8(R(4).to(FP8)), TypeError, "got float8_e4m3fn"),
    (
        lambda: longctx.quantize_fp8(R(4), scale_format="ue8m1"),
        ValueError,
        "no fp8 scale format is called 'ue8m1': did you mean 'ue8m0'",
    ),
    (lambda: longctx.quantize_fp8(R(4, requires_grad=True)), UnsupportedError, "no backward pass"),
    (lambda: longctx.quantize_fp8(R(4, device="meta")), UnsupportedError, "meta"),
    (lambda: scores(q=R(6, 3, 16)), ValueError, r"q must be \(batch, q_len, index_heads"),
    (lambda: scores(k=R(1, 9, 1, 16)), ValueError, r"k must be \(batch, k_len, index_dim\)"),
    (lambda: scores(weights=R(1, 6, 4)), ValueError, "must agree in .batch, q_len, index_heads"),
    (lambda: scores(weights=R(1, 6, 3).half()), TypeError, "weights must be float32"),
    (lambda: scores(k=R(1, 9, 8)), ValueError, "must agree in index_dim, got 16 and 8"),
    (lambda: scores(k=R(2, 9, 16)), ValueError, "must agree in batch"),
    (lambda: scores(k=R(1, 9, 16).bfloat16()), TypeError, "must share a dtype"),
    (lambda: scores(k=R(1, 9, 16, device="meta")), ValueError, "must be on one device"),
    (lambda: scores(k_scale=R(1, 8)), ValueError, r"must agree in \(batch, k_len\)"),
    (lambda: scores(k_scale=R(1, 9).double()), TypeError, "k_scale must be float32"),
    (lambda: scores(q=torch.ones(1, 6, 3, 16).int()), TypeError, "q must be float32"),
    (
        lambda: scores(q=R(1, 6, 3, 16).to(FP8), k=R(1, 9, 16).to(FP8)),
        ValueError,
        "fp8 k needs its scales",
    ),
    (
        lambda: scores(key_start=int32(0, 1, 2, 3, 4, 5), key_end=int32(9, 9, 9, 2, 9, 9)),
        ValueError,
        "key_start must not exceed key_end, got 3 > 2 at batch 0, query 3",
    ),
    (lambda: scores(key_end=int32(9, 9, 9, 10, 9, 9)), ValueError, "between 0 and k_len = 9"),
    (lambda: scores(key_start=int32(0, 0, -1, 0, 0, 0)), ValueError, "got values from -1 to 0"),
    (lambda: scores(key_start=int32(0, 0)), ValueError, r"must agree in \(batch, q_len\)"),
    (lambda: scores(key_start=int32(*[0] * 6).long()), TypeError, "key_start must be int32"),
    (lambda: topk(k=0), ValueError, "k must be at least 1, got 0"),
    (lambda: topk(q8=R(1, 6, 3, 16).double()), TypeError, "q8 must be float32 or bfloat16"),
    (lambda: topk(k8=R(1, 9, 8)), ValueError, "q8 and k8 must agree in index_dim"),
    (
        lambda: topk(q8=R(1, 6, 3, 16).to(FP8), k8=R(1, 9, 16).to(FP8), k_scale=None),
        ValueError,
        "fp8 k8 needs its scales",
    ),
    (lambda: topk(backend="tritn"), LookupError, "no backend is called 'tritn'"),
    (lambda: attend(q=R(6, 4, 16)), ValueError, r"q must be \(batch, q_len, q_heads, head_dim\)"),
    (lambda: attend(q=R(1, 6, 3, 16)), ValueError, "q_heads must be a multiple of kv_heads"),
    (lambda: attend(q=R(1, 6, 4, 8)), ValueError, "must agree in head_dim"),
    (lambda: attend(v=R(1, 8, 2, 8)), ValueError, "must agree in k_len"),
    (lambda: attend(v=R(1, 9, 2, 8).half()), TypeError, "must share a dtype"),
    (lambda: attend(scale=math.nan), ValueError, "scale must be finite, got nan"),
    (lambda: attend(sinks=R(3)), ValueError, "must agree in q_heads"),
    (lambda: attend(sinks=R(4).half()), TypeError, "sinks must be float32"),
    (lambda: attend(plan=torch.zeros(1)), TypeError, "plan must be a TopKPlan, got Tensor"),
    (
        lambda: attend(plan=TokenSetPlan(int32(0).unsqueeze(0), int32(1), "shared")),
        TypeError,
        "plan must be a TopKPlan, got TokenSetPlan",
    ),
    (lambda: attend(plan=plan_of(0, rows=5)), ValueError, "rows for 5 queries, q has 6"),
    (lambda: attend(plan=plan_of(0, batch=2)), ValueError, "made for batch 2"),
    (lambda: attend(plan=plan_of(0, sets=2)), ValueError, "has 2 head sets"),
    (lambda: attend(plan=plan_of(0, sets=4, head_axis="query")), ValueError, "lower it"),
    (lambda: attend(plan=plan_of(9)), ValueError, "between -1 and 8 for k_len 9, got values"),
    (lambda: attend(plan=plan_of(-2)), ValueError, "from -2 to -2"),
    (
        lambda: attend(plan=plan_of(3, page_size=4)),
        ValueError,
        "between -1 and 2 for k_len 9 in pages of 4",
    ),
]


@pytest.mark.parametrize(("case", "error", "words"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_bad_input_is_refused_in_one_sentence(case, error, words):
    with pytest.raises(error, match=words) as caught:
        case()
    assert error is UnsupportedError or "\n" not in str(caught.value)
