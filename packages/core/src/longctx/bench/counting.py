"""What a case must compute and move: the work that its times are divided by.

FLOPs count matrix products only, and only the pairs that the op keeps:

- attention: ``2 (D + Dv)`` a kept (query, key) pair and query head; a causal square keeps
  ``T (T + 1) / 2`` pairs, half of it. The backward pass is 2.5 times the forward (five products
  for two), as in the FlashAttention papers.
- lightning: ``4 D Dv`` a token and head (``k^T v`` into the state, ``q S`` out of it): the least
  that any chunking needs. Backward 2.5 times.
- indexer: ``2 D`` a kept pair and indexer head.
- quantising, merging and selecting count none; bytes bound them.

Bytes are what must be read and written once, whatever an implementation reads again: inputs in
their own data types, of a KV cache the keys and values in use, of a chosen set the keys that
somebody chose; outputs, and the indices that a plan keeps. Workspaces, and statistics that the op
does not return, do not count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from longctx.bench.case import Case
from longctx.bench.plans import block_sparse_plan, sequence_ends, token_set_plan
from longctx.plans import BlockPlan, StripePlan, WindowPlan
from longctx.plans.base import causal_pairs, triangle
from longctx.support import DTYPES

__all__ = ["Work", "kept_pairs", "work_of"]

BACKWARD_FACTOR = 2.5
INT32 = FP32 = 4


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of matrix products, and bytes read and written, of one call.

    Attributes
    ----------
    flops : float
    read, written : float
        Bytes.
    """

    flops: float
    read: float
    written: float

    @property
    def bytes(self) -> float:
        """Bytes moved."""
        return self.read + self.written


def work_of(case: Case) -> Work:
    """Return what one call of a case must compute and move; see the module's conventions."""
    return _WORK[case.op](case)


def kept_pairs(case: Case) -> float:
    """Return the (query, key) pairs that an attention case keeps, over its batch and query heads.

    Exact: the mean over the heads of a random plan is that of the very plan that is run.
    """
    return _pairs_of_one_head(case) * case["batch"] * case["q_heads"]


@functools.lru_cache(maxsize=512)
def _pairs_of_one_head(case: Case) -> float:
    q_len, k_len = case.q_len, case.k_len
    if case.op == "block_sparse_attention":
        plan = block_sparse_plan(case)
        if isinstance(plan, WindowPlan):
            return _window_pairs(q_len, k_len, plan.window, plan.sink_tokens)
        if isinstance(plan, BlockPlan):
            return plan.density(q_len, k_len) * causal_pairs(q_len, k_len)
        return _stripe_pairs(plan, k_len)
    if case.op == "topk_attention":
        return sum(min(case["top_k"], k_len - q_len + i + 1) for i in range(q_len))
    if case.op == "star_context_attention":
        return _star_pairs(k_len, case["block_size"], case["anchor_size"])
    if case.op == "star_query_attention":
        others = (case["shards"] - 1) * case["shard_len"] * q_len
        return others + causal_pairs(q_len, case["shard_len"])
    if case.op == "token_sparse_attention":
        return triangle(int(token_set_plan(case).counts[0, 0]))
    if case.op == "token_scores":
        return causal_pairs(case["window_queries"], k_len)
    ends = sequence_ends(case)
    if ends is None:
        return _dense_pairs(case, q_len, k_len)
    return sum(_dense_pairs(case, length, length) for length in ends.diff().tolist())


def _dense_pairs(case: Case, q_len: int, k_len: int) -> float:
    if case.window is not None:
        return _window_pairs(q_len, k_len, case.window, 0)
    return causal_pairs(q_len, k_len) if case.causal else q_len * k_len


def _window_pairs(q_len: int, k_len: int, window: int, sinks: int) -> float:
    rows = torch.arange(k_len - q_len, k_len)
    near = (rows + 1).clamp(max=window + 1)
    return int((near + (rows - window).clamp(min=0, max=sinks)).sum())


