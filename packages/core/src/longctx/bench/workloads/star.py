"""star_context_attention (phase 1) and star_query_attention (phase 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Expectation
from longctx.bench.exact import dense_keep
from longctx.bench.prepared import Prepared, forward_call
from longctx.bench.workloads.flash import attention_inputs
from longctx.bench.workloads.workload import (
    Inputs,
    Workload,
    dtype_of,
    generator_on,
    normal,
    reduced_lengths,
    sampled_attention,
    whole_result,
)
from longctx.reference import star as reference

__all__ = ["WORKLOADS"]


def _sizes(case: Case) -> dict[str, int]:
    return {"block_size": case["block_size"], "anchor_size": case["anchor_size"]}


def _context_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    return forward_call(lambda: function(q, k, v, **_sizes(case)), ("out",))


def _context_whole(case: Case, inputs: Inputs) -> list[Expectation]:
    def attend(cast: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v = cast["q"], cast["k"], cast["v"]
        return reference.star_context_attention(q, k, v, **_sizes(case))

    return whole_result(case, inputs, ("out",), attend)


def _context_sample(case: Case, inputs: Inputs) -> list[Expectation]:
    k, v, block = inputs["k"], inputs["v"], case["block_size"]

    def keep(_b: int, _h: int, rows: Tensor) -> Tensor:
        position = rows.unsqueeze(1)
        columns = torch.arange(case.k_len, device=rows.device)
        near = (position // block == columns // block) | (columns < case["anchor_size"])
        return near & (columns <= position)

    return sampled_attention(case, inputs["q"], lambda b, h: (k[b, :, h], v[b, :, h]), keep)


def _query_inputs(case: Case, device: torch.device) -> Inputs:
    generator, dtype = generator_on(device), dtype_of(case)
    batch, dim = case["batch"], case["head_dim"]
    shape = (batch, case["shard_len"], case["kv_heads"], dim)
    return {
        "q": normal(generator, dtype, batch, case.q_len, case["q_heads"], dim),
        "shards": [
            (normal(generator, dtype, *shape), normal(generator, dtype, *shape))
            for _ in range(case["shards"])
        ],
    }


def _query_prepare(case: Case, inputs: Inputs, function: Callable[..., Any]) -> Prepared:
    q, shards = inputs["q"], inputs["shards"]
    return forward_call(lambda: function(q, shards), ("out",))


def _query_whole(case: Case, inputs: Inputs) -> list[Expectation]:
    return whole_result(
        case, inputs, ("out",), lambda cast: reference.star_query_attention(**cast)
    )


def _query_sample(case: Case, inputs: Inputs) -> list[Expectation]:
    shards = inputs["shards"]
    total = case["shards"] * case["shard_len"]

    def keys(b: int, h: int) -> tuple[Tensor, Tensor]:
        k, v = (torch.cat([shard[i][b, :, h] for shard in shards]) for i in range(2))
        return k, v

    def keep(_b: int, _h: int, rows: Tensor) -> Tensor:
        # the queries are the last tokens of the last shard: causal over the concatenation
        return dense_keep(rows, case.q_len, total, causal=True, window=None)

    return sampled_attention(case, inputs["q"], keys, keep)


WORKLOADS = {
    "star_context_attention": Workload(
        attention_inputs,
        _context_prepare,
        _context_whole,
        _context_sample,
        lambda case: reduced_lengths(case, seq=321, block_size=128, anchor_size=128),
    ),
    "star_query_attention": Workload(
        _query_inputs,
        _query_prepare,
        _query_whole,
        _query_sample,
        lambda case: reduced_lengths(case, q_len=9, shards=3, shard_len=129),
    ),
}
"""The family's ops."""
