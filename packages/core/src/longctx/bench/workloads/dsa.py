"""quantize_fp8, index_scores, index_topk and topk_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Expectation, Outputs, rounding_of
from longctx.bench.exact import sampled
from longctx.bench.plans import topk_indices
from longctx.bench.prepared import Prepared, forward_call
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
from longctx.plans import HeadAxis, TopKPlan
from longctx.reference import dsa as reference

__all__ = ["WORKLOADS"]

MLA_SCALE = 192**-0.5
"""Of absorbed MLA: that of its keys before absorption, not of 576 channels."""


def _is_absorbed(case: Case) -> bool:
    """Return whether the values are the keys' first channels, as in absorbed MLA."""
    return case.get("value_dim", case["head_dim"]) < case["head_dim"]


def _quantize_inputs(case: Case, device: torch.device) -> Inputs:
    return {"x": normal(generator_on(device), dtype_of(case), case["rows"], case["channels"])}


def _quantize_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    x = inputs["x"]
    return forward_call(lambda: function(x), ("values", "scale"))


def _quantize_sample(case: Case, inputs: Inputs) -> list[Expectation]:
    """Return some rows: values must be those of the oracle within one fp8 step, scales exact."""
    rows = torch.tensor(sampled(case["rows"], 64), device=inputs["x"].device)
    values, scale = reference.quantize_fp8(inputs["x"][rows])
    steps = torch.finfo(torch.float8_e4m3fn).eps
    exact_values, exact_scale = values.to(EXACT), scale.to(EXACT)
    return [
        Expectation("values", lambda o: o["values"][rows], exact_values, exact_values, steps),
        Expectation(
            "scale", lambda o: o["scale"][rows], exact_scale, exact_scale, rounding_of(LOW)
        ),
    ]


def _index_inputs(case: Case, device: torch.device) -> Inputs:
    generator, dtype = generator_on(device), dtype_of(case)
    batch, heads, dim = case["batch"], case["index_heads"], case["index_dim"]
    made: Inputs = {
        "q": normal(generator, dtype, batch, case.q_len, heads, dim),
        "k": normal(generator, dtype, batch, case.k_len, dim),
        "weights": normal(generator, torch.float32, batch, case.q_len, heads),
        "k_scale": None,
    }
    if dtype.itemsize == 1:
        factors = torch.rand(batch, case.k_len, device=device, generator=generator)
        made["k_scale"] = 0.5 + factors
    return made


def _scores_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    q, k, weights = inputs["q"], inputs["k"], inputs["weights"]
    k_scale = inputs["k_scale"]
    return forward_call(lambda: function(q, k, weights, k_scale=k_scale), ("scores",))


def _scores_whole(case: Case, inputs: Inputs) -> list[Expectation]:
    return whole_result(case, inputs, ("scores",), lambda cast: (reference.index_scores(**cast),))


def _score_rows(
    case: Case, inputs: Inputs, b: int, row: int, dtype: torch.dtype
) -> tuple[Tensor, int]:
    """Return the scores of the keys that one query sees, and how many they are."""
    seen = row + 1 + case.k_len - case.q_len
    k_scale = inputs["k_scale"]
    scores = reference.index_scores(
        inputs["q"][b : b + 1, row : row + 1],
        inputs["k"][b : b + 1, :seen],
        inputs["weights"][b : b + 1, row : row + 1].to(dtype),
        k_scale=None if k_scale is None else k_scale[b : b + 1, :seen],
        causal=False,
    )
    return scores[0, 0], seen


def _scores_sample(case: Case, inputs: Inputs) -> list[Expectation]:
    b, found = case["batch"] - 1, []
    for row in sampled(case.q_len, 8):
        exact, low = (
            torch.nn.functional.pad(scores, (0, case.k_len - seen), value=-torch.inf)
            for scores, seen in (
                _score_rows(case, inputs, b, row, dtype) for dtype in (EXACT, LOW)
            )
        )

        def pick(outputs: Outputs, row: int = row) -> Tensor:
            return outputs["scores"][b, row]

        rounding = rounding_of(dtype_of(case))
        found.append(Expectation(f"scores of query {row}", pick, exact, low, rounding))
    return found


def _select_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    tensors = (inputs["q"], inputs["k"], inputs["k_scale"], inputs["weights"], case["top_k"])

    def outputs(plan: TopKPlan) -> Outputs:
        return {"indices": plan.indices[:, :, 0]}

    return Prepared(lambda: function(*tensors), outputs)


