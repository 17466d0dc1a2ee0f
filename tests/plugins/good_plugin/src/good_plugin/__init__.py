"""A third-party backend with one op: causal or full attention with all scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from longctx import PROTOCOL_VERSION, BackendBase, BackendInfo, OpSupport, hookimpl

SUPPORT = {
    "flash_attention": OpSupport(
        dtypes=frozenset({torch.float32}),
        head_dims=frozenset({32, 64}),
        devices=frozenset({"cpu", "cuda"}),
        priority=1,
    )
}


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, **unsupported: object
) -> tuple[Tensor, Tensor]:
    """Return ``(out, lse)``; dispatch keeps calls with other features away."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = scale * q @ k.mT
    if causal:
        q_len, k_len = scores.shape[-2:]
        future = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).triu(
            k_len - q_len + 1
        )
        scores = scores.masked_fill(future, -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)) @ v
    return out.transpose(1, 2).contiguous(), lse


@hookimpl
def longctx_backends() -> list[BackendInfo]:
    """Offer the backend called ``"good"``."""
    return [
        BackendInfo(
            name="good",
            version="0.3.0",
            protocol=PROTOCOL_VERSION,
            load=lambda: BackendBase(SUPPORT, {"flash_forward": flash_forward}),
            description="all scores in memory",
        )
    ]
