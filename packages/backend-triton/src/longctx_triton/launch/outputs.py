"""Results of attention, before they are written."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention_outputs"]


def attention_outputs(
    q: Tensor, v: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(out [B, Sq, Hq, Dv], lse [B, Hq, Sq] fp32)`` with anything in them.

    ``dtype`` is that of ``out``, the queries' by default.
    """
    batch, q_len, heads, _ = q.shape
    # of another tensor, and sizes apart: a device, a dtype and a tuple take the host longer
    out = q.new_empty(batch, q_len, heads, v.shape[3], dtype=dtype)
    return out, q.new_empty(batch, heads, q_len, dtype=torch.float32)
