"""What exact attention refuses, and with which words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.testing.subject import Subject

__all__ = ["TestFlashRefusals"]

Change = Callable[[Subject, Tensor, Tensor, Tensor], dict[str, Any]]


def int32(subject: Subject, *values: int) -> Tensor:
    """Return integers on the device under test."""
    return torch.tensor(values, dtype=torch.int32, device=subject.device)


def check_refusal(subject: Subject, call: Callable[[], Any], **request: Any) -> None:
    """Assert that a call is refused with every reason that the support table gives."""
    reasons = subject.reasons(*request.pop("features", ()), **request)
    assert reasons
    with pytest.raises(longctx.UnsupportedError) as caught:
        call()
    for reason in reasons:
        assert reason.message in str(caught.value)


BAD: list[tuple[str, type[Exception], Change]] = [
    ("q must be a Tensor", TypeError, lambda s, q, k, v: {"q": [1.0]}),
    (
        "q must be (batch, q_len, q_heads, head_dim)",
        ValueError,
        lambda s, q, k, v: {"q": q[0]},
    ),
    (
        "v must be (batch, k_len, kv_heads, value_dim)",
        ValueError,
        lambda s, q, k, v: {"v": v.unsqueeze(0)},
    ),
    (
        "q must have a unit stride in its last axis",
        ValueError,
        lambda s, q, k, v: {"q": q.transpose(2, 3).contiguous().transpose(2, 3)},
    ),
    ("agree in batch, got 2 and 1", ValueError, lambda s, q, k, v: {"k": k[:1]}),
    ("agree in k_len, got 7 and 6", ValueError, lambda s, q, k, v: {"v": v[:, :6]}),
    ("agree in kv_heads, got 2 and 1", ValueError, lambda s, q, k, v: {"v": v[:, :, :1]}),
    ("agree in head_dim, got 64 and 32", ValueError, lambda s, q, k, v: {"k": k[..., :32]}),
    (
        "q_heads must be a multiple of kv_heads, got q_heads=3",
        ValueError,
        lambda s, q, k, v: {"q": q[:, :, :3]},
    ),
    ("q and k must share a dtype", TypeError, lambda s, q, k, v: {"k": k.double()}),
    ("must be on one device", ValueError, lambda s, q, k, v: {"v": v.to("meta")}),
    ("scale must be finite, got nan", ValueError, lambda s, q, k, v: {"scale": math.nan}),
    ("window left must be at least 0", ValueError, lambda s, q, k, v: {"window": (-1, 0)}),
    ("window must be (left, right)", ValueError, lambda s, q, k, v: {"window": 5}),
    ("softcap must be finite", ValueError, lambda s, q, k, v: {"softcap": -1.0}),
    (
        "q and sinks must agree in q_heads, got 4 and 3",
        ValueError,
        lambda s, q, k, v: {"sinks": s.randn(3, dtype=torch.float32)},
    ),
    (
        "sinks must be float32",
        TypeError,
        lambda s, q, k, v: {"sinks": s.randn(4, dtype=torch.bfloat16)},
    ),
    (
        "packed sequences need batch 1, got batch 2",
        ValueError,
        lambda s, q, k, v: {"cu_seqlens_q": int32(s, 0, 5)},
    ),
    (
        "cu_seqlens_k was given without cu_seqlens_q",
        ValueError,
        lambda s, q, k, v: {"cu_seqlens_k": int32(s, 0, 7)},
    ),
    (
        "cu_seqlens_q must be int32",
        TypeError,
        lambda s, q, k, v: (
            {"q": q[:1], "k": k[:1], "v": v[:1]}
            | {"cu_seqlens_q": torch.tensor([0, 5], device=s.device)}
        ),
    ),
    (
        "k_descale is for fp8 e4m3 inputs",
        TypeError,
        lambda s, q, k, v: {"k_descale": s.randn(2, 2, dtype=torch.float32)},
    ),
]

FEATURES: dict[str, Change] = {
    "window": lambda s, q, k, v: {"window": (3, 0)},
    "softcap": lambda s, q, k, v: {"softcap": 5.0},
    "sinks": lambda s, q, k, v: {"sinks": s.randn(4, dtype=torch.float32)},
    "varlen": lambda s, q, k, v: {
        "q": q[:1],
        "k": k[:1],
        "v": v[:1],
        "cu_seqlens_q": int32(s, 0, 5),
        "cu_seqlens_k": int32(s, 0, 7),
    },
}


@pytest.mark.longctx_op("flash_attention")
class TestFlashRefusals:
    """Bad inputs, and requests that the support table does not hold."""

    @pytest.mark.parametrize(("message", "error", "change"), BAD, ids=[row[0] for row in BAD])
    def test_bad_inputs_say_what_is_wrong(
        self, subject: Subject, message: str, error: type[Exception], change: Change
    ) -> None:
        q, k, v = subject.qkv(2, 5, 7)
        with pytest.raises(error) as caught:
            subject.run(
                longctx.flash_attention, **{"q": q, "k": k, "v": v, **change(subject, q, k, v)}
            )
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("feature", FEATURES)
    def test_undeclared_features_are_refused(self, subject: Subject, feature: str) -> None:
        if feature in subject.support.features:
            pytest.skip(f"{feature} is declared")
        q, k, v = subject.qkv(2, 5, 7)
        arguments = {"q": q, "k": k, "v": v, **FEATURES[feature](subject, q, k, v)}
        check_refusal(
            subject, lambda: subject.run(longctx.flash_attention, **arguments), features=(feature,)
        )

    def test_other_dtypes_are_refused(self, subject: Subject) -> None:
        made = [torch.zeros_like(t, dtype=torch.int32) for t in subject.qkv(1, 5, 7)]
        check_refusal(
            subject, lambda: subject.run(longctx.flash_attention, *made), dtype=torch.int32
        )

    def test_undeclared_head_dims_are_refused(self, subject: Subject) -> None:
        if subject.support.head_dims is None:
            pytest.skip("every head_dim is declared")
        size = max(subject.support.head_dims) + 8
        made = subject.qkv(1, 5, 7, head_dim=size)
        check_refusal(subject, lambda: subject.run(longctx.flash_attention, *made), head_dim=size)

    def test_an_undeclared_gradient_is_refused(self, subject: Subject) -> None:
        if subject.support.gradient:
            pytest.skip("the gradient is declared")
        q, k, v = subject.qkv(1, 5, 7)
        check_refusal(
            subject,
            lambda: subject.run(longctx.flash_attention, q.requires_grad_(), k, v),
            gradient=True,
        )
