"""One piece of decode attention in matrix products, with a mask where rows see different keys."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend_keys", "visible"]


def visible(slots: Tensor, lengths: Tensor, q_len: int, left: int | None) -> Tensor:
    """Return which ``slots [n]`` or ``[B, 1, n]`` each query sees, ``[B, q_len, n]``."""
    positions = lengths.unsqueeze(1) - q_len + torch.arange(q_len, device=lengths.device)
    distance = positions.unsqueeze(2) - slots
    return distance >= 0 if left is None else (distance >= 0) & (distance <= left)


def attend_keys(
    rows: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend ``rows [N, group * q_len, Hkv, D]`` to the keys ``[N, n, Hkv, D]``, all at once.

    Parameters
    ----------
    rows, k, v : Tensor
        Widened here to fp32 (fp64 rows: fp64). What no query of a sequence sees may be NaN.
    seen : Tensor, (N, q_len, n), bool, optional
        None: every row sees every key.

    Returns
    -------
    out : Tensor, (N, group * q_len, Hkv, Dv)
    lse : Tensor, (N, Hkv, group * q_len)
        -inf, and out 0, for a row that sees nothing.
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    values = v.to(dtype)
    # [N, Hkv, R, n]
    scores = torch.matmul(rows.transpose(1, 2).to(dtype) * scale, k.permute(0, 2, 3, 1).to(dtype))
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if seen is not None:
        values = values.masked_fill(~seen.any(1)[:, :, None, None], 0.0)
        hidden = ~seen.repeat(1, scores.shape[2] // seen.shape[1], 1).unsqueeze(1)
        scores = scores.masked_fill_(hidden, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights, values.transpose(1, 2)) / torch.where(total == 0, 1.0, total)
    return out.transpose(1, 2), (top + total.log()).squeeze(-1)
