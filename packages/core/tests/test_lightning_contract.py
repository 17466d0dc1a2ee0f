"""What lightning attention refuses, and how it behaves inside ``torch.compile``."""

from __future__ import annotations

import math

import pytest
import torch

import longctx


def inputs(batch, length, heads=3, dim=8, value_dim=5):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, heads, d, generator=generator) for d in (dim, dim, value_dim)
    ]


def test_registered_operators():
    q, k, v = inputs(2, 66, 3, 4, 2)
    log_decay = -torch.rand(3)
    ends = torch.tensor([0, 1, 1, 66], dtype=torch.int32)
    ops = torch.ops.longctx
    cases = [
        (ops.lightning_forward.default, (q, k, v, log_decay, None, None, 1.0, "torch")),
        (
            ops.lightning_forward.default,
            (q[:1], k[:1], v[:1], log_decay, torch.ones(3, 3, 4, 2), ends, 0.5, "torch"),
        ),
        (
            ops.lightning_backward.default,
            (v, None, q, k, v, log_decay, None, None, 1.0, "torch"),
        ),
        (
            ops.lightning_decode.default,
            (q[:, :1], k[:, :1], v[:, :1], torch.ones(2, 3, 4, 2), log_decay, 1.0, "torch"),
        ),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_without_a_break(dynamic):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def traced(q, k, v, log_decay, first, ends):
        out, final = longctx.lightning_attention(
            q, k, v, log_decay, initial_state=first, cu_seqlens=ends
        )
        token = (t[:, :1].expand(final.shape[0], -1, -1, -1).contiguous() for t in (q, k, v))
        return out, longctx.lightning_decode(*token, final, log_decay), final

    log_decay = -torch.rand(3)
    for length in (70, 90):
        q, k, v = inputs(1, length, 3, 4, 2)
        ends = torch.tensor([0, 20, length], dtype=torch.int32)
        first = torch.ones(2, 3, 4, 2)
        out, token_out, final = traced(q, k, v, log_decay, first, ends)
        wanted, wanted_final = longctx.lightning_attention(
            q, k, v, log_decay, initial_state=first, cu_seqlens=ends
        )
        token = (t[:, :1].expand(2, -1, -1, -1) for t in (q, k, v))
        wanted_token = longctx.lightning_decode(*token, wanted_final, log_decay)
        for got, expected in (
            (out, wanted),
            (token_out, wanted_token),
            (final, wanted_final),
        ):
            torch.testing.assert_close(got, expected)


def good():
    q, k, v = inputs(2, 4)
    return {"q": q, "k": k, "v": v, "log_decay": -torch.ones(3)}


BAD = {
    "rank": (lambda a: {"q": a["q"][0]}, ValueError, r"q must be \(batch, seq, heads, head_dim\)"),
    "not a tensor": (lambda a: {"k": [1]}, TypeError, "k must be a Tensor"),
    "stride": (lambda a: {"q": a["q"].mT.contiguous().mT}, ValueError, "unit stride"),
    "heads": (lambda a: {"k": a["k"][:, :, :2]}, ValueError, "q and k must agree in heads"),
    "length": (lambda a: {"v": a["v"][:, :2]}, ValueError, "q and v must agree in seq"),
    "batch": (lambda a: {"k": a["k"][:1]}, ValueError, "q and k must agree in batch"),
    "head_dim": (lambda a: {"k": a["k"][..., :4]}, ValueError, "agree in head_dim"),
    "dtype": (lambda a: {"v": a["v"].half()}, TypeError, "q and v must share a dtype"),
    "device": (lambda a: {"v": a["v"].to("meta")}, ValueError, "must be on one device"),
    "scale": (lambda a: {"scale": math.nan}, ValueError, "scale must be finite"),
    "decay rank": (lambda a: {"log_decay": torch.ones(3, 1)}, ValueError, r"must be \(heads\)"),
    "decay heads": (lambda a: {"log_decay": -torch.ones(2)}, ValueError, "agree in heads"),
    "decay dtype": (lambda a: {"log_decay": -torch.ones(3).half()}, TypeError, "be float32, got"),
    "decay device": (
        lambda a: {"log_decay": a["log_decay"].to("meta")},
        ValueError,
        "q and log_decay must be on one device",
    ),
    "decay positive": (lambda a: {"log_decay": torch.ones(3)}, ValueError, "at most 0"),
    "decay nan": (lambda a: {"log_decay": torch.full((3,), math.nan)}, ValueError, "finite"),
    "decay -inf": (lambda a: {"log_decay": torch.full((3,), -math.inf)}, ValueError, "finite"),
    "decay gradient": (
        lambda a: {"log_decay": (-torch.ones(3)).requires_grad_()},
        ValueError,
        "constant without gradient",
    ),
    "state shape": (
        lambda a: {"initial_state": torch.zeros(1, 3, 8, 5)},
        ValueError,
        r"initial_state must be .* = \(2, 3, 8, 5\), got \(1, 3, 8, 5\)",
    ),
    "state dtype": (
        lambda a: {"initial_state": torch.zeros(2, 3, 8, 5).bfloat16()},
        TypeError,
        "initial_state must be float32, got bfloat16",
    ),
    "state device": (
        lambda a: {"initial_state": torch.zeros(2, 3, 8, 5, device="meta")},
        ValueError,
        "must be on one device",
    ),
    "cu_seqlens batch": (
        lambda a: {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)},
        ValueError,
        "need batch 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    arguments = good()
    with pytest.raises(error, match=message) as caught:
        longctx.lightning_attention(**(arguments | change(arguments)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 3], "end at the total length 4"),
        ([1, 4], "begin at 0"),
        ([0, 3, 2, 4], "must not decrease"),
        ([0], "at least two entries"),
    ],
)
def test_bad_cu_seqlens(ends, message):
    q, k, v = inputs(1, 4)
    with pytest.raises(ValueError, match=message):
        longctx.lightning_attention(
            q, k, v, -torch.ones(3), cu_seqlens=torch.tensor(ends, dtype=torch.int32)
        )


def test_packed_state_needs_one_row_a_sequence():
    q, k, v = inputs(1, 4)
    ends = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"= \(2, 3, 8, 5\), got \(1, 3, 8, 5\)"):
        longctx.lightning_attention(
            q, k, v, -torch.ones(3), initial_state=torch.zeros(1, 3, 8, 5), cu_seqlens=ends
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": torch.zeros(2, 3, 8, 5).half()}, TypeError, "state must be float32"),
        ({"state": torch.zeros(2, 3, 5, 8)}, ValueError, r"= \(2, 3, 8, 5\), got"),
        ({"state": torch.zeros(1, 3, 8, 5).expand(2, -1, -1, -1)}, ValueError, "in place"),
        ({"log_decay": torch.ones(3)}, ValueError, "at most 0"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
    ],
)
def test_bad_decode_input(change, error, message):
    arguments = {n: t[:, :1] if t.ndim == 4 else t for n, t in good().items()}
    arguments["state"] = torch.zeros(2, 3, 8, 5)
    with pytest.raises(error, match=message):
        longctx.lightning_decode(**(arguments | change))


def test_decode_takes_one_token_and_has_no_gradient():
    arguments = good()
    with pytest.raises(ValueError, match="use lightning_attention"):
        longctx.lightning_decode(**arguments, state=torch.zeros(2, 3, 8, 5))
    token = {n: t[:, :1] if t.ndim == 4 else t for n, t in arguments.items()}
    token["q"] = token["q"].clone().requires_grad_()
    with pytest.raises(longctx.UnsupportedError, match="no backward pass"):
        longctx.lightning_decode(**token, state=torch.zeros(2, 3, 8, 5))
