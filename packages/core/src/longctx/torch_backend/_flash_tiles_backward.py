"""Gradient of exact attention in tiles: scores are recomputed from the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.torch_backend._flash_tiles import Band, capped, grouped_rows, hide, keys_of, steps

__all__ = ["sink_gradient", "tiled_backward"]


def tiled_backward(
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    *,
    band: Band,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dq, dk, dv)``, contiguous, in the inputs' dtype.

    ``P = exp(S - lse)``, ``dS = P (dout v^T - delta)`` with ``delta = dout . out - dlse``
    ``[B, Hq, Sq]`` (FlashAttention-2, algorithm 2, with the gradient that comes through lse),
    times ``1 - (S / c)^2`` under a softcap; sums over a group's query heads come from folding the
    group into the rows. Everything accumulates in fp32 (fp64 for fp64 inputs).
    """
    kv_heads = k.shape[2]
    dtype = lse.dtype
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    # head-major sums, so that a tile's part is one batched product into a view
    dk, dv = (
        torch.zeros(t.shape[0], kv_heads, t.shape[1], t.shape[3], dtype=dtype, device=t.device)
        for t in (k, v)
    )
    dq5 = torch.unflatten(dq, 2, (kv_heads, -1))
    for step in steps(q, k, band):
        rows = grouped_rows(q, step, kv_heads, dtype) * scale
        douts = grouped_rows(dout, step, kv_heads, dtype)
        row_lse, row_delta = (
            torch.unflatten(t[step.batch, :, step.rows], 0, (kv_heads, -1))[step.heads]
            .flatten(1, 2)
            .unsqueeze(-1)
            for t in (lse, delta)
        )
        drows = torch.zeros_like(rows)
        for tile in step.tiles:
            begin, end, _ = tile
            keys = keys_of(k, step, begin, end, dtype)
            scores = capped(torch.bmm(rows, keys.transpose(1, 2)), softcap)
            weights = torch.exp(scores - row_lse)
            hide(weights, step, tile, band, 0.0)  # inf too, in rows that see nothing
            dvalues = torch.bmm(douts, keys_of(v, step, begin, end, dtype).transpose(1, 2))
            dscores = dvalues.sub_(row_delta).mul_(weights)
            if softcap:
                dscores.mul_(scores.div_(softcap).square_().neg_().add_(1.0))
            drows.baddbmm_(dscores, keys)
            dk[step.batch, step.heads, begin:end].baddbmm_(dscores.transpose(1, 2), rows)
            dv[step.batch, step.heads, begin:end].baddbmm_(weights.transpose(1, 2), douts)
        count = step.rows.stop - step.rows.start
        drows = torch.unflatten(drows.mul_(scale), 1, (-1, count)).permute(2, 0, 1, 3)
        dq5[step.batch, step.rows, step.heads] = drows.to(q.dtype)
    dk, dv = (t.transpose(1, 2).contiguous().to(k.dtype) for t in (dk, dv))
    return dq, dk, dv


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return ``-sum exp(sink - lse) delta`` over batch and rows: a sink is a key with value 0."""
    logits = sinks.to(lse.dtype).view(1, -1, 1)
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    return -(torch.exp(logits - lse) * delta).sum((0, 2)).to(sinks.dtype)
