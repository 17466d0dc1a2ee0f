"""Star Attention in plain PyTorch: dense causal pieces a block, then exact sums over shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.torch_backend._gathered import RunningSoftmax, budget_elements, wide_dtype
from longctx.torch_backend.flash import flash_forward

__all__ = ["star_context_forward", "star_query_forward"]


def star_context_forward(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, anchor_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of phase 1, block by block.

    With the anchor's keys put in front of the block's, the mask is plain bottom-right causality:
    one dense call a block.
    """
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide_dtype(q))
    first, k_len = k.shape[1] - q.shape[1], k.shape[1]
    for start in range(first - first % block_size, k_len, block_size):
        stop = min(start + block_size, k_len)
        rows = slice(max(start, first) - first, stop - first)
        keys, values = k[:, start:stop], v[:, start:stop]
        if start and anchor_size:
            keys, values = (
                torch.cat([t[:, :anchor_size], part], 1) for t, part in ((k, keys), (v, values))
            )
        out[:, rows], lse[:, :, rows] = flash_forward(
            q[:, rows],
            keys,
            values,
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
    return out, lse


def star_query_forward(
    q: Tensor,
    shard_keys: Sequence[Tensor],
    shard_values: Sequence[Tensor],
    *,
    query_shard: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)`` of phase 2: one running softmax over the pieces of all shards.

    The partial sums stay in fp32 until the last shard, so the split of the keys costs no accuracy.
    """
    batch, q_len, q_heads, _ = q.shape
    kv_heads, value_dim = shard_keys[0].shape[2], shard_values[0].shape[3]
    wide = wide_dtype(q)
    # [B, Hkv, group * Sq, D]
    grouped = (q.transpose(1, 2).to(wide) * scale).reshape(
        batch, kv_heads, q_heads // kv_heads * q_len, q.shape[3]
    )
    softmax = RunningSoftmax(grouped.shape[:3], value_dim, grouped)
    per_key = batch * (q_heads * q_len + kv_heads * (q.shape[3] + value_dim))
    step = max(1, budget_elements(q) // max(per_key, 1))
    for n, (keys, values) in enumerate(zip(shard_keys, shard_values, strict=True)):
        behind = keys.shape[1] - q_len
        for start in range(0, keys.shape[1], step):
            piece = slice(start, start + step)
            k, v = (t[:, piece].transpose(1, 2).to(wide) for t in (keys, values))
            scores = grouped @ k.mT
            if n == query_shard and start + k.shape[2] > behind + 1:
                rows = torch.arange(behind, behind + q_len, device=q.device).unsqueeze(1)
                columns = torch.arange(start, start + k.shape[2], device=q.device)
                torch.unflatten(scores, 2, (-1, q_len)).masked_fill_(columns > rows, -torch.inf)
            softmax.add(scores, v)
    out, lse = (t.reshape(batch, q_heads, q_len, *t.shape[3:]) for t in softmax.result())
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse
