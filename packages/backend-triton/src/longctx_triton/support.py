"""What this backend declares, op by op; the only place that claims support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from longctx import OpSupport

__all__ = ["SUPPORT", "interpreted"]

_HALF = frozenset({torch.bfloat16, torch.float16})
_FP32 = frozenset({torch.float32})
_FP8 = frozenset({torch.float8_e4m3fn})
_OLDEST = (8, 0)
_PRIORITY = 50


def _table(
    *features: str,
    dtypes: frozenset[torch.dtype] = _HALF,
    head_dims: set[int] | None = None,
    value_dims: set[int] | None = None,
    gradient: bool = False,
    deterministic_gradient: bool = True,
) -> OpSupport:
    return OpSupport(
        dtypes=dtypes,
        head_dims=None if head_dims is None else frozenset(head_dims),
        value_dims=None if value_dims is None else frozenset(value_dims),
        min_arch=_OLDEST,
        features=frozenset(features),
        gradient=gradient,
        deterministic_gradient=deterministic_gradient,
        priority=_PRIORITY,
    )


_EVERY_HEAD = ("per-kv-head", "per-query-head")

SUPPORT: Mapping[str, OpSupport] = {
    "flash_attention": _table(
        "window", "softcap", "sinks", "varlen", "fp8",
        dtypes=_HALF | _FP8, head_dims={64, 128, 256}, gradient=True,
        deterministic_gradient=False,  # Hopper's kernel adds dq by atomics
    ),
    "decode_attention": _table(
        "window", "softcap", "sinks", "paged", "multi-token", "fp8", head_dims={64, 128, 256}
    ),
    "merge_attention": _table(dtypes=_HALF | _FP32),
    "lightning_attention": _table(
        "initial-state", "varlen", head_dims={64, 128}, gradient=True
    ),
    "lightning_decode": _table(dtypes=_HALF | _FP32, head_dims={64, 128}),
    "quantize_fp8": _table("ue8m0", dtypes=_HALF | _FP32),
    "index_scores": _table("fp8", "key-range", dtypes=_HALF | _FP8, gradient=True),
    "index_topk": _table("fp8", "key-range", dtypes=_HALF | _FP8),
    "topk_attention": _table(
        "sinks", "mla", "pages", "per-kv-head", head_dims={64, 128, 576}, value_dims={64, 128, 512}
    ),
    "block_sparse_attention": _table(
        "block-plan", "stripe-plan", "window-plan", *_EVERY_HEAD, head_dims={64, 128}
    ),
    "star_context_attention": _table(head_dims={64, 128}),
    "star_query_attention": _table(head_dims={64, 128}),
    "token_scores": _table(head_dims={64, 128}),
    "select_tokens": _table(dtypes=_FP32),
    "token_sparse_attention": _table(*_EVERY_HEAD, head_dims={64, 128}),
}  # fmt: skip


def interpreted(support: Mapping[str, OpSupport]) -> dict[str, OpSupport]:
    """Return the tables for Triton's interpreter, which runs kernels on the CPU, for tests.

    It multiplies the bits of bf16 and fp8 numbers as if they were integers, so that only fp16
    and fp32 are left, and it is far too slow to be chosen unasked.
    """
    kept = {}
    for op, table in support.items():
        dtypes = table.dtypes - {torch.bfloat16} - _FP8
        kept[op] = replace(
            table,
            dtypes=dtypes,
            devices=frozenset({"cpu"}),
            features=table.features - {"fp8"},
            deterministic_gradient=True,
            priority=-1,
        )
    return {op: table for op, table in kept.items() if table.dtypes}
