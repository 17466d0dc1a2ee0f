"""token_scores, select_tokens and token_sparse_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Expectation, Outputs, rounding_of
from longctx.bench.exact import plan_keep, sampled
from longctx.bench.plans import on_device, token_set_plan
from longctx.bench.prepared import Prepared, forward_call
from longctx.bench.workloads.flash import attention_inputs
from longctx.bench.workloads.workload import (
    EXACT,
    LOW,
    Inputs,
    Workload,
    dtype_of,
    generator_on,
    normal,
    reduced_lengths,
    sampled_attention,
    whole_result,
)
from longctx.plans import TokenSetPlan
from longctx.reference import token_sparse as reference

__all__ = ["DROP_MASS", "WORKLOADS", "least_tokens"]

DROP_MASS = 0.005
"""The paper's tau for Llama-3.1-8B."""


def least_tokens(case: Case) -> int:
    """Return ``min_tokens``: the default, or an eighth of a shorter prefix."""
    return min(1024, case["prefix_len"] // 8)


def _scores_inputs(case: Case, device: torch.device) -> Inputs:
    generator, dtype, dim = generator_on(device), dtype_of(case), case["head_dim"]
    queries = (case["batch"], case["window_queries"], case["q_heads"], dim)
    return {
        "q_recent": normal(generator, dtype, *queries),
        "k": normal(generator, dtype, case["batch"], case.k_len, case["kv_heads"], dim),
    }


def _scores_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    q_recent, k = inputs["q_recent"], inputs["k"]
    return forward_call(lambda: function(q_recent, k), ("scores",))


def _scores_whole(case: Case, inputs: Inputs) -> list[Expectation]:
    return whole_result(case, inputs, ("scores",), lambda cast: (reference.token_scores(**cast),))


def _scores_sample(case: Case, inputs: Inputs) -> list[Expectation]:
    """Return whole rows of scores of a few heads."""
    b, group, found = case["batch"] - 1, case["q_heads"] // case["kv_heads"], []
    dtype = dtype_of(case)
    for h in sampled(case["q_heads"], 3):
        q = inputs["q_recent"][b : b + 1, :, h : h + 1]
        k = inputs["k"][b : b + 1, :, h // group : h // group + 1]
        exact, low = (
            reference.token_scores(q.to(precision), k.to(precision))[0, 0]
            for precision in (EXACT, LOW)
        )

        def pick(outputs: Outputs, h: int = h) -> Tensor:
            return outputs["scores"][b, h]

        what = f"scores of head {h}"
        found.append(Expectation(what, pick, exact, low.to(dtype), rounding_of(dtype)))
    return found


def _select_inputs(case: Case, device: torch.device) -> Inputs:
    """Return scores as skewed as those of attention: most of the mass on few tokens."""
    shape = (case["batch"], case["heads"], case["prefix_len"])
    noise = normal(generator_on(device), torch.float32, *shape)
    return {"scores": (2 * noise).softmax(-1)}


def _select_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    scores = inputs["scores"]
    options = {
        "drop_mass": DROP_MASS,
        "min_tokens": least_tokens(case),
        "recent": case["recent"],
    }

    def outputs(plan: TokenSetPlan) -> Outputs:
        return {"indices": plan.indices, "counts": plan.counts}

    return Prepared(lambda: function(scores, **options), outputs)


def _select_expectations(case: Case, inputs: Inputs) -> list[Expectation]:
    """Return that every batch entry keeps as many tokens as the oracle, and the best ones."""
    scores = inputs["scores"].to(EXACT)
    recent, found = case["recent"], []
    for b in sampled(case["batch"], 2):
        plan = reference.select_tokens(
            scores[b : b + 1],
            drop_mass=DROP_MASS,
            min_tokens=least_tokens(case),
            recent=recent,
        )
        for h in sampled(case["heads"], 3):
            own = scores[b, h]

            def count(outputs: Outputs, b: int = b, h: int = h) -> Tensor:
                return outputs["counts"][b, h].reshape(1)

            def chosen(outputs: Outputs, b: int = b, h: int = h, own: Tensor = own) -> Tensor:
                return _mass(outputs["indices"][b, h], own, recent)

            kept = plan.counts[0, h].reshape(1).to(EXACT)
            best = own.topk(int(kept) - recent).values.sum().reshape(1)
            # a sum over all tokens in fp32 may fall on either side of the mass that goes
            found.append(Expectation(f"tokens of head {h}", count, kept, kept, 5e-4))
            found.append(Expectation(f"mass of head {h}", chosen, best, best, 1e-5))
    return found


def _mass(indices: Tensor, scores: Tensor, recent: int) -> Tensor:
    """Return the score that distinct chosen tokens hold; NaN without the recent ones."""
    chosen = indices[indices >= 0].long()
    prefix = chosen[chosen < len(scores)]
    distinct = torch.unique(chosen)
    if len(distinct) != len(chosen) or len(chosen) - len(prefix) != recent:
        return scores.new_full((1,), torch.nan)
    return scores[prefix].sum().reshape(1)


def _sets_inputs(case: Case, device: torch.device) -> Inputs:
    plan = on_device(token_set_plan(case), device)
    return attention_inputs(case, device) | {"plan": plan}


def _sets_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    tensors = [inputs[name] for name in ("q", "k", "v", "plan")]
    return forward_call(lambda: function(*tensors), ("out",))


def _sets_whole(case: Case, inputs: Inputs) -> list[Expectation]:
    def attend(cast: Inputs) -> tuple[Tensor, Tensor]:
        return reference.token_sparse_attention(**cast)

    return whole_result(case, inputs, ("out",), attend)


def _sets_sample(case: Case, inputs: Inputs) -> list[Expectation]:
    k, v, plan = inputs["k"], inputs["v"], inputs["plan"]

    def keep(b: int, h: int, rows: Tensor) -> Tensor:
        return plan_keep(plan, rows, case.k_len, batch=b, head_set=h)

    return sampled_attention(case, inputs["q"], lambda b, h: (k[b, :, h], v[b, :, h]), keep)


WORKLOADS = {
    "token_scores": Workload(
        _scores_inputs,
        _scores_prepare,
        _scores_whole,
        _scores_sample,
        lambda case: reduced_lengths(case, window_queries=32, k_len=333),
    ),
    "select_tokens": Workload(
        _select_inputs,
        _select_prepare,
        _select_expectations,
        _select_expectations,
        lambda case: reduced_lengths(case, prefix_len=701, recent=32),
    ),
    "token_sparse_attention": Workload(
        _sets_inputs,
        _sets_prepare,
        _sets_whole,
        _sets_sample,
        lambda case: reduced_lengths(case, seq=321),
    ),
}
"""The family's ops."""
