"""One dense piece of attention through the fused kernels that ship with PyTorch.

The kernels behind ``F.scaled_dot_product_attention`` return the log-sum-exp that the public
function hides. What they cannot do (windows, other alignments, softcap) is composed elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend", "fused", "positive_scale"]

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_CPU_SHARES_HEADS = torch.__version__ >= "2.10"  # compares as versions do
"""Whether the CPU kernel knows GQA; before torch 2.9 it reads past the end of the keys."""


def fused(q: Tensor, *, masked: bool = False) -> bool:
    """Return whether `attend` has a kernel for q's device and dtype."""
    if q.device.type == "cpu":
        return q.dtype in (*_HALF, torch.float32, torch.float64)
    return q.device.type == "cuda" and q.dtype in (*_HALF, torch.float32) and not masked


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend without features; every query must see a key.

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
    k : Tensor, (batch, k_len, kv_heads, head_dim)
    v : Tensor, (batch, k_len, kv_heads, value_dim)
    causal : bool
        Only with ``q_len == k_len``: the kernels align otherwise in different ways.
    scale : float
    mask : Tensor, (q_len, k_len), optional
        Added to the scores, in q's dtype; CPU only.

    Returns
    -------
    out : Tensor, (batch, q_len, q_heads, value_dim), contiguous
    lse : Tensor, (batch, q_heads, q_len), contiguous

    Notes
    -----
    A value head that is not as wide as the key head makes the narrower side be copied with zeros
    appended: the kernels know one head size.
    """
    value_dim = v.shape[3]
    q, scale = positive_scale(q, scale)
    q, k, v = _same_width(q, k, v)
    if q.device.type == "cuda":
        q, k, v = (_within_32_bits(t) for t in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    if groups == 1 or (q.device.type == "cpu" and _CPU_SHARES_HEADS):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        out, lse = _kernel(*heads_first, causal=causal, scale=scale, mask=mask)
        out = out.transpose(1, 2)
    else:
        out, lse = _grouped(q, k, v, groups, causal, scale, mask)
    return out[..., :value_dim].contiguous(), lse.contiguous()


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return queries and a scale above 0 with the same scores.

    The kernels scale row maxima, and scores that are masked with -inf already.
    """
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def _within_32_bits(t: Tensor) -> Tensor:
    """Return ``[batch, len, heads, dim]`` whose heads each span fewer than 2**31 elements.

    The fp32 kernel of CUDA steps from key to key in 32 bits.
    """
    if t.shape[1] * t.stride(1) < 2**31:
        return t
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _same_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = max(q.shape[3], v.shape[3])
    if q.device.type == "cuda":
        width = -(-width // 8) * 8  # the kernels' alignment
    q, k, v = (
        t if t.shape[3] == width else torch.nn.functional.pad(t, (0, width - t.shape[3]))
        for t in (q, k, v)
    )
    return q, k, v


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, groups: int, causal: bool, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """GQA without repeated heads: a group shares its KV head through a stride of 0.

    The kernels take one batch and one head axis. Either the sequences or the KV heads go one by
    one, whichever are fewer; the others become the batch axis and the group the head axis.
    """
    batch, q_len, heads, dim = q.shape
    kv_heads = k.shape[2]
    out = torch.empty(batch, q_len, heads, dim, dtype=q.dtype, device=q.device)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(batch, heads, q_len, dtype=lse_dtype, device=q.device)
    one_by_one = 0 if batch <= kv_heads else 1
    rest = kv_heads if one_by_one == 0 else batch
    # [batch, kv_heads, group, len, dim]: after select(), the rest is the batch axis
    axes = (0, 2, 3, 1, 4)
    q5 = torch.unflatten(q, 2, (kv_heads, groups)).permute(axes)
    out5 = torch.unflatten(out, 2, (kv_heads, groups)).permute(axes)
    lse4 = torch.unflatten(lse, 1, (kv_heads, groups))
    for i in range(batch if one_by_one == 0 else kv_heads):
        keys, values = (
            t.transpose(1, 2).select(one_by_one, i).unsqueeze(1).expand(rest, groups, -1, -1)
            for t in (k, v)
        )
        part, part_lse = _kernel(
            q5.select(one_by_one, i), keys, values, causal=causal, scale=scale, mask=mask
        )
        out5.select(one_by_one, i).copy_(part)
        lse4.select(one_by_one, i).copy_(part_lse)
    return out, lse


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run a kernel on ``[batch, heads, len, dim]`` views."""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : q.shape[2]]  # rows are padded to a multiple of 32
