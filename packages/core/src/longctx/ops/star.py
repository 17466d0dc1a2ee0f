"""Star Attention: semantic checks, dispatch and the ``torch.library`` contract of both phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.dispatch import BoundBackend, bound_to, choose, primitive
from longctx.ops._checks import check_attention_inputs, check_positive, check_scale
from longctx.ops._library import call, define, needs_gradient
from longctx.ops._once import check_once
from longctx.protocols.attention import AttentionOutput

__all__ = [
    "star_context_attention",
    "star_context_attention_with_lse",
    "star_query_attention",
    "star_query_attention_with_lse",
]


def star_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    anchor_size: int,
    scale: float | None = None,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """Phase 1 of Star Attention: each block of the context sees itself and the first tokens.

    Query position ``i`` sees key ``j`` when ``j <= i`` and (``i // block_size == j // block_size``
    or ``j < anchor_size``).

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
        bf16, fp16, fp32 or fp64; any strides with a unit last stride. Query ``i`` stands at key
        position ``i + k_len - q_len``: prefilling chunk by chunk gives what one call gives.
    k : Tensor, (batch, k_len, kv_heads, head_dim)
        All keys so far; ``q_heads`` is a multiple of ``kv_heads``.
    v : Tensor, (batch, k_len, kv_heads, value_dim)
    block_size : int
        Tokens a block, in absolute positions; the last block may be ragged.
    anchor_size : int
        First tokens that every block sees: a prefix of the first block, so at most ``block_size``
        (the paper's default) and at least 0 (no anchor).
    scale : float, optional
        Default ``head_dim ** -0.5``.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    Tensor, (batch, q_len, q_heads, value_dim)
        In q's dtype.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or sizes do not fit; one sentence with the expected axes.
    UnsupportedError
        If no backend, or not the one asked for, can run the request.

    Notes
    -----
    Acharya et al., Star Attention, arXiv 2411.17116, algorithm 1, as one masked pass: attention is
    causal, so the anchor that the paper's hosts compute again has the keys of the first block. No
    gradient.

    Examples
    --------
    >>> import longctx, torch
    >>> q = torch.randn(1, 100, 8, 64)
    >>> k = v = torch.randn(1, 100, 2, 64)
    >>> longctx.star_context_attention(q, k, v, block_size=32, anchor_size=32).shape
    torch.Size([1, 100, 8, 64])
    """
    return star_context_attention_with_lse(
        q,
        k,
        v,
        block_size=block_size,
        anchor_size=anchor_size,
        scale=scale,
        backend=backend,
    ).out


def star_context_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    anchor_size: int,
    scale: float | None = None,
    backend: str | BoundBackend | None = None,
) -> AttentionOutput:
    """`star_context_attention` that also returns the log-sum-exp, for exact merging.

    Parameters are those of `star_context_attention`.

    Returns
    -------
    AttentionOutput
        ``out`` and ``lse`` fp32 ``[batch, q_heads, q_len]`` (natural log; fp64 for fp64
        inputs).
    """
    if not torch.compiler.is_compiling():
        check_once(_check_context, q, k, v, block_size, anchor_size, scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    gradient = needs_gradient(q, k, v)
    chosen = bound_to(backend) or _choose("star_context_attention", q, k, v, gradient, backend)
    out, lse = call(
        _context_op, _context, gradient,
        q, k, v, block_size, anchor_size, scale, chosen,
    )  # fmt: skip
    return AttentionOutput(out, lse)


def star_query_attention(
    q: Tensor,
    shards: Sequence[tuple[Tensor, Tensor]],
    *,
    query_shard: int = -1,
    scale: float | None = None,
    backend: str | BoundBackend | None = None,
) -> Tensor:
    """Phase 2 of Star Attention: query tokens attend the keys of all shards, exactly.

    Parameters
    ----------
    q : Tensor, (batch, q_len, q_heads, head_dim)
        bf16, fp16, fp32 or fp64; any strides with a unit last stride.
    shards : sequence of (k, v)
        ``k`` ``[batch, shard_len, kv_heads, head_dim]`` and ``v`` ``[..., value_dim]`` of each
        shard; lengths differ freely and may be 0. ``q_heads`` is a multiple of ``kv_heads``.
    query_shard : int
        The shard whose last ``q_len`` keys are the queries' own; negative counts from the end.
        Attention is causal there, and there alone: every other shard is seen whole.
    scale : float, optional
        Default ``head_dim ** -0.5``.
    backend : str, optional
        Run on this backend or fail; default: see `longctx.explain`.

    Returns
    -------
    Tensor, (batch, q_len, q_heads, value_dim)
        In q's dtype.

    Raises
    ------
    ValueError, TypeError
        If shapes, dtypes or ``query_shard`` do not fit; one sentence with the expected axes.
    UnsupportedError
        If no backend, or not the one asked for, can run the request.

    Notes
    -----
    Acharya et al., Star Attention, arXiv 2411.17116, algorithm 2; the partial results merge by
    their log-sum-exp, shifted by the maximum, in fp32. No gradient.

    Examples
    --------
    >>> import longctx, torch
    >>> shards = [(torch.randn(1, n, 2, 64), torch.randn(1, n, 2, 64)) for n in (96, 96, 40)]
    >>> longctx.star_query_attention(torch.randn(1, 8, 8, 64), shards).shape
    torch.Size([1, 8, 8, 64])
    """
    return star_query_attention_with_lse(
        q, shards, query_shard=query_shard, scale=scale, backend=backend
    ).out


def star_query_attention_with_lse(
    q: Tensor,
    shards: Sequence[tuple[Tensor, Tensor]],
    *,
    query_shard: int = -1,
    scale: float | None = None,
    backend: str | BoundBackend | None = None,
) -> AttentionOutput:
    """`star_query_attention` that also returns the log-sum-exp, for exact merging.

    Parameters are those of `star_query_attention`.

    Returns
    -------
    AttentionOutput
        ``out`` and ``lse`` fp32 ``[batch, q_heads, q_len]`` (natural log; fp64 for fp64
        inputs).
    """
    if not shards:
        raise ValueError("shards must hold at least one (k, v) pair, got none")
    if not -len(shards) <= query_shard < len(shards):
        raise ValueError(
            f"query_shard must be between {-len(shards)} and {len(shards) - 1} for {len(shards)} "
            f"shards, got {query_shard}"
        )
    owner = query_shard % len(shards)
    if not torch.compiler.is_compiling():
        check_once(_check_shards, q, shards, owner, scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    keys, values = [k for k, _ in shards], [v for _, v in shards]
    gradient = needs_gradient(q, *keys, *values)
    chosen = bound_to(backend) or _choose(
        "star_query_attention", q, keys[0], values[0], gradient, backend
    )
    out, lse = call(_query_op, _query, gradient, q, keys, values, owner, scale, chosen)
    return AttentionOutput(out, lse)


def _choose(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradient: bool,
    backend: str | BoundBackend | None,
) -> str:
    return choose(
        op,
        q,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        gradient=gradient,
        backend=backend,
    )


def _check_context(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, anchor_size: int, scale: float | None
) -> None:
    check_attention_inputs(q, k, v)
    if scale is not None:
        check_scale(scale)
    check_positive("block_size", block_size)
    check_positive("anchor_size", anchor_size, 0)
    if anchor_size > block_size:
        raise ValueError(
            f"anchor_size must be at most block_size, for the anchor is a prefix of the first "
            f"block, got anchor_size={anchor_size}, block_size={block_size}"
        )
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            f"k must hold the queries' own keys too, got q_len={q.shape[1]}, k_len={k.shape[1]}"
        )


def _check_shards(
    q: Tensor, shards: Sequence[tuple[Tensor, Tensor]], owner: int, scale: float | None
) -> None:
    for n, shard in enumerate(shards):
        try:
            k, v = shard
            check_attention_inputs(q, k, v)
            if n and (k.shape[2], v.shape[3]) != (shards[0][0].shape[2], shards[0][1].shape[3]):
                raise ValueError("kv_heads and value_dim must be those of shard 0")
        except (TypeError, ValueError) as error:
            raise type(error)(f"shard {n} of {len(shards)} does not fit: {error}") from None
    if shards[owner][0].shape[1] < q.shape[1]:
        raise ValueError(
            f"query_shard {owner} must hold the {q.shape[1]} queries' own keys, it holds "
            f"{shards[owner][0].shape[1]} keys"
        )
    if scale is not None:
        check_scale(scale)


def _context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    anchor_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = primitive(backend, "star_context_forward")(
        q, k, v, block_size=block_size, anchor_size=anchor_size, scale=scale
    )
    return result


def _query(
    q: Tensor,
    shard_keys: Sequence[Tensor],
    shard_values: Sequence[Tensor],
    query_shard: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = primitive(backend, "star_query_forward")(
        q, shard_keys, shard_values, query_shard=query_shard, scale=scale
    )
    return result


def _context_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _head_dim = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, q_len, heads, v.shape[3], dtype=q.dtype, device=q.device)
    return out, torch.empty(batch, heads, q_len, dtype=lse_dtype, device=q.device)


def _query_fake(
    q: Tensor, shard_keys: Sequence[Tensor], shard_values: Sequence[Tensor], *_: Any
) -> tuple[Tensor, Tensor]:
    return _context_fake(q, shard_keys[0], shard_values[0])


_context_op = define(
    "star_context_forward",
    "(Tensor q, Tensor k, Tensor v, SymInt block_size, SymInt anchor_size, float scale, "
    "str backend) -> (Tensor, Tensor)",
    _context,
    _context_fake,
)
_query_op = define(
    "star_query_forward",
    "(Tensor q, Tensor[] shard_keys, Tensor[] shard_values, SymInt query_shard, float scale, "
    "str backend) -> (Tensor, Tensor)",
    _query,
    _query_fake,
)
