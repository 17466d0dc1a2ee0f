"""The catalogue of the protocol: families, public ops, their primitives, optional features."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FAMILIES", "FEATURES", "GRADIENT_PRIMITIVES", "OPS"]

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "flash": ("flash_attention",),
    "decode": ("decode_attention", "merge_attention"),
    "lightning": ("lightning_attention", "lightning_decode"),
    "dsa": ("quantize_fp8", "index_scores", "index_topk", "topk_attention"),
    "block_sparse": ("block_sparse_attention",),
    "star": ("star_context_attention", "star_query_attention"),
    "token_sparse": ("token_scores", "select_tokens", "token_sparse_attention"),
}
"""Public ops by family."""

OPS: Mapping[str, tuple[str, ...]] = {
    "flash_attention": ("flash_forward",),
    "decode_attention": ("decode_forward",),
    "merge_attention": ("merge_forward",),
    "lightning_attention": ("lightning_forward",),
    "lightning_decode": ("lightning_decode_forward",),
    "quantize_fp8": ("quantize_forward",),
    "index_scores": ("index_scores_forward",),
    "index_topk": ("index_topk_forward",),
    "topk_attention": ("topk_attention_forward",),
    "block_sparse_attention": (
        "block_sparse_forward",
        "stripe_sparse_forward",
        "window_sparse_forward",
    ),
    "star_context_attention": ("star_context_forward",),
    "star_query_attention": ("star_query_forward",),
    "token_scores": ("token_scores_forward",),
    "select_tokens": ("select_tokens_forward",),
    "token_sparse_attention": ("token_sparse_forward",),
}
"""Primitives behind each public op; a backend that declares an op has at least one of them."""

GRADIENT_PRIMITIVES: Mapping[str, str] = {
    "flash_attention": "flash_backward",
    "lightning_attention": "lightning_backward",
    "index_scores": "index_scores_backward",
}
"""The backward primitive of each op that has a gradient."""

FEATURES: Mapping[str, str] = {
    "window": "window=(left, right) with a finite side",
    "softcap": "softcap > 0",
    "sinks": "learned sink logits",
    "varlen": "packed sequences through cu_seqlens",
    "fp8": "fp8 e4m3 inputs with descales",
    "paged": "a paged KV cache",
    "multi-token": "more than one query token in decode",
    "initial-state": "a lightning state carried in",
    "ue8m0": "power-of-two fp8 scales",
    "key-range": "key_start / key_end bounds",
    "pages": "top-k indices that name pages",
    "per-kv-head": "a plan with one set a KV head",
    "per-query-head": "a plan with one set a query head",
    "block-plan": "a BlockPlan",
    "stripe-plan": "a StripePlan",
    "window-plan": "a WindowPlan",
    "mla": "values that are narrower than the keys",
}
"""Optional features by name, as they stand in `OpSupport.features` and `OpRequest.features`."""