def _select_expectations(case: Case, inputs: Inputs, rows: list[int]) -> list[Expectation]:
    """Return, for some queries, that the chosen keys' scores are the best ones.

    Scores are compared and not keys, for near ties may fall either way.
    """
    found = []
    for b in sampled(case["batch"], 2):
        for row in rows:
            scores, seen = _score_rows(case, inputs, b, row, EXACT)
            near, _ = _score_rows(case, inputs, b, row, LOW)
            count = min(case["top_k"], seen)
            exact, low = scores.topk(count).values, near.topk(count).values

            def pick(
                outputs: Outputs, b: int = b, row: int = row, scores: Tensor = scores
            ) -> Tensor:
                return _chosen_scores(outputs["indices"][b, row], scores)

            rounding = rounding_of(dtype_of(case))
            found.append(Expectation(f"keys of query {row}", pick, exact, low, rounding))
    return found


def _chosen_scores(indices: Tensor, scores: Tensor) -> Tensor:
    """Return the falling scores of distinct, visible chosen keys; NaN where they are not that."""
    chosen = indices[indices >= 0].long().to(scores.device)
    if int((chosen >= len(scores)).sum()) or len(torch.unique(chosen)) != len(chosen):
        return torch.full_like(scores[: len(chosen)], torch.nan)
    return scores[chosen].sort(descending=True).values


def _select_whole(case: Case, inputs: Inputs) -> list[Expectation]:
    return _select_expectations(case, inputs, list(range(case.q_len)))


def _select_sample(case: Case, inputs: Inputs) -> list[Expectation]:
    return _select_expectations(case, inputs, sampled(case.q_len, 8))


def _topk_inputs(case: Case, device: torch.device) -> Inputs:
    """Return queries, keys, values (of absorbed MLA the keys' first channels) and random sets.

    One set for all heads, or one a KV head where there are several.
    """
    generator, dtype = generator_on(device), dtype_of(case)
    batch, dim = case["batch"], case["head_dim"]
    rows = (batch, case.k_len, case["kv_heads"])
    k = normal(generator, dtype, *rows, dim)
    q = normal(generator, dtype, batch, case.q_len, case["q_heads"], dim)
    v = k[..., : case["value_dim"]] if _is_absorbed(case) else normal(generator, dtype, *rows, dim)
    axis: HeadAxis = "shared" if case["kv_heads"] == 1 else "kv"
    return {"q": q, "k": k, "v": v, "plan": TopKPlan(topk_indices(case, device), axis)}


def _topk_options(case: Case) -> dict[str, Any]:
    return {"scale": MLA_SCALE} if _is_absorbed(case) else {}


def _topk_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    tensors = [inputs[name] for name in ("q", "k", "v", "plan")]
    options = _topk_options(case)
    return forward_call(lambda: function(*tensors, **options), ("out",))


def _topk_whole(case: Case, inputs: Inputs) -> list[Expectation]:
    def attend(cast: Inputs) -> tuple[Tensor, Tensor]:
        tensors = [cast[name] for name in ("q", "k", "v", "plan")]
        return reference.topk_attention(*tensors, **_topk_options(case))

    return whole_result(case, inputs, ("out",), attend)


def _topk_sample(case: Case, inputs: Inputs) -> list[Expectation]:
    k, v, indices = inputs["k"], inputs["v"], inputs["plan"].indices

    group = case["q_heads"] // case["kv_heads"]

    def keep(b: int, h: int, rows: Tensor) -> Tensor:
        chosen = indices[b, rows, h // group].long()
        member = torch.zeros(len(rows), case.k_len + 1, dtype=torch.bool, device=k.device)
        member.scatter_(1, chosen.where(chosen >= 0, case.k_len), True)
        return member[:, :-1]

    return sampled_attention(
        case, inputs["q"], lambda b, h: (k[b, :, h], v[b, :, h]), keep, **_topk_options(case)
    )


def _index_reduced(case: Case) -> Case:
    return reduced_lengths(case, q_len=65, k_len=333, top_k=64)


WORKLOADS = {
    "quantize_fp8": Workload(
        _quantize_inputs,
        _quantize_prepare,
        _quantize_sample,
        _quantize_sample,
        lambda case: case.resized(rows=min(case["rows"], 257)),
    ),
    "index_scores": Workload(
        _index_inputs, _scores_prepare, _scores_whole, _scores_sample, _index_reduced
    ),
    "index_topk": Workload(
        _index_inputs, _select_prepare, _select_whole, _select_sample, _index_reduced
    ),
    "topk_attention": Workload(
        _topk_inputs,
        _topk_prepare,
        _topk_whole,
        _topk_sample,
        lambda case: reduced_lengths(case, q_len=33, k_len=333, top_k=64),
    ),
}
"""The family's ops."""
