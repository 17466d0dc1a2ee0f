"""flash_attention: forward and backward, dense and windowed, also of packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Expectation, Outputs, rounding_of
from longctx.bench.exact import attention_gradients, dense_keep, sampled
from longctx.bench.plans import sequence_ends
from longctx.bench.prepared import Prepared, backward_call, forward_call
from longctx.bench.workloads.workload import (
    EXACT,
    LOW,
    Inputs,
    Workload,
    attention_output,
    dtype_of,
    generator_on,
    normal,
    reduced_lengths,
    sampled_attention,
    whole_result,
)
from longctx.reference import flash as reference

__all__ = ["WORKLOADS", "attention_inputs"]


def attention_inputs(case: Case, device: torch.device) -> Inputs:
    """Return random ``q, k, v`` of a whole prefill, and ``dout`` for a backward case."""
    generator, dtype = generator_on(device), dtype_of(case)
    rows, dim = (case["batch"], case.k_len), case["head_dim"]
    names = {"q": case["q_heads"], "k": case["kv_heads"], "v": case["kv_heads"]}
    if case.backward:
        names["dout"] = case["q_heads"]
    return {name: normal(generator, dtype, *rows, heads, dim) for name, heads in names.items()}


def _inputs(case: Case, device: torch.device) -> Inputs:
    ends = sequence_ends(case)
    packed = {} if ends is None else {"cu_seqlens_q": ends.to(device)}
    return attention_inputs(case, device) | packed


def _options(case: Case, inputs: Inputs) -> dict[str, Any]:
    window = None if case.window is None else (case.window, 0)
    options = {"causal": case.causal, "window": window}
    if "cu_seqlens_q" in inputs:
        options["cu_seqlens_q"] = inputs["cu_seqlens_q"]
    return options


def _prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    options = _options(case, inputs)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if case.backward:

        def forward(*tensors: Tensor) -> Tensor:
            out: Tensor = function(*tensors, **options)
            return out

        return backward_call(forward, (q, k, v), inputs["dout"])
    return forward_call(lambda: function(q, k, v, **options), ("out",))


def _whole(case: Case, inputs: Inputs) -> list[Expectation]:
    if case.backward:
        return whole_result(case, inputs, ("dq", "dk", "dv"), lambda cast: _gradients(case, cast))

    def forward(cast: Inputs) -> tuple[Tensor, Tensor]:
        return reference.flash_attention(cast["q"], cast["k"], cast["v"], **_options(case, cast))

    return whole_result(case, inputs, ("out",), forward, dtype=attention_output(dtype_of(case)))


def _gradients(case: Case, cast: Inputs) -> tuple[Tensor, ...]:
    leaves = [cast[name].detach().requires_grad_() for name in "qkv"]
    with torch.enable_grad():
        out, _ = reference.flash_attention(*leaves, **_options(case, cast))
        return torch.autograd.grad(out, leaves, cast["dout"])


def _sample(case: Case, inputs: Inputs) -> list[Expectation]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]

    def keep(rows: Tensor) -> Tensor:
        seen = dense_keep(rows, case.q_len, case.k_len, causal=case.causal, window=case.window)
        if "cu_seqlens_q" in inputs:
            tokens = torch.arange(case.k_len, dtype=torch.int32, device=rows.device)
            sequence = torch.searchsorted(inputs["cu_seqlens_q"], tokens, right=True)
            seen &= sequence[rows].unsqueeze(1) == sequence
        return seen

    if case.backward:
        return _sampled_gradients(case, inputs, keep)
    return sampled_attention(
        case, q, lambda b, h: (k[b, :, h], v[b, :, h]), lambda _b, _h, rows: keep(rows)
    )


def _sampled_gradients(
    case: Case, inputs: Inputs, keep: Callable[[Tensor], Tensor]
) -> list[Expectation]:
    """Return the exact gradients of one KV head and the query heads that share it."""
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    group, scale = case["q_heads"] // case["kv_heads"], case["head_dim"] ** -0.5
    b, head = case["batch"] - 1, sampled(case["kv_heads"], 3)[-1]
    own = slice(head * group, (head + 1) * group)
    parts = q[b, :, own], k[b, :, head], v[b, :, head], dout[b, :, own]
    exact = attention_gradients(*parts, keep, scale, EXACT)
    low = attention_gradients(*parts, keep, scale, LOW, rounded=q.dtype)
    picks: dict[str, Callable[[Outputs], Tensor]] = {
        "dq": lambda outputs: outputs["dq"][b, :, own],
        "dk": lambda outputs: outputs["dk"][b, :, head],
        "dv": lambda outputs: outputs["dv"][b, :, head],
    }
    return [
        Expectation(
            f"{name} of KV head {head}",
            pick,
            true,
            near.to(q.dtype),
            rounding_of(q.dtype, backward=True),
            by_row=True,
        )
        for (name, pick), true, near in zip(picks.items(), exact, low, strict=True)
    ]


def _reduced(case: Case) -> Case:
    smaller = reduced_lengths(case, seq=321)
    return smaller if case.window is None else replace(smaller, window=min(case.window, 65))


WORKLOADS = {"flash_attention": Workload(_inputs, _prepare, _whole, _sample, _reduced)}
"""The family's ops."""
