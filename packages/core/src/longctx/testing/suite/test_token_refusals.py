"""What token-sparse attention refuses, and with which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx import TokenSetPlan, TopKPlan
from longctx.testing.subject import Subject

__all__ = ["TestTokenSparseRefusals"]


def plan_of(
    subject: Subject, row: list[int], count: int | None = None, sets: int = 1, **options: Any
) -> TokenSetPlan:
    """Return a plan for batch 2 whose sets are all the same."""
    indices = torch.tensor(row, dtype=torch.int32, device=subject.device)
    count = len(row) if count is None else count
    counts = torch.full((2, sets), count, dtype=torch.int32, device=subject.device)
    options = {"head_axis": "shared"} | options
    return TokenSetPlan(indices.expand(2, sets, -1).contiguous(), counts, **options)


Change = Callable[[Subject, Tensor], dict[str, Any]]

BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "rank": (lambda s, q: {"q": q[0]}, ValueError, r"q must be \(batch, q_len, q_heads, head_dim"),
    "length": (
        lambda s, q: {"q": torch.cat([q, q], 1)},
        ValueError,
        "q_len must be at most k_len, got 10 and 9",
    ),
    "dtype": (lambda s, q: {"q": q.double()}, TypeError, "must share a dtype"),
    "scale": (lambda s, q: {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    "no plan": (
        lambda s, q: {"plan": TopKPlan(torch.zeros(2, 5, 1, 2, dtype=torch.int32))},
        TypeError,
        "plan must be a TokenSetPlan, got TopKPlan",
    ),
    "sets": (
        lambda s, q: {"plan": plan_of(s, [0], sets=4, head_axis="kv")},
        ValueError,
        "has 4 head sets but head_axis='kv' needs 2",
    ),
    "above": (lambda s, q: {"plan": plan_of(s, [0, 9])}, ValueError, "made for another length"),
    "falls": (lambda s, q: {"plan": plan_of(s, [5, 3])}, ValueError, "must ascend .* 5 then 3"),
    "repeats": (lambda s, q: {"plan": plan_of(s, [3, 3])}, ValueError, "without repeats"),
    "count": (lambda s, q: {"plan": plan_of(s, [3], 2)}, ValueError, "0 and the capacity 1"),
}


@pytest.mark.longctx_op("token_sparse_attention")
class TestTokenSparseRefusals:
    """Bad input is named in one sentence; what is not declared is refused with its reason."""

    @pytest.mark.parametrize("name", BAD)
    def test_bad_input(self, subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        subject.require()
        monkeypatch.setenv("LONGCTX_CHECK_VALUES", "1")
        change, error, words = BAD[name]
        q, k, v = subject.qkv(2, 5, 9)
        given = {"q": q, "k": k, "v": v, "plan": plan_of(subject, [3])} | change(subject, q)
        with pytest.raises(error, match=words) as caught:
            subject.run(longctx.token_sparse_attention, **given)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("feature", ["per-kv-head", "per-query-head"])
    def test_features_that_are_not_declared(self, subject: Subject, feature: str) -> None:
        subject.require()
        reasons = subject.reasons(feature)
        if not reasons:
            pytest.skip(f"{feature} is declared")
        sets = {"per-kv-head": (2, "kv"), "per-query-head": (4, "query")}[feature]
        plan = plan_of(subject, [3], sets=sets[0], head_axis=sets[1])
        with pytest.raises(longctx.UnsupportedError) as caught:
            subject.run(longctx.token_sparse_attention, *subject.qkv(2, 5, 9), plan)
        assert all(reason.message in str(caught.value) for reason in reasons)

    def test_a_gradient_is_refused(self, subject: Subject) -> None:
        subject.require()
        q, k, v = subject.qkv(2, 5, 9)
        plan = plan_of(subject, [3])
        with pytest.raises(longctx.UnsupportedError, match="no backward pass"):
            subject.run(longctx.token_sparse_attention, q.requires_grad_(), k, v, plan)
