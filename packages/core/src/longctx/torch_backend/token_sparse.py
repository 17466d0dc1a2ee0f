"""Token Sparse Attention in plain PyTorch: two-pass scores, a sort, compact attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from longctx._compact import (
    gather_tokens,
    occupied_width,
    restore_rows,
    rows_of_slots,
    valid_slots,
)
from longctx.settings import budget_bytes
from longctx.torch_backend._select import wide
from longctx.torch_backend.flash import flash_forward

__all__ = ["select_tokens_forward", "token_scores_forward", "token_sparse_forward"]

FIXED_POINT = 2.0**52
"""The integer that stands for the whole mass when tails are summed."""


def token_scores_forward(q_recent: Tensor, k: Tensor, *, pool: int, scale: float) -> Tensor:
    """See `longctx.protocols.attention.TokenSparseAttention.token_scores_forward`.

    Two passes over the keys: the softmax statistics of the recent queries, then the shares. The
    query heads of a group are rows of one product, so a key is read once a KV head and pass.
    """
    batch, window, q_heads, _dim = q_recent.shape
    k_len, kv_heads = k.shape[1], k.shape[2]
    group, prefix = q_heads // kv_heads, k_len - window
    dtype = wide(q_recent.dtype)
    shares = torch.empty(batch, q_heads, prefix, dtype=dtype, device=k.device)
    row_bytes = 3 * window * group * dtype.itemsize
    tile = max(1, budget_bytes("LONGCTX_CHUNK_BUDGET_MIB") // row_bytes)
    for b in range(batch):
        for h in range(kv_heads):
            heads = slice(h * group, (h + 1) * group)
            rows = q_recent[b, :, heads].to(dtype).flatten(0, 1) * scale
            norm = torch.full((window * group,), -torch.inf, dtype=dtype, device=k.device)
            for first in range(0, k_len, tile):
                scores = rows @ k[b, first : first + tile, h].to(dtype).t()
                _hide_later_keys(scores.view(window, group, -1), first, prefix)
                norm = torch.logaddexp(norm, scores.logsumexp(1))
            for first in range(0, prefix, tile):
                last = min(first + tile, prefix)
                scores = rows @ k[b, first:last, h].to(dtype).t()
                share = scores.sub_(norm.unsqueeze(1)).exp_()
                shares[b, heads, first:last] = share.view(window, group, -1).mean(0)
    if prefix == 0 or pool == 1:
        return shares
    return avg_pool1d(shares, pool, stride=1, padding=pool // 2)


def _hide_later_keys(scores: Tensor, first: int, prefix: int) -> None:
    """Mask ``[W, group, T]`` scores of keys from ``first`` on; query 0 stands at ``prefix``."""
    window, _group, keys = scores.shape
    if first + keys <= prefix + 1:
        return
    positions = torch.arange(prefix, prefix + window, device=scores.device).view(-1, 1, 1)
    later = torch.arange(first, first + keys, device=scores.device) > positions
    scores.masked_fill_(later, -torch.inf)


def select_tokens_forward(
    scores: Tensor, *, drop_mass: float, min_tokens: int, recent: int
) -> tuple[Tensor, Tensor]:
    """See `longctx.protocols.attention.TokenSparseAttention.select_tokens_forward`.

    The tail mass is summed in fixed point: float sums depend on the order of the additions, which
    a GPU does not fix.
    """
    batch, heads, length = scores.shape
    keep = torch.full((batch,), length, device=scores.device)
    if drop_mass > 0:
        share = scores.double().mean(1)
        total = share.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        share = (share / total * FIXED_POINT).round().to(torch.int64)
        tail = share.sort(1).values.cumsum(1)
        dropped = (tail < drop_mass * FIXED_POINT).sum(1) + 1
        keep = (length - dropped).clamp(min=min(min_tokens, length))
    # a stable sort: among equals the lower token comes first
    order = scores.sort(dim=2, descending=True, stable=True).indices
    ranks = torch.arange(length, device=scores.device)
    member = torch.ones(batch, heads, length + recent, dtype=torch.bool, device=scores.device)
    member[..., :length] = torch.empty_like(scores, dtype=torch.bool).scatter_(
        2, order, (ranks < keep.view(-1, 1, 1)).expand_as(order)
    )
    # each member moves to the place that counts the members before it, the others out of sight
    places = (member.cumsum(2) - 1).where(member, length + recent)
    tokens = torch.arange(length + recent, dtype=torch.int32, device=scores.device)
    indices = torch.full(
        (batch, heads, length + recent + 1), -1, dtype=torch.int32, device=scores.device
    )
    indices.scatter_(2, places, tokens.where(member, -1))
    counts = (keep + recent).to(torch.int32).unsqueeze(1).expand(batch, heads)
    return indices[..., :-1].contiguous(), counts.contiguous()


def token_sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """See `longctx.protocols.attention.TokenSparseAttention.token_sparse_forward`.

    The largest count is read on the host, unless a CUDA graph is being captured.
    """
    batch, q_len, q_heads, dim = q.shape
    k_len, kv_heads, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group, first_position = q_heads // kv_heads, k_len - q_len
    sets = indices.shape[1]
    width, start = occupied_width(indices, counts, first_position)
    slots = valid_slots(indices, counts)[..., :width]
    rows = slots[..., start:] - first_position
    rows = rows.where(rows >= 0, -1)
    out = torch.zeros(batch, q_len, q_heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, q_heads, q_len), -torch.inf, dtype=wide(q.dtype), device=q.device)
    if rows.shape[2] == 0:
        return out, lse
    # a set a query head repeats the keys of its KV head: only in the compact copy
    copies = group if sets == q_heads else 1
    head_bytes = batch * width * (copies + group) * (dim + value_dim) * q.element_size()
    at_once = max(1, budget_bytes("LONGCTX_CHUNK_BUDGET_MIB") // max(1, head_bytes))
    for first in range(0, kv_heads, at_once):
        kv = slice(first, min(first + at_once, kv_heads))
        heads = slice(kv.start * group, kv.stop * group)
        own = slice(kv.start * sets // kv_heads, kv.stop * sets // kv_heads)
        own = own if sets > 1 else slice(None)
        compact_heads = copies * (kv.stop - kv.start)
        part, part_lse = flash_forward(
            gather_tokens(q[:, :, heads], rows[:, own], heads.stop - heads.start),
            gather_tokens(k[:, :, kv], slots[:, own], compact_heads),
            gather_tokens(v[:, :, kv], slots[:, own], compact_heads),
            causal=True,
            window_left=None,
            window_right=None,
            softcap=0.0,
            sinks=None,
            scale=scale,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        inverse = rows_of_slots(rows[:, own], q_len)
        out[:, :, heads] = restore_rows(part, inverse, 0.0)
        compact_lse = part_lse.transpose(1, 2).unsqueeze(3)
        lse[:, heads] = restore_rows(compact_lse, inverse, -torch.inf).squeeze(3).transpose(1, 2)
    return out, lse
