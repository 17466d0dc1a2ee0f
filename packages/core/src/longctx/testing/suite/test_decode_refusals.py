"""What decode and merging refuse, and with which words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import longctx
from longctx.testing.subject import Subject
from longctx.testing.suite.test_decode import int32
from longctx.testing.suite.test_flash_refusals import check_refusal

__all__ = ["TestDecodeRefusals", "TestMergeRefusals"]

FP8 = torch.float8_e4m3fn
Change = Callable[[Subject], dict[str, Any]]


def _arguments(subject: Subject, q_len: int = 2) -> dict[str, Any]:
    return {
        "q": subject.randn(2, q_len, 4, 64),
        "k_cache": subject.randn(2, 7, 2, 64),
        "v_cache": subject.randn(2, 7, 2, 64),
        "cache_seqlens": int32(subject, 5, 7),
    }


def _pages(subject: Subject) -> dict[str, Any]:
    return {
        "k_cache": subject.randn(6, 4, 2, 64),
        "v_cache": subject.randn(6, 4, 2, 64),
        "page_table": int32(subject, 5, 0, 1, 2).view(2, 2),
    }


def _fp8(subject: Subject) -> dict[str, Any]:
    return {name: subject.randn(2, 7, 2, 64).to(FP8) for name in ("k_cache", "v_cache")}


BAD: list[tuple[str, type[Exception], Change]] = [
    ("q must be a Tensor", TypeError, lambda s: {"q": 3}),
    (
        "q must be (batch, q_len, q_heads, head_dim)",
        ValueError,
        lambda s: {"q": s.randn(2, 4, 64)},
    ),
    (
        "k_cache must be (batch, capacity, kv_heads, head_dim)",
        ValueError,
        lambda s: {"k_cache": s.randn(2, 7, 64)},
    ),
    (
        "v_cache must be (pages, page_size, kv_heads, value_dim)",
        ValueError,
        lambda s: {**_pages(s), "v_cache": s.randn(6, 4, 64)},
    ),
    ("agree in kv_heads, got 2 and 4", ValueError, lambda s: {"v_cache": s.randn(2, 7, 4, 64)}),
    ("agree in head_dim, got 32 and 64", ValueError, lambda s: {"q": s.randn(2, 2, 4, 32)}),
    ("q_heads must be a multiple of kv_heads", ValueError, lambda s: {"q": s.randn(2, 2, 3, 64)}),
    (
        "q_len must be 1 to 16 in decode, got 17",
        ValueError,
        lambda s: {"q": s.randn(2, 17, 4, 64)},
    ),
    ("k_cache must be fp8 e4m3 or of q's", TypeError, lambda s: {"k_cache": _wide(s)}),
    ("must be on one device", ValueError, lambda s: {"v_cache": s.randn(2, 7, 2, 64).to("meta")}),
    (
        "cache_seqlens must be int32",
        TypeError,
        lambda s: {"cache_seqlens": int32(s, 5, 7).long()},
    ),
    (
        "q and cache_seqlens must agree in batch, got 2 and 1",
        ValueError,
        lambda s: {"cache_seqlens": int32(s, 5)},
    ),
    (
        "page_table must be (batch, max_pages)",
        ValueError,
        lambda s: {**_pages(s), "page_table": int32(s, 1, 2)},
    ),
    (
        "page_table must be int32",
        TypeError,
        lambda s: {**_pages(s), "page_table": int32(s, 1, 2).view(2, 1).long()},
    ),
    ("window right must be None or 0 in decode", ValueError, lambda s: {"window": (3, 1)}),
    ("scale must be finite, got inf", ValueError, lambda s: {"scale": math.inf}),
    (
        "k_scale is for an fp8 e4m3 cache",
        TypeError,
        lambda s: {"k_scale": s.randn(2, 2, dtype=torch.float32)},
    ),
    (
        "v_scale and (batch, kv_heads) must agree in shape, got (2, 4) and (2, 2)",
        ValueError,
        lambda s: {**_fp8(s), "v_scale": s.randn(2, 4, dtype=torch.float32)},
    ),
]

FEATURES: dict[str, Change] = {
    "paged": _pages,
    "multi-token": lambda s: {"q": s.randn(2, 2, 4, 64)},
    "fp8": _fp8,
    "window": lambda s: {"window": (3, 0)},
    "softcap": lambda s: {"softcap": 5.0},
    "sinks": lambda s: {"sinks": s.randn(4, dtype=torch.float32)},
}


def _wide(subject: Subject) -> torch.Tensor:
    return subject.randn(2, 7, 2, 64, dtype=torch.float64)


@pytest.mark.longctx_op("decode_attention")
class TestDecodeRefusals:
    """Bad inputs, and requests that the support table does not hold."""

    @pytest.mark.parametrize(("message", "error", "change"), BAD, ids=[row[0] for row in BAD])
    def test_bad_inputs_say_what_is_wrong(
        self, subject: Subject, message: str, error: type[Exception], change: Change
    ) -> None:
        with pytest.raises(error) as caught:
            subject.run(longctx.decode_attention, **(_arguments(subject) | change(subject)))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("feature", FEATURES)
    def test_undeclared_features_are_refused(self, subject: Subject, feature: str) -> None:
        if feature in subject.support.features:
            pytest.skip(f"{feature} is declared")
        arguments = _arguments(subject, q_len=1) | FEATURES[feature](subject)
        check_refusal(
            subject,
            lambda: subject.run(longctx.decode_attention, **arguments),
            features=(feature,),
        )

    def test_a_gradient_is_refused(self, subject: Subject) -> None:
        arguments = _arguments(subject, q_len=1)
        arguments["q"].requires_grad_()
        check_refusal(
            subject, lambda: subject.run(longctx.decode_attention, **arguments), gradient=True
        )
        with torch.no_grad():
            subject.run(longctx.decode_attention, **arguments)


MERGES: list[tuple[str, type[Exception], Change]] = [
    ("outs must hold at least one part", ValueError, lambda s: {"outs": []}),
    ("lses must hold at least one part", ValueError, lambda s: {"lses": []}),
    (
        "outs must be (parts, batch, q_len, q_heads, value_dim)",
        ValueError,
        lambda s: {"outs": s.randn(1, 3, 4, 64)},
    ),
    (
        "lses must be (parts, batch, q_heads, q_len)",
        ValueError,
        lambda s: {"lses": s.randn(1, 4, 3, dtype=torch.float32)},
    ),
    (
        "(parts, batch, q_heads, q_len)",
        ValueError,
        lambda s: {"lses": s.randn(2, 1, 3, 4, dtype=torch.float32)},
    ),
    (
        "outs must share a shape",
        ValueError,
        lambda s: {"outs": [s.randn(1, 3, 4, 64), s.randn(1, 2, 4, 64)]},
    ),
    (
        "outs must share a dtype",
        TypeError,
        lambda s: {"outs": [s.randn(1, 3, 4, 64), s.randn(1, 3, 4, 64, dtype=torch.float64)]},
    ),
    (
        "lses must be float32",
        TypeError,
        lambda s: {"lses": s.randn(2, 1, 4, 3, dtype=torch.float16)},
    ),
    (
        "outs and lses must be on one device",
        ValueError,
        lambda s: {"lses": torch.zeros(2, 1, 4, 3, device="meta")},
    ),
]


@pytest.mark.longctx_op("merge_attention")
class TestMergeRefusals:
    """Parts that do not belong together."""

    @pytest.mark.parametrize(("message", "error", "change"), MERGES, ids=[m[0] for m in MERGES])
    def test_bad_parts_say_what_is_wrong(
        self, subject: Subject, message: str, error: type[Exception], change: Change
    ) -> None:
        good = {
            "outs": subject.randn(2, 1, 3, 4, 64),
            "lses": subject.randn(2, 1, 4, 3, dtype=torch.float32),
        }
        with pytest.raises(error) as caught:
            subject.run(longctx.merge_attention, **(good | change(subject)))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_gradient_is_refused(self, subject: Subject) -> None:
        outs = subject.randn(2, 1, 3, 4, 64).requires_grad_()
        lses = subject.randn(2, 1, 4, 3, dtype=torch.float32)
        check_refusal(
            subject,
            lambda: subject.run(longctx.merge_attention, outs, lses),
            gradient=True,
            q_heads=4,
            kv_heads=4,
        )
