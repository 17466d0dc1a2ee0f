"""The public functions of flash around the backends: tracing, registration and refusals."""

from __future__ import annotations

import math

import pytest
import torch

import longctx
from longctx.ops import flash as ops_flash

FP8 = torch.float8_e4m3fn
INF = torch.inf


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


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def test_calls_without_gradient_skip_the_registered_op(monkeypatch):
    def refuse(*args):
        raise AssertionError("went through torch.library")

    monkeypatch.setattr(ops_flash, "_forward_op", refuse)
    q, k, v = inputs((1, 4, 4, 2, 2, 8, 8))
    longctx.flash_attention(q, k, v)
    with torch.no_grad():
        longctx.flash_attention(q.requires_grad_(), k, v)
    with pytest.raises(AssertionError, match=r"torch\.library"):
        longctx.flash_attention(q, k, v)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    sinks = torch.randn(4)

    def run(q, k, v):
        return longctx.flash_attention_with_lse(
            q, k, v, causal=True, window=(9, None), softcap=2.0, sinks=sinks
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (17, 23):
        q, k, v = inputs((2, length, length, 4, 2, 8, 8))
        for ours, theirs in zip(compiled(q, k, v), run(q, k, v), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(dtype, packed):
    q, k, v = inputs((1, 9, 9, 4, 2, 8, 16), dtype)
    ends = cumulative([4, 5]) if packed else None
    options = (torch.randn(4), ends, ends, None, None, None, True, 4, None, 2.0, 0.3, "torch")
    torch.library.opcheck(torch.ops.longctx.flash_forward.default, (q, k, v, *options))


def test_fake_of_fp8_is_bf16():
    q, k, v = (t.to(FP8) for t in inputs((1, 9, 9, 4, 2, 16, 16)))
    options = (None, None, None, None, None, None, True, None, None, 0.0, 0.3, "torch")
    torch.library.opcheck(
        torch.ops.longctx.flash_forward.default,
        (q, k, v, *options),
        test_utils="test_faketensor",
    )


Q, K = (2, 6, 4, 8), (2, 7, 2, 8)
META = "meta"


def tensor(shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


PACKED = {"q": tensor((1, 6, 4, 8)), "k": tensor((1, 7, 2, 8)), "v": tensor((1, 7, 2, 8))}
BAD = [
    ({"q": [1.0]}, TypeError, "q must be a Tensor"),
    ({"q": tensor((6, 4, 8))}, ValueError, "q must be (batch, q_len, q_heads, head_dim)"),
    ({"k": tensor((7, 2, 8))}, ValueError, "k must be (batch, k_len, kv_heads, head_dim)"),
    ({"v": tensor((1, 2, 7, 2, 8))}, ValueError, "v must be (batch, k_len, kv_heads, value_dim)"),
    ({"q": tensor((2, 6, 8, 4)).transpose(2, 3)}, ValueError, "unit stride in its last axis"),
    ({"q": tensor((3, 6, 4, 8))}, ValueError, "q and k must agree in batch, got 3 and 2"),
    ({"v": tensor((2, 8, 2, 8))}, ValueError, "k and v must agree in k_len, got 7 and 8"),
    ({"v": tensor((2, 7, 1, 8))}, ValueError, "k and v must agree in kv_heads, got 2 and 1"),
    ({"q": tensor((2, 6, 4, 16))}, ValueError, "q and k must agree in head_dim, got 16 and 8"),
    ({"q": tensor((2, 6, 5, 8))}, ValueError, "q_heads must be a multiple of kv_heads"),
    ({"k": tensor(K, torch.bfloat16)}, TypeError, "q and k must share a dtype"),
    ({"v": tensor(K, torch.float64)}, TypeError, "q and v must share a dtype"),
    ({"k": tensor(K, device=META)}, ValueError, "q and k must be on one device"),
    ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    ({"scale": INF}, ValueError, "scale must be finite, got inf"),
    ({"window": (-1, 0)}, ValueError, "window left must be at least 0"),
    ({"window": (0, -2)}, ValueError, "window right must be at least 0"),
    ({"window": (1, 2, 3)}, ValueError, "window must be (left, right)"),
    ({"window": 5}, ValueError, "window must be (left, right), got 5"),
    ({"softcap": -1.0}, ValueError, "softcap must be finite and at least 0"),
    ({"softcap": math.nan}, ValueError, "softcap must be finite and at least 0"),
    ({"sinks": tensor((3,))}, ValueError, "q and sinks must agree in q_heads, got 4 and 3"),
    ({"sinks": tensor((1, 4))}, ValueError, "sinks must be (q_heads)"),
    ({"sinks": tensor((4,), torch.bfloat16)}, TypeError, "sinks must be float32"),
    ({"sinks": tensor((4,), device=META)}, ValueError, "q and sinks must be on one device"),
    ({"q_descale": tensor((2, 2))}, TypeError, "q_descale is for fp8 e4m3 inputs"),
    ({"cu_seqlens_q": int32(0, 6)}, ValueError, "packed sequences need batch 1, got batch 2"),
    ({"cu_seqlens_k": int32(0, 7)}, ValueError, "cu_seqlens_k was given without cu_seqlens_q"),
    (PACKED | {"cu_seqlens_q": int32(0, 6)}, ValueError, "cu_seqlens_k must begin at 0 and end"),
]
ENDS = {"cu_seqlens_q": int32(0, 6), "cu_seqlens_k": int32(0, 7)}
BAD += [
    (PACKED | ENDS | {"cu_seqlens_q": ends}, error, message)
    for ends, error, message in [
        (int32(1, 6), ValueError, "cu_seqlens_q must begin at 0 and end at the total length 6"),
        (int32(0, 5), ValueError, "cu_seqlens_q must begin at 0 and end at the total length 6"),
        (int32(0, 4, 3, 6), ValueError, "cu_seqlens_q must not decrease"),
        (int32(0), ValueError, "cu_seqlens_q needs at least two entries"),
        (int32(0, 6).long(), TypeError, "cu_seqlens_q must be int32"),
        (int32(0, 6).view(1, 2), ValueError, "cu_seqlens_q must be (sequences + 1)"),
        (int32(0, 6).to(META), ValueError, "q and cu_seqlens_q must be on one device"),
        (int32(0, 2, 6), ValueError, "must agree in number of sequences, got 2 and 1"),
    ]
]
EIGHT = {name: tensor(Q if name == "q" else K, FP8) for name in "qkv"}
BAD += [
    (EIGHT | {"k_descale": tensor((2, 4))}, ValueError, "k_descale and (batch, kv_heads)"),
    (EIGHT | {"k_descale": tensor((2,))}, ValueError, "k_descale must be (batch, kv_heads)"),
    (EIGHT | {"v_descale": tensor((2, 2), torch.float64)}, TypeError, "v_descale must be float32"),
    (EIGHT | {"q_descale": tensor((2, 2), device=META)}, ValueError, "must be on one device"),
    (EIGHT | {"k_descale": -torch.ones(2, 2)}, ValueError, "k_descale must be at least 0, got -1"),
    ({n: t.int() for n, t in PACKED.items()}, longctx.UnsupportedError, "int32 not in"),
    ({"backend": "tritn"}, longctx.BackendNotFoundError, "no backend is called 'tritn'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_inputs_say_what_is_wrong(change, error, message):
    arguments = {"q": tensor(Q), "k": tensor(K), "v": tensor(K)} | change
    with pytest.raises(error) as caught:
        longctx.flash_attention(**arguments)
    assert message in str(caught.value)
