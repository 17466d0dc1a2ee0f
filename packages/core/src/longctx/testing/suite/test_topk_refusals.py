"""What attention over chosen keys refuses, and with which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx import TopKPlan
from longctx.testing.subject import Subject

__all__ = ["TestTopkAttentionRefusals"]


def plan_of(subject: Subject, value: int, *, rows: int = 5, sets: int = 1, **options: Any) -> Any:
    """Return a plan for batch 2 with one index a row."""
    indices = torch.full((2, rows, sets, 1), value, dtype=torch.int32, device=subject.device)
    return TopKPlan(indices, **options)


Change = Callable[[Subject, Tensor], dict[str, Any]]

BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "rank": (lambda s, q: {"q": q[0]}, ValueError, r"q must be \(batch, q_len, q_heads, head_dim"),
    "heads": (lambda s, q: {"q": q[:, :, :3]}, ValueError, "multiple of kv_heads"),
    "dtype": (lambda s, q: {"q": q.double()}, TypeError, "must share a dtype"),
    "scale": (lambda s, q: {"scale": float("nan")}, ValueError, "scale must be finite"),
    "sinks": (
        lambda s, q: {"sinks": s.randn(3, dtype=torch.float32)},
        ValueError,
        "must agree in q_heads",
    ),
    "no plan": (lambda s, q: {"plan": q}, TypeError, "plan must be a TopKPlan, got Tensor"),
    "rows": (lambda s, q: {"plan": plan_of(s, 0, rows=4)}, ValueError, "for 4 queries, q has 5"),
    "sets": (lambda s, q: {"plan": plan_of(s, 0, sets=2)}, ValueError, "has 2 head sets"),
    "query heads": (
        lambda s, q: {"plan": plan_of(s, 0, sets=4, head_axis="query")},
        ValueError,
        "one set for all heads or one a KV head, got head_axis='query': lower it",
    ),
    "above": (lambda s, q: {"plan": plan_of(s, 9)}, ValueError, "between -1 and 8 for k_len 9"),
    "below": (lambda s, q: {"plan": plan_of(s, -2)}, ValueError, "got values from -2 to -2"),
}


@pytest.mark.longctx_op("topk_attention")
class TestTopkAttentionRefusals:
    """Bad input is named in one sentence; what is not declared is refused with its reason."""

    @pytest.mark.parametrize("name", BAD)
    def test_bad_input(self, subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        subject.require()
        monkeypatch.setenv("LONGCTX_CHECK_VALUES", "1")
        change, error, words = BAD[name]
        q, k, v = subject.qkv(2, 5, 9)
        given = {"q": q, "k": k, "v": v, "plan": plan_of(subject, 3)} | change(subject, q)
        with pytest.raises(error, match=words) as caught:
            subject.run(longctx.topk_attention, **given)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("feature", ["pages", "per-kv-head", "sinks"])
    def test_features_that_are_not_declared(self, subject: Subject, feature: str) -> None:
        subject.require()
        reasons = subject.reasons(feature)
        if not reasons:
            pytest.skip(f"{feature} is declared")
        plans = {
            "pages": plan_of(subject, 0, page_size=4),
            "per-kv-head": plan_of(subject, 0, sets=2, head_axis="kv"),
        }
        plan = plans.get(feature, plan_of(subject, 0))
        sinks = subject.randn(4, dtype=torch.float32) if feature == "sinks" else None
        with pytest.raises(longctx.UnsupportedError) as caught:
            subject.run(longctx.topk_attention, *subject.qkv(2, 5, 9), plan, sinks=sinks)
        assert all(reason.message in str(caught.value) for reason in reasons)

    def test_a_gradient_is_refused(self, subject: Subject) -> None:
        subject.require()
        q, k, v = subject.qkv(2, 5, 9)
        with pytest.raises(longctx.UnsupportedError, match="no backward pass"):
            subject.run(longctx.topk_attention, q.requires_grad_(), k, v, plan_of(subject, 3))
