"""The ``torch.library`` contract of token-sparse attention; see `longctx.ops.token_sparse`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longctx.dispatch import primitive
from longctx.ops._library import define

__all__ = ["attend", "attend_op", "score", "score_op", "select", "select_op"]


def score(q_recent: Tensor, k: Tensor, pool: int, scale: float, backend: str) -> Tensor:
    """Run the scorer of a backend."""
    result: Tensor = primitive(backend, "token_scores_forward")(
        q_recent, k, pool=pool, scale=scale
    )
    return result


def _score_fake(q_recent: Tensor, k: Tensor, *_: Any) -> Tensor:
    batch, window, heads, _head_dim = q_recent.shape
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return torch.empty(batch, heads, k.shape[1] - window, dtype=dtype, device=k.device)


def select(
    scores: Tensor, drop_mass: float, min_tokens: int, recent: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Run the selection of a backend."""
    result: tuple[Tensor, Tensor] = primitive(backend, "select_tokens_forward")(
        scores, drop_mass=drop_mass, min_tokens=min_tokens, recent=recent
    )
    return result


def _select_fake(
    scores: Tensor, drop_mass: float, min_tokens: int, recent: int, *_: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, length = scores.shape
    indices = torch.empty(batch, heads, length + recent, dtype=torch.int32, device=scores.device)
    return indices, torch.empty(batch, heads, dtype=torch.int32, device=scores.device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run the gather-attend-scatter of a backend."""
    result: tuple[Tensor, Tensor] = primitive(backend, "token_sparse_forward")(
        q, k, v, indices, counts, scale=scale
    )
    return result


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _head_dim = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, q_len, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, q_len, dtype=lse_dtype, device=q.device)


score_op = define(
    "token_scores_forward",
    "(Tensor q_recent, Tensor k, SymInt pool, float scale, str backend) -> Tensor",
    score,
    _score_fake,
)
select_op = define(
    "select_tokens_forward",
    "(Tensor scores, float drop_mass, SymInt min_tokens, SymInt recent, str backend) "
    "-> (Tensor, Tensor)",
    select,
    _select_fake,
)
attend_op = define(
    "token_sparse_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, float scale, str backend) "
    "-> (Tensor, Tensor)",
    attend,
    _attend_fake,
)
