"""decode_attention over contiguous, paged and fp8 caches; merge_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Expectation, Outputs, rounding_of
from longctx.bench.exact import dense_keep
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
from longctx.reference import decode as reference
from longctx.support import DTYPES

__all__ = ["WORKLOADS"]


def _inputs(case: Case, device: torch.device) -> Inputs:
    """Return caches in which every sequence has ``k_len`` keys; pages lie in random order."""
    generator, batch = generator_on(device), case["batch"]
    kv_heads, dim, page = case["kv_heads"], case["head_dim"], case["page_size"]
    kv_dtype = DTYPES[case.kv_dtype or case.dtype]
    pages = -(-case.k_len // page) if page else 0
    shape = (batch * pages, page, kv_heads, dim) if page else (batch, case.k_len, kv_heads, dim)
    made: Inputs = {
        "q": normal(generator, dtype_of(case), batch, case.q_len, case["q_heads"], dim),
        "k_cache": normal(generator, kv_dtype, *shape),
        "v_cache": normal(generator, kv_dtype, *shape),
        "cache_seqlens": torch.full((batch,), case.k_len, dtype=torch.int32, device=device),
        "page_table": None,
        "k_scale": None,
        "v_scale": None,
    }
    if page:
        order = torch.randperm(batch * pages, device=device, generator=generator)
        made["page_table"] = order.to(torch.int32).view(batch, pages)
    if kv_dtype.itemsize == 1:
        for name in ("k_scale", "v_scale"):
            factors = torch.rand(batch, kv_heads, device=device, generator=generator)
            made[name] = 0.5 + factors
    return made


def _prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    options = dict(inputs)
    tensors = [options.pop(name) for name in ("q", "k_cache", "v_cache")]
    options = {name: value for name, value in options.items() if value is not None}
    return forward_call(lambda: function(*tensors, **options), ("out",))


def _whole(case: Case, inputs: Inputs) -> list[Expectation]:
    return whole_result(case, inputs, ("out",), lambda cast: reference.decode_attention(**cast))


def _sample(case: Case, inputs: Inputs) -> list[Expectation]:
    table = inputs["page_table"]

    def held(name: str, b: int, head: int) -> Tensor:
        cache: Tensor = inputs[f"{name}_cache"][:, :, head]
        if table is None:
            rows = cache[b]
        else:  # bytes are gathered where the type has no gather of its own
            pages = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
            rows = pages[table[b].long()].flatten(0, 1)[: case.k_len].view(cache.dtype)
        factors = inputs[f"{name}_scale"]
        return rows if factors is None else rows.to(EXACT) * factors[b, head].to(EXACT)

    def keep(_b: int, _h: int, rows: Tensor) -> Tensor:
        return dense_keep(rows, case.q_len, case.k_len, causal=True, window=None)

    return sampled_attention(
        case, inputs["q"], lambda b, h: (held("k", b, h), held("v", b, h)), keep
    )


def _reduced(case: Case) -> Case:
    return reduced_lengths(case, k_len=333)


def _merge_inputs(case: Case, device: torch.device) -> Inputs:
    generator = generator_on(device)
    rows = (case["parts"], case["batch"])
    seq, heads = case["seq"], case["q_heads"]
    return {
        "outs": normal(generator, dtype_of(case), *rows, seq, heads, case["head_dim"]),
        "lses": normal(generator, torch.float32, *rows, heads, seq),
    }


def _merge_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    outs, lses = inputs["outs"], inputs["lses"]
    return forward_call(lambda: function(outs, lses), ("out", "lse"))


def _merge_whole(case: Case, inputs: Inputs) -> list[Expectation]:
    names = ("out", "lse")
    return whole_result(case, inputs, names, lambda cast: reference.merge_attention(**cast))


def _merge_sample(case: Case, inputs: Inputs) -> list[Expectation]:
    """Return the last rows of the last batch entry."""
    rows = slice(-8, None)
    outs, lses = inputs["outs"][:, -1:, rows], inputs["lses"][:, -1:, :, rows]
    (exact, _), (low, _) = (
        reference.merge_attention(outs.to(dtype), lses.to(dtype)) for dtype in (EXACT, LOW)
    )

    def pick(outputs: Outputs) -> Tensor:
        return outputs["out"][-1:, rows]

    dtype = dtype_of(case)
    return [Expectation("last rows of out", pick, exact, low.to(dtype), rounding_of(dtype))]


def _merge_reduced(case: Case) -> Case:
    return reduced_lengths(case, seq=33)


WORKLOADS = {
    "decode_attention": Workload(_inputs, _prepare, _whole, _sample, _reduced),
    "merge_attention": Workload(
        _merge_inputs, _merge_prepare, _merge_whole, _merge_sample, _merge_reduced
    ),
}
"""The family's ops."""
