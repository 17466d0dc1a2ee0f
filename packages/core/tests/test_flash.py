"""Exact attention: against hand-computed numbers, the fp64 oracle, PyTorch's own, and itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import longctx
from longctx.reference import flash as oracle
from longctx.torch_backend import _flash_tiles, _sdpa
from longctx.torch_backend import flash as backend

FP8 = torch.float8_e4m3fn
INF = torch.inf
OUT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2.5e-3,
}
LSE_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-4,
    torch.float16: 2e-4,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(shape, dtype=torch.float32):
    """Return q, k, v of ``(batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim)``."""
    batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim = shape
    return (
        torch.randn(batch, q_len, q_heads, head_dim).to(dtype),
        torch.randn(batch, k_len, kv_heads, head_dim).to(dtype),
        torch.randn(batch, k_len, kv_heads, value_dim).to(dtype),
    )


def check(q, k, v, **options):
    """Run the op and hold it against the fp64 oracle; return its result."""
    out, lse = longctx.flash_attention_with_lse(q, k, v, **options)
    truth, truth_lse = oracle.flash_attention(q.double(), k.double(), v.double(), **options)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    atol = OUT_TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), truth, atol=atol, rtol=atol)
    atol = LSE_TOLERANCE[q.dtype]
    torch.testing.assert_close(lse.double(), truth_lse.double(), atol=atol, rtol=atol)
    return out, lse


# Two queries of 1, keys 0 and ln 3, values 4 and 8: exp of the scores is 1 and 3.
HAND = [
    ({}, [7.0, 7.0], [math.log(4), math.log(4)]),
    ({"causal": True}, [4.0, 7.0], [0.0, math.log(4)]),
    ({"window": (0, 0)}, [4.0, 8.0], [0.0, math.log(3)]),
    ({"window": (None, 0), "sinks": [4.0]}, [0.8, 3.5], [math.log(5), math.log(8)]),
    ({"scale": 2.0}, [7.6, 7.6], [math.log(10), math.log(10)]),
    # tanh(ln 3) = 0.8
    (
        {"softcap": 1.0},
        [(4 + 8 * math.exp(0.8)) / (1 + math.exp(0.8))] * 2,
        [math.log(1 + math.exp(0.8))] * 2,
    ),
]


@pytest.mark.parametrize(("options", "out", "lse"), HAND)
@pytest.mark.parametrize("implementation", ["op", "oracle"])
def test_hand_computed(options, out, lse, implementation):
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"]).log()
    q = torch.ones(1, 2, 1, 1)
    k = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    v = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1)
    run = longctx.flash_attention_with_lse if implementation == "op" else oracle.flash_attention
    got_out, got_lse = run(q, k, v, **options)
    torch.testing.assert_close(got_out.flatten(), torch.tensor(out))
    torch.testing.assert_close(got_lse.flatten(), torch.tensor(lse))


SHAPES = [
    (1, 1, 1, 1, 1, 8, 8),
    (2, 63, 65, 4, 1, 16, 16),
    (1, 129, 129, 8, 2, 32, 32),
    (3, 127, 255, 8, 8, 16, 16),
    (2, 65, 33, 6, 3, 8, 8),
    (1, 1, 300, 8, 1, 64, 64),
    (2, 5, 0, 2, 1, 8, 8),
    (1, 0, 5, 2, 2, 8, 8),
    (0, 3, 5, 2, 2, 8, 8),
]
FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (20, 3)},
    "window-self": {"window": (0, 0)},
    "window-left": {"window": (10, None)},
    "window-right": {"window": (None, 7)},
    "window-wide": {"window": (500, 500)},
    "causal-window": {"causal": True, "window": (33, 9)},
    "softcap": {"softcap": 3.0},
    "softcap-causal-window": {"softcap": 0.7, "causal": True, "window": (40, None)},
    "scale": {"scale": 1.3, "causal": True},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_matches_the_oracle(shape, features, sinks):
    q, k, v = inputs(shape)
    extra = {"sinks": torch.randn(shape[3]) * 2} if sinks else {}
    check(q, k, v, **FEATURES[features], **extra)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
def test_matches_the_oracle_in_every_dtype(dtype, features, shape):
    check(*inputs(shape, dtype), sinks=torch.randn(shape[3]), **FEATURES[features])


@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 8), (8, 24), (3, 5), (192, 128)])
@pytest.mark.parametrize("features", ["causal", "window", "softcap"])
def test_value_heads_of_another_size(head_dim, value_dim, features):
    check(*inputs((2, 33, 40, 4, 2, head_dim, value_dim)), **FEATURES[features])


@pytest.mark.parametrize("features", ["causal", "window", "softcap"])
def test_strided_views_give_the_same(features):
    q, k, v = inputs((2, 65, 65, 4, 2, 16, 16))
    plain = longctx.flash_attention(q, k, v, **FEATURES[features])
    # head-major memory, and one fused tensor of q, k and v
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    fused = torch.cat([q, k, v], 2).split([4, 2, 2], 2)
    padded = [F.pad(t, (0, 5))[..., :-5] for t in (q, k, v)]
    for q_view, k_view, v_view in (views, fused, padded):
        assert not q_view.is_contiguous()
        out = longctx.flash_attention(q_view, k_view, v_view, **FEATURES[features])
        torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_matches_torch_sdpa(dtype, causal, kv_heads):
    q, k, v = inputs((2, 127, 127, 8, kv_heads, 64, 64), dtype)
    theirs = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    ours = longctx.flash_attention(q, k, v, causal=causal)
    torch.testing.assert_close(ours, theirs, atol=OUT_TOLERANCE[dtype], rtol=1e-2)


def test_matches_the_eager_formula_of_transformers():
    """The ``eager_attention_forward`` of a Gemma-2 layer: repeated KV, softcap, additive mask."""
    q, k, v = inputs((2, 31, 31, 4, 2, 16, 16))
    softcap, window = 5.0, 8
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    key, value = (
        t[:, :, None].expand(2, 2, 2, 31, 16).reshape(2, 4, 31, 16) for t in (key, value)
    )
    scores = torch.matmul(query, key.transpose(2, 3)) * 16**-0.5
    scores = torch.tanh(scores / softcap) * softcap
    rows = torch.arange(31)
    distance = rows[:, None] - rows
    hidden = (distance < 0) | (distance >= window)
    scores = scores + torch.zeros(31, 31).masked_fill(hidden, torch.finfo(torch.float32).min)
    theirs = torch.matmul(F.softmax(scores, -1), value).transpose(1, 2)
    # transformers counts the query itself in its window
    ours = longctx.flash_attention(q, k, v, causal=True, window=(window - 1, 0), softcap=softcap)
    torch.testing.assert_close(ours, theirs)


def test_sinks_match_gpt_oss():
    """A learned logit as one more column of the scores, dropped after the softmax."""
    q, k, v = inputs((1, 20, 20, 4, 4, 16, 16))
    sinks = torch.randn(4)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.25
    scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -INF)
    column = sinks.view(1, 4, 1, 1).expand(1, 4, 20, 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    theirs = torch.einsum("bhij,bjhd->bihd", weights, v)
    torch.testing.assert_close(longctx.flash_attention(q, k, v, causal=True, sinks=sinks), theirs)


LENGTHS = [
    ([3, 5, 1], [3, 5, 1]),
    ([7, 0, 65, 9], [9, 4, 65, 2]),
    ([4, 4, 4, 6], [9, 9, 9, 0]),
    ([0, 0], [3, 0]),
]


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize(("q_lens", "k_lens"), LENGTHS)
@pytest.mark.parametrize("features", FEATURES)
def test_packed_sequences(q_lens, k_lens, features):
    options = FEATURES[features] | {"sinks": torch.randn(4)}
    q, k, v = inputs((1, sum(q_lens), sum(k_lens), 4, 2, 16, 16))
    ends_q, ends_k = cumulative(q_lens), cumulative(k_lens)
    out, lse = check(q, k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, **options)
    for i in range(len(q_lens)):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        alone = longctx.flash_attention_with_lse(q[:, rows], k[:, keys], v[:, keys], **options)
        torch.testing.assert_close(out[:, rows], alone.out, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse[:, :, rows], alone.lse, atol=1e-5, rtol=1e-5)


def test_packed_keys_default_to_the_queries():
    q, k, v = inputs((1, 9, 9, 2, 2, 8, 8))
    ends = cumulative([4, 5])
    both = longctx.flash_attention(q, k, v, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)
    one = longctx.flash_attention(q, k, v, causal=True, cu_seqlens_q=ends)
    torch.testing.assert_close(one, both)


@pytest.mark.parametrize("features", ["causal", "window", "softcap"])
def test_rows_that_see_nothing_are_zero(features):
    q, k, v = inputs((2, 20, 6, 4, 2, 8, 8))
    out, lse = check(q, k, v, **({"causal": True} | FEATURES[features] | {"window": (4, 0)}))
    assert (out[:, :14] == 0).all()
    assert (lse[:, :, :14] == -INF).all()
    assert lse[:, :, 14:].isfinite().all()


def test_chunked_prefill_equals_the_whole():
    q, k, v = inputs((1, 100, 100, 4, 2, 16, 16))
    whole = longctx.flash_attention(q, k, v, causal=True, window=(30, 0))
    chunks = [
        longctx.flash_attention(q[:, a:b], k[:, :b], v[:, :b], causal=True, window=(30, 0))
        for a, b in ((0, 37), (37, 38), (38, 100))
    ]
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=2e-6, rtol=1e-5)


def test_long_windows_span_many_blocks():
    q, k, v = inputs((1, 700, 1500, 2, 1, 8, 8))
    check(q, k, v, causal=True, window=(150, None))
    check(q, k, v, window=(64, 100))


@pytest.mark.parametrize("with_descales", [False, True])
def test_fp8(with_descales):
    batch, kv_heads = 2, 2
    q, k, v = (t.to(FP8) for t in inputs((batch, 40, 50, 4, kv_heads, 32, 16)))
    factors = {
        f"{name}_descale": torch.rand(batch, kv_heads) * 2 + 0.1 if with_descales else None
        for name in "qkv"
    }
    out, lse = longctx.flash_attention_with_lse(q, k, v, causal=True, **factors)
    wide = []
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        factor = factors[f"{name}_descale"]
        spread = 1.0
        if factor is not None:
            spread = factor.repeat_interleave(tensor.shape[2] // kv_heads, 1)[:, None, :, None]
        wide.append(tensor.double() * spread)
    truth, truth_lse = oracle.flash_attention(*wide, causal=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), truth, atol=1e-2, rtol=2**-8)
    torch.testing.assert_close(lse.double(), truth_lse, atol=1e-5, rtol=1e-5)


def test_fp8_widening_is_exact():
    from longctx.torch_backend._fp8 import widen

    every = torch.arange(256, dtype=torch.uint8).view(FP8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        torch.testing.assert_close(
            widen(every, dtype), every.to(dtype), atol=0, rtol=0, equal_nan=True
        )
    assert widen(every[:0], torch.float32).shape == (0,)


@pytest.mark.parametrize("features", FEATURES)
def test_without_fused_kernels(features, monkeypatch):
    """What runs on a device that PyTorch has no kernel for."""
    monkeypatch.setattr(backend, "fused", lambda q, masked=False: False)
    check(*inputs((2, 127, 255, 8, 2, 16, 24)), **FEATURES[features])


@pytest.mark.parametrize("batch", [1, 3])
def test_without_shared_heads_in_the_kernel(batch, monkeypatch):
    """What runs on older versions of PyTorch: groups share a KV head by a stride of 0."""
    monkeypatch.setattr(_sdpa, "_CPU_SHARES_HEADS", False)
    for features in ("causal", "full", "window"):
        check(*inputs((batch, 33, 65, 8, 2, 16, 24)), **FEATURES[features])


def test_tiles_of_every_cut(monkeypatch):
    """A budget so small that heads, rows and keys are all cut."""
    monkeypatch.setattr(_flash_tiles, "BUDGET", 16 * 300)
    check(*inputs((2, 37, 61, 4, 2, 8, 8)), softcap=2.0, causal=True, sinks=torch.randn(4))


def test_same_inputs_same_bits():
    q, k, v = inputs((2, 65, 129, 8, 2, 32, 32), torch.bfloat16)
    for options in FEATURES.values():
        first, second = (longctx.flash_attention(q, k, v, **options) for _ in range(2))
        assert torch.equal(first, second)
