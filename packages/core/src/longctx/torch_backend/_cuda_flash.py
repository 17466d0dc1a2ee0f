"""PyTorch's CUDA kernels that take grouped heads: FlashAttention-2 and, where faster, cuDNN's.

FlashAttention-2 also knows windows, bottom-right causality and packing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from longctx.torch_backend._sdpa import positive_scale

__all__ = ["cudnn_chosen", "cudnn_kernel", "flash_kernel", "flash_kernel_runs"]

MAX_HEAD_DIM = 256


def flash_kernel_runs(q: Tensor, v: Tensor) -> bool:
    """Return whether the kernel takes these dtypes and sizes."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM
    )


def flash_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    left: int | None,
    right: int | None,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    used_k: Tensor | None = None,
    longest: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend, dense or packed, without a word to the host.

    Packed queries may see nothing. In a dense batch every query must see a key, and with more
    queries than keys a window must have a right side smaller than ``k_len``.

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
    k : Tensor, (batch, k_len, kv_heads, head_dim)
    v : Tensor, (batch, k_len, kv_heads, value_dim)
    left, right : int, optional
        Inclusive distances around a query's position, aligned bottom-right; None is unlimited.
    scale : float
    cu_seqlens_q, cu_seqlens_k : Tensor, (sequences + 1,), int32, optional
        Packed lengths; the batch is then 1.
    used_k : Tensor, (sequences,), int32, optional
        Keys of each packed sequence that count, from its first. ``cu_seqlens_k`` then holds first
        keys alone, in any order.
    longest : (int, int), optional
        Longest packed sequence of queries and of keys. A bound costs idle blocks only, so the
        totals stand in for values that would cost a host synchronisation.

    Returns
    -------
    out : Tensor, (batch, q_len, q_heads, value_dim), contiguous
    lse : Tensor, (batch, q_heads, q_len), contiguous, float32
    """
    value_dim = v.shape[3]
    q, scale = positive_scale(q, scale)
    width = -(-max(q.shape[3], value_dim) // 8) * 8
    q, k, v = (
        t if t.shape[3] == width else torch.nn.functional.pad(t, (0, width - t.shape[3]))
        for t in (q, k, v)
    )
    packed = cu_seqlens_q is not None
    if packed:
        q, k, v = q[0], k[0], v[0]
    longest_q, longest_k = longest or (q.shape[-3], k.shape[-3])
    if packed and longest is None:
        # the kernel takes an open side for this length, and this length for an open side: it must
        # reach the last key from a query that stands before the first
        longest_k += longest_q
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        longest_q,
        longest_k,
        0.0,
        left is None and right == 0,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
        seqused_k=used_k,
    )
    if packed:
        out, lse = out.unsqueeze(0), lse.unsqueeze(0)
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # the kernel's mark of an empty row
    return out[..., :value_dim].contiguous(), lse.contiguous()


def cudnn_chosen(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> bool:
    """Return whether PyTorch itself would run this on cuDNN (Hopper: twice FlashAttention-2)."""
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    choice = torch._fused_sdp_choice(query, key, value, is_causal=causal, enable_gqa=grouped)
    return bool(choice == SDPBackend.CUDNN_ATTENTION.value)


def cudnn_kernel(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to every key, or causally with ``q_len == k_len``; see `flash_kernel`."""
    q, scale = positive_scale(q, scale)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.reshape(q.shape[0], q.shape[2], q.shape[1])
