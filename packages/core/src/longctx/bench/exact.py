"""Exact rows of long results: a few queries against all their keys, one head at a time.

Each function takes the precision to compute in. The masks here are built a few rows at a time, for
the square masks of `longctx.plans` do not fit at the lengths that are timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longctx.plans import BlockPlan, StripePlan, TokenSetPlan, WindowPlan

__all__ = [
    "attention_gradients",
    "attention_rows",
    "dense_keep",
    "lightning_gradients",
    "lightning_rows",
    "lightning_state",
    "plan_keep",
    "sampled",
]

CHUNK = 1024
"""Rows of scores that are held at a time."""


def sampled(size: int, count: int, seed: int = 0) -> list[int]:
    """Return the first, the last and random other numbers below ``size``, ascending."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, size, (max(count - 2, 0),), generator=generator).tolist()
    return sorted({0, size - 1, *inner})


def dense_keep(
    rows: Tensor, q_len: int, k_len: int, *, causal: bool, window: int | None
) -> Tensor:
    """Return what query rows see, bool ``[rows, k_len]``, aligned bottom-right."""
    position = (rows + (k_len - q_len)).unsqueeze(1)
    columns = torch.arange(k_len, device=rows.device)
    keep = torch.ones(len(rows), k_len, dtype=torch.bool, device=rows.device)
    if causal or window is not None:
        keep &= columns <= position
    if window is not None:
        keep &= position - columns <= window
    return keep


def plan_keep(
    plan: BlockPlan | StripePlan | WindowPlan | TokenSetPlan,
    rows: Tensor,
    k_len: int,
    *,
    batch: int,
    head_set: int,
) -> Tensor:
    """Return what query rows of a whole prefill keep, bool ``[rows, k_len]``.

    Parameters
    ----------
    plan : BlockPlan, StripePlan, WindowPlan or TokenSetPlan
    rows : Tensor, (rows,)
        Query positions.
    k_len : int
    batch, head_set : int
        Batch entry, and position on the plan's head axis.
    """
    position = rows.unsqueeze(1)
    columns = torch.arange(k_len, device=rows.device)
    seen = columns <= position
    if isinstance(plan, WindowPlan):
        return seen & ((columns < plan.sink_tokens) | (position - columns <= plan.window))
    if isinstance(plan, StripePlan):
        on_column = _members(plan.vertical[batch, head_set], k_len)
        on_diagonal = _members(plan.slash[batch, head_set], k_len)
        return seen & (on_column | on_diagonal[(position - columns).clamp(min=0)])
    if isinstance(plan, TokenSetPlan):
        chosen = _members(plan.indices[batch, head_set], k_len)
        return seen & chosen & chosen[position]
    kept = plan.indices[batch, head_set, rows // plan.block_q]
    blocks = torch.stack([_members(row, -(-k_len // plan.block_k)) for row in kept])
    return seen & blocks[:, columns // plan.block_k]


def _members(entries: Tensor, size: int) -> Tensor:
    """Return membership of entries that are at least 0, bool ``[size]``."""
    found = torch.zeros(size, dtype=torch.bool, device=entries.device)
    found[entries[entries >= 0].long()] = True
    return found


def attention_rows(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """Return attention of some queries of one head, ``[rows, value_dim]``.

    ``q`` is ``[rows, head_dim]``, ``k`` ``[k_len, head_dim]``, ``v`` ``[k_len, value_dim]``,
    ``keep`` ``[rows, k_len]``.
    """
    scores = (q.to(dtype) @ k.to(dtype).T) * scale
    weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ v.to(dtype)


def attention_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    keep: Callable[[Tensor], Tensor],
    scale: float,
    dtype: torch.dtype,
    *,
    rounded: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dq, dk, dv)`` of the query heads that share one KV head.

    ``q`` and ``dout`` are ``[q_len, group, dim]``, ``k`` and ``v`` ``[k_len, dim]``; ``keep`` maps
    row numbers to their mask. Equations of arXiv 2307.08691, section 2.3. With ``rounded``, the
    result of the forward pass and every matrix that is multiplied again have been in that type,
    as in every kernel: a row with few keys, whose terms cancel, is nothing but their error.
    """

    def through(t: Tensor) -> Tensor:
        return t if rounded is None else t.to(rounded).to(dtype)

    q, k, v, dout = (t.to(dtype) for t in (q, k, v, dout))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in torch.split(torch.arange(q.shape[0], device=q.device), CHUNK):
        hidden = ~keep(rows)
        for head in range(q.shape[1]):
            query, grad = q[rows, head], dout[rows, head]
            scores = ((query @ k.T) * scale).masked_fill_(hidden, -torch.inf)
            weights = scores.softmax(-1).nan_to_num_(0.0)
            dweights = grad @ v.T
            # the forward pass rounds weights whose largest is 1, and divides by their sum after
            top = weights.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny)
            out = through((through(weights / top) @ v) * top)
            delta = (grad * out).sum(-1, keepdim=True)
            dscores = through(weights * (dweights - delta)) * scale
            dq[rows, head] = dscores @ k
            dk += dscores.T @ query
            dv += through(weights).T @ grad
    return dq, dk, dv


def _decays(rows: Tensor, length: int, log_decay: Tensor, *, ahead: bool) -> Tensor:
    """Return the decay between rows and all tokens, 0 on the other side, ``[rows, length]``."""
    distance = rows.unsqueeze(1) - torch.arange(length, device=rows.device)
    distance = -distance if ahead else distance
    decay = torch.exp(log_decay * distance.clamp(min=0))
    return decay.masked_fill(distance < 0, 0.0)


def lightning_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, log_decay: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``o_t = sum_{s<=t} decay^(t-s) (q_t k_s) v_s`` of one head, ``[rows, value_dim]``."""
    weights = _decays(rows, k.shape[0], log_decay.to(dtype), ahead=False)
    return ((q[rows].to(dtype) @ k.to(dtype).T) * weights) @ v.to(dtype)


def lightning_state(k: Tensor, v: Tensor, log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the state after the last token of one head, ``[head_dim, value_dim]``."""
    last = torch.tensor([k.shape[0] - 1], device=k.device)
    weights = _decays(last, k.shape[0], log_decay.to(dtype), ahead=False)
    return (k.to(dtype).T * weights) @ v.to(dtype)


def lightning_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    rows: Tensor,
    log_decay: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dq, dk, dv)`` at some tokens of one head, each ``[rows, dim]``."""
    q, k, v, dout = (t.to(dtype) for t in (q, k, v, dout))
    behind = _decays(rows, k.shape[0], log_decay.to(dtype), ahead=False)
    ahead = _decays(rows, k.shape[0], log_decay.to(dtype), ahead=True)
    dq = ((dout[rows] @ v.T) * behind) @ k
    dk = ((v[rows] @ dout.T) * ahead) @ q
    dv = ((k[rows] @ q.T) * ahead) @ dout
    return dq, dk, dv
