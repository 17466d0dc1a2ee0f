"""block_sparse_attention under random block, stripe and window plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Expectation
from longctx.bench.exact import plan_keep
from longctx.bench.plans import block_sparse_plan, on_device
from longctx.bench.prepared import Prepared, forward_call
from longctx.bench.workloads.flash import attention_inputs
from longctx.bench.workloads.workload import (
    Inputs,
    Workload,
    reduced_lengths,
    sampled_attention,
    whole_result,
)
from longctx.plans import WindowPlan
from longctx.reference import block_sparse as reference

__all__ = ["WORKLOADS"]


def _inputs(case: Case, device: torch.device) -> Inputs:
    plan = on_device(block_sparse_plan(case), device)
    return attention_inputs(case, device) | {"plan": plan}


def _prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    tensors = [inputs[name] for name in ("q", "k", "v", "plan")]
    return forward_call(lambda: function(*tensors), ("out",))


def _whole(case: Case, inputs: Inputs) -> list[Expectation]:
    def attend(cast: Inputs) -> tuple[Tensor, Tensor]:
        return reference.block_sparse_attention(**cast)

    return whole_result(case, inputs, ("out",), attend)


def _sample(case: Case, inputs: Inputs) -> list[Expectation]:
    k, v, plan = inputs["k"], inputs["v"], inputs["plan"]
    axis = "shared" if isinstance(plan, WindowPlan) else plan.head_axis
    heads_a_set = {"query": 1, "kv": case["q_heads"] // case["kv_heads"]}

    def keep(b: int, h: int, rows: Tensor) -> Tensor:
        head_set = 0 if axis == "shared" else h // heads_a_set[axis]
        return plan_keep(plan, rows, case.k_len, batch=b, head_set=head_set)

    return sampled_attention(case, inputs["q"], lambda b, h: (k[b, :, h], v[b, :, h]), keep)


def _reduced(case: Case) -> Case:
    smaller = reduced_lengths(case, seq=673, columns=32, diagonals=32, sink_tokens=5)
    return smaller if case.window is None else replace(smaller, window=min(case.window, 65))


WORKLOADS = {"block_sparse_attention": Workload(_inputs, _prepare, _whole, _sample, _reduced)}
"""The family's op."""
