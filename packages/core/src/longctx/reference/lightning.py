"""Oracle of lightning attention: the recurrence itself, one token at a time.

``S_t = exp(log_decay) S_{t-1} + k_t^T v_t`` and ``o_t = scale q_t S_t``, a head at a time, with
the state as of after token ``t``; Qin et al., Lightning Attention-2, arXiv 2401.04658, equations
3 to 5.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["lightning_attention", "lightning_decode"]


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, final_state)`` of `longctx.lightning_attention`, in the inputs' precision."""
    if cu_seqlens is not None:
        parts = [
            lightning_attention(
                q[:, start:stop],
                k[:, start:stop],
                v[:, start:stop],
                log_decay,
                scale=scale,
                initial_state=None if initial_state is None else initial_state[n : n + 1],
            )
            for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        outs, states = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(states)
    batch, length, heads, head_dim = q.shape
    state = q.new_zeros(batch, heads, head_dim, v.shape[3])
    if initial_state is not None:
        state = state + initial_state
    rows = []
    for t in range(length):
        row, state = lightning_decode(q[:, t], k[:, t], v[:, t], state, log_decay, scale=scale)
        rows.append(row)
    return torch.stack(rows, 1) if rows else torch.zeros_like(v), state


def lightning_decode(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return ``(out [B, H, Dv], new state)`` of one token ``[B, H, D]``; ``state`` is kept."""
    decay = torch.exp(log_decay.to(state.dtype)).view(-1, 1, 1)
    state = decay * state + k.unsqueeze(-1) * v.unsqueeze(-2)
    return scale * (q.unsqueeze(-2) @ state).squeeze(-2), state
