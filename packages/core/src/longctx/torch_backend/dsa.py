"""DeepSeek Sparse Attention in plain PyTorch: quantiser, indexer and attention over chosen keys.

Nothing here holds a Sq x Sk matrix except the result of `index_scores_forward` itself. fp8 and
half inputs are widened tile by tile, which is exact: fp8 products do not exist on every device.
The selection is in `longctx.torch_backend._select`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.settings import budget_bytes
from longctx.torch_backend._select import hidden_keys, index_topk_forward, score_tile, wide

__all__ = [
    "index_scores_backward",
    "index_scores_forward",
    "index_topk_forward",
    "quantize_forward",
    "topk_attention_forward",
]

FP8_MAX = 448.0
LEAST_AMAX = 1e-4


def quantize_forward(x: Tensor, *, scale_format: str) -> tuple[Tensor, Tensor]:
    """Implement `longctx.protocols.attention.SparseIndexer.quantize_forward`."""
    x = x.float()
    scale = x.abs().amax(-1).clamp(min=LEAST_AMAX) / FP8_MAX
    if scale_format == "ue8m0":
        # the exponent field of a positive float, one up unless the mantissa is already zero
        bits = scale.view(torch.int32)
        power = ((bits + 0x7FFFFF) >> 23 << 23).view(torch.float32)
        scale = torch.where(scale.isfinite(), power, scale)
    values = (x / scale.unsqueeze(-1)).clamp_(-FP8_MAX, FP8_MAX)
    return values.to(torch.float8_e4m3fn), scale


def index_scores_forward(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    k_scale: Tensor | None,
    causal: bool,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> Tensor:
    """Implement `longctx.protocols.attention.SparseIndexer.index_scores_forward`."""
    batch, q_len, _heads, _dim = q.shape
    k_len = k.shape[1]
    dtype = wide(q.dtype)
    result = torch.empty(batch, q_len, k_len, dtype=dtype, device=q.device)
    for b in range(batch):
        keys = k[b].to(dtype)
        for first, last in _row_chunks(q_len, 4 * k_len * dtype.itemsize):
            scores = score_tile(
                q[b, first:last].transpose(0, 1).to(dtype),
                keys,
                weights[b, first:last].to(dtype),
                None if k_scale is None else k_scale[b].to(dtype),
            )
            hidden = hidden_keys(
                (first, last),
                (0, k_len),
                shift=k_len - q_len if causal else None,
                start=None if key_start is None else key_start[b],
                end=None if key_end is None else key_end[b],
                device=q.device,
            )
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            result[b, first:last] = scores
    return result


def index_scores_backward(
    dscores: Tensor,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    causal: bool,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement `longctx.protocols.attention.SparseIndexer.index_scores_backward`."""
    batch, q_len, heads, _dim = q.shape
    k_len = k.shape[1]
    dtype = wide(q.dtype)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=q.device)
    for b in range(batch):
        keys = k[b].to(dtype)
        dkeys = torch.zeros_like(keys)
        for first, last in _row_chunks(q_len, 6 * k_len * dtype.itemsize):
            grad = dscores[b, first:last].to(dtype)
            hidden = hidden_keys(
                (first, last),
                (0, k_len),
                shift=k_len - q_len if causal else None,
                start=None if key_start is None else key_start[b],
                end=None if key_end is None else key_end[b],
                device=q.device,
            )
            if hidden is not None:
                grad = grad.masked_fill(hidden, 0)
            for h in range(heads):
                rows = q[b, first:last, h].to(dtype)
                dots = (rows @ keys.t()).relu_()
                dweights[b, first:last, h] = (grad * dots).sum(-1)
                weight = weights[b, first:last, h : h + 1].to(dtype)
                ddots = (grad * weight).masked_fill_(dots <= 0, 0)
                dq[b, first:last, h] = (ddots @ keys).to(q.dtype)
                dkeys.addmm_(ddots.t(), rows)
        dk[b] = dkeys.to(k.dtype)
    return dq, dk, dweights


def _row_chunks(rows: int, bytes_a_row: int) -> list[tuple[int, int]]:
    """Cut rows into chunks whose workspace fits the chunk budget, one row at least."""
    size = max(1, budget_bytes("LONGCTX_CHUNK_BUDGET_MIB") // max(1, bytes_a_row))
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def topk_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    page_size: int,
    scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Implement `longctx.protocols.attention.SparseIndexer.topk_attention_forward`."""
    batch, q_len, q_heads, dim = q.shape
    k_len, kv_heads, value_dim = k.shape[1], k.shape[2], v.shape[3]
    dtype = wide(q.dtype)
    out = torch.empty(batch, q_len, q_heads, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, q_heads, q_len, dtype=dtype, device=q.device)
    if k_len == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    tokens = indices.shape[3] * page_size
    # keys and values twice (as stored and widened), scores twice, positions in int64
    stored = kv_heads * (dim + value_dim) * (k.element_size() + dtype.itemsize)
    row_bytes = tokens * (stored + 2 * q_heads * dtype.itemsize + 24 * indices.shape[2])
    # MLA stores one row: the values are its first channels, gathered once
    one_row = k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and value_dim <= dim
    heads = torch.arange(kv_heads, device=q.device).unsqueeze(1)
    for b in range(batch):
        for first, last in _row_chunks(q_len, row_bytes):
            positions = (first + k_len - q_len, last + k_len - q_len)
            slots, valid = _tokens_of(indices[b, first:last], page_size, positions, k_len)
            # an unused slot reads row 0, whatever it holds: without the zeros 0 * NaN would leak
            keys = k[b][slots, heads].to(dtype).masked_fill_(~valid.unsqueeze(-1), 0)
            if one_row:
                values = keys[..., :value_dim]
            else:
                values = v[b][slots, heads].to(dtype).masked_fill_(~valid.unsqueeze(-1), 0)
            rows = q[b, first:last].to(dtype).reshape(last - first, kv_heads, -1, dim)
            scores = (rows @ keys.transpose(-1, -2)).mul_(scale)
            scores.masked_fill_(~valid.unsqueeze(-2), -torch.inf)
            norm = scores.logsumexp(-1)
            if sinks is not None:
                norm = torch.logaddexp(norm, sinks.to(dtype).view(kv_heads, -1))
            weights = scores.sub_(norm.masked_fill(norm == -torch.inf, 0).unsqueeze(-1)).exp_()
            out[b, first:last] = (weights @ values).flatten(1, 2).to(q.dtype)
            lse[b, :, first:last] = norm.flatten(1, 2).t()
    return out, lse


def _tokens_of(
    indices: Tensor, page_size: int, positions: tuple[int, int], k_len: int
) -> tuple[Tensor, Tensor]:
    """Return key rows ``[R, G, tokens]`` (0 where unused) and which of them count."""
    tokens = indices.long()
    valid = tokens >= 0
    if page_size > 1:
        within = torch.arange(page_size, device=indices.device)
        tokens = (tokens.unsqueeze(-1) * page_size + within).flatten(2)
        rows = torch.arange(*positions, device=indices.device).view(-1, 1, 1)
        valid = valid.repeat_interleave(page_size, -1) & (tokens <= rows)
    valid &= tokens < k_len
    return torch.where(valid, tokens, 0), valid
