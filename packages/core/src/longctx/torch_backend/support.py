"""What the built-in backend declares, op by op; the only place that claims support."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from longctx.support import OpSupport

__all__ = ["SUPPORT"]

_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_WITH_FP8 = _FLOATS | {torch.float8_e4m3fn}
_AT_MOST_32_BITS = _FLOATS - {torch.float64}
_PRIORITY = 10
"""Below every kernel that was written for a device."""


def _table(
    *features: str, dtypes: frozenset[torch.dtype] = _FLOATS, gradient: bool = False
) -> OpSupport:
    return OpSupport(
        dtypes=dtypes,
        devices=frozenset({"cpu", "cuda"}),
        features=frozenset(features),
        gradient=gradient,
        priority=_PRIORITY,
    )


SUPPORT: Mapping[str, OpSupport] = {
    "flash_attention": _table(
        "window", "softcap", "sinks", "varlen", "fp8", dtypes=_WITH_FP8, gradient=True
    ),
    "decode_attention": _table("window", "softcap", "sinks", "paged", "multi-token", "fp8"),
    "merge_attention": _table(),
    "lightning_attention": _table("initial-state", "varlen", gradient=True),
    "lightning_decode": _table(),
    "quantize_fp8": _table("ue8m0", dtypes=_AT_MOST_32_BITS),
    "index_scores": _table("fp8", "key-range", dtypes=_WITH_FP8, gradient=True),
    "index_topk": _table("fp8", "key-range", dtypes=_WITH_FP8 - {torch.float64}),
    "topk_attention": _table("sinks", "mla", "pages", "per-kv-head"),
    "block_sparse_attention": _table(
        "block-plan", "stripe-plan", "window-plan", "per-kv-head", "per-query-head"
    ),
    "star_context_attention": _table(),
    "star_query_attention": _table(),
    "token_scores": _table(),
    "select_tokens": _table(dtypes=frozenset({torch.float32, torch.float64})),
    "token_sparse_attention": _table("per-kv-head", "per-query-head", "mla"),
}
