"""lightning_attention, forward and backward; lightning_decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Expectation, Outputs, rounding_of
from longctx.bench.exact import lightning_gradients, lightning_rows, lightning_state, sampled
from longctx.bench.prepared import Prepared, backward_call, forward_call
from longctx.bench.workloads.workload import (
    EXACT,
    LOW,
    Inputs,
    Workload,
    dtype_of,
    generator_on,
    normal,
    reduced_lengths,
    whole_result,
)
from longctx.reference import lightning as reference

__all__ = ["WORKLOADS"]


def _log_decay(heads: int, device: torch.device) -> Tensor:
    """Return minus the ALiBi slopes, as lightning attention takes them: -2^(-8 (h + 1) / H)."""
    steps = torch.arange(1, heads + 1, device=device, dtype=torch.float32)
    return -torch.exp2(-8 * steps / heads)


def _inputs(case: Case, device: torch.device) -> Inputs:
    generator, dtype = generator_on(device), dtype_of(case)
    shape = (case["batch"], case.q_len, case["heads"], case["head_dim"])
    names = ("q", "k", "v", "dout") if case.backward else ("q", "k", "v")
    made: Inputs = {name: normal(generator, dtype, *shape) for name in names}
    return made | {"log_decay": _log_decay(case["heads"], device)}


def _prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
    if case.backward:

        def forward(*tensors: Tensor) -> Tensor:
            out: Tensor = function(*tensors, log_decay).out
            return out

        return backward_call(forward, (q, k, v), inputs["dout"])
    return forward_call(lambda: function(q, k, v, log_decay), ("out", "final_state"))


def _whole(case: Case, inputs: Inputs) -> list[Expectation]:
    if case.backward:
        return whole_result(case, inputs, ("dq", "dk", "dv"), _gradients)
    names = ("out", "final_state")
    return whole_result(case, inputs, names, lambda cast: reference.lightning_attention(**cast))


def _gradients(cast: Inputs) -> tuple[Tensor, ...]:
    q, k, v = (cast[name].detach().requires_grad_() for name in "qkv")
    with torch.enable_grad():
        out, _ = reference.lightning_attention(q, k, v, cast["log_decay"])
        return torch.autograd.grad(out, (q, k, v), cast["dout"])


def _sample(case: Case, inputs: Inputs) -> list[Expectation]:
    """Return a few tokens of the first and the last head, and those heads' states."""
    dtype, b = dtype_of(case), case["batch"] - 1
    rows = torch.tensor(sampled(case.q_len, 8), device=inputs["q"].device)
    found = []
    for h in sampled(case["heads"], 2):
        q, k, v = (inputs[name][b, :, h] for name in "qkv")
        decay = inputs["log_decay"][h]
        if case.backward:
            parts = (q, k, v, inputs["dout"][b, :, h], rows, decay)
            both = zip(
                *(lightning_gradients(*parts, precision) for precision in (EXACT, LOW)),
                strict=True,
            )
            for name, (exact, low) in zip(("dq", "dk", "dv"), both, strict=True):
                found.append(_expect(name, b, h, rows, exact, low, dtype))
            continue
        exact, low = (lightning_rows(q, k, v, rows, decay, p) for p in (EXACT, LOW))
        found.append(_expect("out", b, h, rows, exact, low, dtype))
        exact, low = (lightning_state(k, v, decay, p) for p in (EXACT, LOW))
        found.append(_expect("final_state", b, h, None, exact, low, dtype))
    return found


def _expect(
    name: str,
    b: int,
    h: int,
    rows: Tensor | None,
    exact: Tensor,
    low: Tensor,
    dtype: torch.dtype,
) -> Expectation:
    def pick(outputs: Outputs) -> Tensor:
        return outputs[name][b, h] if rows is None else outputs[name][b, rows, h]

    what = f"{name} of batch {b}, head {h}"
    return Expectation(what, pick, exact, low.to(dtype), rounding_of(dtype))


def _reduced(case: Case) -> Case:
    # the oracle is a loop over tokens that keeps every state for its gradient
    return reduced_lengths(case, seq=161, heads=4)


def _decode_inputs(case: Case, device: torch.device) -> Inputs:
    generator, dim = generator_on(device), case["head_dim"]
    shape = (case["batch"], 1, case["heads"], dim)
    made: Inputs = {name: normal(generator, dtype_of(case), *shape) for name in "qkv"}
    state = normal(generator, torch.float32, case["batch"], case["heads"], dim, dim)
    return made | {"state": state, "log_decay": _log_decay(case["heads"], device)}


def _decode_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
    state = inputs["state"].clone()  # written in place: the first call starts from the inputs

    def outputs(out: Tensor) -> Outputs:
        return {"out": out, "state": state.clone()}

    return Prepared(lambda: function(q, k, v, state, log_decay), outputs)


def _decode_whole(case: Case, inputs: Inputs) -> list[Expectation]:
    def step(cast: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v = (cast[name][:, 0] for name in "qkv")
        out, state = reference.lightning_decode(q, k, v, cast["state"], cast["log_decay"])
        return out.unsqueeze(1), state

    return whole_result(case, inputs, ("out", "state"), step)


def _decode_reduced(case: Case) -> Case:
    return reduced_lengths(case, batch=2)


WORKLOADS = {
    "lightning_attention": Workload(_inputs, _prepare, _whole, _sample, _reduced),
    # one token is small enough for the oracle at any batch
    "lightning_decode": Workload(
        _decode_inputs, _decode_prepare, _decode_whole, _decode_whole, _decode_reduced
    ),
}
"""The family's ops."""