def _stripe_pairs(plan: StripePlan, k_len: int) -> float:
    """Columns and diagonals, less the pairs in which the two cross; the mean over the sets."""
    kept = 0
    sets = plan.vertical.flatten(0, 1), plan.slash.flatten(0, 1)
    for columns, diagonals in zip(*sets, strict=True):
        kept += int((k_len - columns).sum() + (k_len - diagonals).sum())
        kept -= int(torch.searchsorted(diagonals, k_len - columns).sum())
    return kept / sets[0].shape[0]


def _star_pairs(length: int, block: int, anchor: int) -> int:
    full, rest = divmod(length, block)
    own = full * triangle(block) + triangle(rest)
    first = min(length, block)  # the first block sees the anchor in its own triangle
    return own + (length - first) * min(anchor, length)


def _itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def _dense(case: Case, pairs: float, key_rows: float, *, plan_bytes: float = 0) -> Work:
    """Attention whose queries are all read and whose outputs are all written."""
    head_dim, size = case["head_dim"], _itemsize(case.dtype)
    value_dim = case.get("value_dim", head_dim)
    # the values of an absorbed MLA are part of its keys
    kv_row = head_dim if value_dim < head_dim else head_dim + value_dim
    queries = case["batch"] * case.q_len * case["q_heads"]
    kv_bytes = key_rows * kv_row * _itemsize(case.kv_dtype or case.dtype)
    flops = 2 * (head_dim + value_dim) * pairs
    return Work(
        flops, queries * head_dim * size + kv_bytes + plan_bytes, queries * value_dim * size
    )


def _flash(case: Case) -> Work:
    key_rows = case["batch"] * case.k_len * case["kv_heads"]
    ends = sequence_ends(case)
    entries = 0 if ends is None else len(ends)
    forward = _dense(case, kept_pairs(case), key_rows, plan_bytes=entries * INT32)
    if not case.backward:
        return forward
    # reads q, k, v, out, dout and lse; writes dq, dk and dv
    lse = case["batch"] * case.q_len * case["q_heads"] * FP32
    read = forward.read + 2 * forward.written + lse
    return Work(BACKWARD_FACTOR * forward.flops, read, forward.read)


def _decode(case: Case) -> Work:
    batch, k_len, page = case["batch"], case.k_len, case["page_size"]
    entries = batch * (1 + (math.ceil(k_len / page) if page else 0))
    key_rows = batch * k_len * case["kv_heads"]
    scales = 2 * batch * case["kv_heads"] * FP32 if case.kv_dtype == "fp8_e4m3" else 0
    return _dense(case, kept_pairs(case), key_rows, plan_bytes=entries * INT32 + scales)


def _merge(case: Case) -> Work:
    rows = case["batch"] * case.q_len * case["q_heads"]
    row = case["head_dim"] * _itemsize(case.dtype) + FP32
    return Work(0, case["parts"] * rows * row, rows * row)


def _lightning(case: Case) -> Work:
    heads, dim = case["batch"] * case["heads"], case["head_dim"]
    tokens = case.q_len * heads
    row, state = dim * _itemsize(case.dtype), heads * dim * dim * FP32
    flops = 4 * dim * dim * tokens
    decay = case["heads"] * FP32
    if case.backward:
        return Work(BACKWARD_FACTOR * flops, 4 * row * tokens + decay, 3 * row * tokens)
    return Work(flops, 3 * row * tokens + decay, row * tokens + state)


def _lightning_decode(case: Case) -> Work:
    heads, dim = case["batch"] * case["heads"], case["head_dim"]
    row, state = dim * _itemsize(case.dtype), heads * dim * dim * FP32
    decay = case["heads"] * FP32
    return Work(4 * dim * dim * heads, 3 * row * heads + state + decay, row * heads + state)


def _quantize(case: Case) -> Work:
    values = case["rows"] * case["channels"]
    return Work(0, values * _itemsize(case.dtype), values + case["rows"] * FP32)


