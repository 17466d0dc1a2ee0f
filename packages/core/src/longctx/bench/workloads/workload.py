"""What a family says about its ops, and what families share in saying it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Expectation, Outputs, rounding_of
from longctx.bench.exact import attention_rows, sampled
from longctx.bench.prepared import Prepared
from longctx.support import DTYPES

__all__ = [
    "Inputs",
    "Workload",
    "attention_output",
    "dtype_of",
    "generator_on",
    "normal",
    "reduced_lengths",
    "sampled_attention",
    "whole_result",
]

Inputs = dict[str, Any]
"""Tensors and plans of a call, by the names of the public function's arguments."""

EXACT, LOW = torch.float64, torch.float32

NOISE_ELEMENTS = 2**28
"""Random numbers that are held beside an fp8 tensor while it is filled."""


@dataclass(frozen=True)
class Workload:
    """How to make, call and check one op.

    Attributes
    ----------
    inputs : callable
        ``(case, device) -> Inputs``: random, with a fixed seed.
    prepare : callable
        ``(case, inputs, function) -> Prepared``: the call of the public function.
    whole : callable
        ``(case, inputs) -> expectations`` of the whole result, by `longctx.reference`; for small
        shapes.
    sample : callable
        ``(case, inputs) -> expectations`` of parts of the result, at any length.
    reduced : callable
        ``case -> Case``: the same op and features at a small, odd size.
    """

    inputs: Callable[[Case, torch.device], Inputs]
    prepare: Callable[[Case, Inputs, Callable[..., Any]], Prepared]
    whole: Callable[[Case, Inputs], list[Expectation]]
    sample: Callable[[Case, Inputs], list[Expectation]]
    reduced: Callable[[Case], Case]


def dtype_of(case: Case) -> torch.dtype:
    """Return the data type of a case's inputs."""
    return DTYPES[case.dtype]


def attention_output(dtype: torch.dtype) -> torch.dtype:
    """Return the data type of attention's result on inputs of one: bf16 for fp8."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def generator_on(device: torch.device, seed: int = 1234) -> torch.Generator:
    """Return a generator with a fixed seed."""
    return torch.Generator(device=device).manual_seed(seed)


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return standard normal numbers in a data type, fp8 included, without a larger copy."""
    device = generator.device
    if dtype.itemsize > 1:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)
    out = torch.empty(shape, dtype=dtype, device=device)
    for part in torch.split(out.view(-1), NOISE_ELEMENTS):  # a cache may fill most of the memory
        noise = torch.randn(part.shape, dtype=torch.bfloat16, device=device, generator=generator)
        part.copy_(noise)
    return out


def reduced_lengths(case: Case, **sizes: int) -> Case:
    """Return a case with at most these sizes; a window shrinks with them."""
    smaller = {axis: min(size, case.get(axis, size)) for axis, size in sizes.items()}
    smaller["batch"] = min(2, case.get("batch", 1))
    return case.resized(**smaller)


def whole_result(
    case: Case,
    inputs: Inputs,
    names: Sequence[str],
    reference: Callable[[Inputs], Sequence[Tensor]],
    *,
    dtype: torch.dtype | None = None,
) -> list[Expectation]:
    """Return one expectation a result of the oracle, run in fp64 and in fp32.

    Parameters
    ----------
    names : sequence of str
        Names of the reference's results, in order.
    reference : callable
        Takes inputs whose floating tensors were cast.
    dtype : torch.dtype, optional
        Of the results; default that of the case, and fp32 where that is fp8.
    """
    dtype = dtype_of(case) if dtype is None else dtype
    exact = reference(_cast(inputs, EXACT))
    low = reference(_cast(inputs, LOW))
    return [
        Expectation(
            name,
            operator.itemgetter(name),
            true,
            rounded.to(dtype) if dtype.itemsize > 1 else rounded,
            rounding_of(dtype, backward=case.backward),
        )
        for name, true, rounded in zip(names, exact, low, strict=False)
    ]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return nested inputs with floating tensors cast; fp8 values are exact in any precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def sampled_attention(
    case: Case,
    q: Tensor,
    keys: Callable[[int, int], tuple[Tensor, Tensor]],
    keep: Callable[[int, int, Tensor], Tensor],
    *,
    scale: float | None = None,
) -> list[Expectation]:
    """Return expectations of a few query rows of a few heads, computed exactly.

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
    keys : callable
        ``(batch, kv_head) -> (k [k_len, head_dim], v [k_len, value_dim])``.
    keep : callable
        ``(batch, q_head, rows) -> bool [rows, k_len]``.
    scale : float, optional
        Default ``head_dim ** -0.5``.
    """
    batch, q_len, heads, head_dim = q.shape
    group = heads // case["kv_heads"]
    scale = head_dim**-0.5 if scale is None else scale
    rows = torch.tensor(sampled(q_len, 8), device=q.device)
    dtype = attention_output(q.dtype)
    found = []
    for b in sampled(batch, 2):
        for h in sampled(heads, 3, seed=b):
            k, v = keys(b, h // group)
            mask = keep(b, h, rows)
            exact, low = (
                attention_rows(q[b, rows, h], k, v, mask, scale, wide) for wide in (EXACT, LOW)
            )

            def pick(outputs: Outputs, b: int = b, h: int = h) -> Tensor:
                return outputs["out"][b, rows, h]

            what = f"out of batch {b}, head {h}"
            found.append(Expectation(what, pick, exact, low.to(dtype), rounding_of(dtype)))
    return found
