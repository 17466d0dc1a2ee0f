"""What a sound kernel of half precision computes, where the oracle in that precision says less."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["CHUNKS", "chunked_lightning"]

CHUNKS = (16, 64)
"""Lengths that kernels cut into: decays between short chunks and sums in long ones cost most."""


def chunked_lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = CHUNKS[-1],
) -> tuple[Tensor, Tensor]:
    """Return ``(out, final_state)`` as a sound kernel of q's precision may compute them.

    arXiv 2401.04658, algorithm 1: sums and the carried state are fp32; the operands of matrix
    products, such as decayed keys or a copy of the state, are rounded to q's dtype, as tensor
    cores take them. This, and not the recurrence in fp32, is what half precision can do.
    """
    if cu_seqlens is not None:
        parts = [
            chunked_lightning(
                q[:, a:b], k[:, a:b], v[:, a:b], log_decay, scale=scale, chunk=chunk,
                initial_state=None if initial_state is None else initial_state[n : n + 1],
            )
            for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))
        ]  # fmt: skip
        return torch.cat([out for out, _ in parts], 1), torch.cat([state for _, state in parts])

    def operand(tensor: Tensor) -> Tensor:
        return tensor.to(q.dtype).float()

    batch, length, heads, dim = q.shape
    state = initial_state
    if state is None:
        state = torch.zeros(batch, heads, dim, v.shape[3], device=q.device)
    rate, outs = log_decay.float().view(-1, 1, 1), [v[:, :0]]
    for start in range(0, length, chunk):
        qc, kc, vc = (t[:, start : start + chunk].transpose(1, 2).float() for t in (q, k, v))
        rows = torch.arange(qc.shape[2], device=q.device, dtype=torch.float32).unsqueeze(1)
        distance = rows - rows.mT
        pairs = (rate * distance).masked_fill(distance < 0, -torch.inf).exp()
        out = operand((qc @ kc.mT) * pairs) @ vc
        out = out + (qc @ operand(state)) * (rate * (rows + 1)).exp()
        outs.append((scale * out).transpose(1, 2).to(q.dtype))
        decayed = operand(kc * (rate * (len(rows) - 1 - rows)).exp())
        state = state * (rate * len(rows)).exp() + decayed.mT @ vc
    return torch.cat(outs, 1), state