def _indexer(case: Case) -> Work:
    batch, heads, dim = case["batch"], case["index_heads"], case["index_dim"]
    queries, keys, size = batch * case.q_len, batch * case.k_len, _itemsize(case.dtype)
    pairs = batch * causal_pairs(case.q_len, case.k_len)
    scales = keys * FP32 if case.dtype == "fp8_e4m3" else 0
    read = (queries * heads + keys) * dim * size + queries * heads * FP32 + scales
    columns = case["top_k"] if case.op == "index_topk" else case.k_len
    return Work(2 * dim * heads * pairs, read, queries * columns * FP32)


def _topk(case: Case) -> Work:
    chosen = _pairs_of_one_head(case)
    # a key counts once however many queries chose it
    key_rows = case["batch"] * case["kv_heads"] * min(case.k_len, chosen)
    indices = case["batch"] * case.q_len * case["kv_heads"] * case["top_k"] * INT32
    return _dense(case, kept_pairs(case), key_rows, plan_bytes=indices)


def _block_sparse(case: Case) -> Work:
    plan = block_sparse_plan(case)
    entries = 0
    if isinstance(plan, BlockPlan):
        entries = int(plan.counts.sum()) + plan.counts.numel()
    elif isinstance(plan, StripePlan):
        counts = (plan.vertical_counts, plan.slash_counts)
        entries = sum(int(c.sum()) + c.numel() for c in counts)
    # every key is seen: by its own query
    key_rows = case["batch"] * case.k_len * case["kv_heads"]
    return _dense(case, kept_pairs(case), key_rows, plan_bytes=entries * INT32)


def _star_context(case: Case) -> Work:
    return _dense(case, kept_pairs(case), case["batch"] * case.k_len * case["kv_heads"])


def _star_query(case: Case) -> Work:
    keys = case["batch"] * case["shards"] * case["shard_len"]
    return _dense(case, kept_pairs(case), keys * case["kv_heads"])


def _token_scores(case: Case) -> Work:
    batch, heads, size = case["batch"], case["q_heads"], _itemsize(case.dtype)
    window, k_len, dim = case["window_queries"], case.k_len, case["head_dim"]
    read = batch * (window * heads + k_len * case["kv_heads"]) * dim * size
    written = batch * heads * (k_len - window) * FP32
    return Work(2 * dim * kept_pairs(case), read, written)


def _select_tokens(case: Case) -> Work:
    sets, prefix = case["batch"] * case["heads"], case["prefix_len"]
    return Work(0, sets * prefix * FP32, sets * (prefix + case["recent"] + 1) * INT32)


def _token_sparse(case: Case) -> Work:
    batch, heads, dim = case["batch"], case["q_heads"], case["head_dim"]
    size = _itemsize(case.dtype)
    pairs, plan = kept_pairs(case), token_set_plan(case)
    entries = int(plan.counts.sum())
    key_rows = _chosen_rows(case)
    read = (entries + 2 * key_rows) * dim * size + (entries + plan.counts.numel()) * INT32
    return Work(4 * dim * pairs, read, batch * case.q_len * heads * dim * size)


@functools.lru_cache(maxsize=64)
def _chosen_rows(case: Case) -> int:
    """Rows of the KV heads that any query head of their group chose."""
    plan = token_set_plan(case)
    group = case["q_heads"] // case["kv_heads"]
    member = torch.zeros(case["batch"], case["kv_heads"], case.k_len, dtype=torch.bool)
    member.scatter_(2, plan.indices.view(*member.shape[:2], -1).long(), True)
    assert plan.indices.shape[1] == group * case["kv_heads"]
    return int(member.sum())


_WORK: Mapping[str, Callable[[Case], Work]] = {
    "flash_attention": _flash,
    "decode_attention": _decode,
    "merge_attention": _merge,
    "lightning_attention": _lightning,
    "lightning_decode": _lightning_decode,
    "quantize_fp8": _quantize,
    "index_scores": _indexer,
    "index_topk": _indexer,
    "topk_attention": _topk,
    "block_sparse_attention": _block_sparse,
    "star_context_attention": _star_context,
    "star_query_attention": _star_query,
    "token_scores": _token_scores,
    "select_tokens": _select_tokens,
    "token_sparse_attention": _token_sparse,
}
