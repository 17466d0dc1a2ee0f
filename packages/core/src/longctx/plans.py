"""Plans: what a sparsity selector may return and a backend executes.

A plan is frozen data: int32 tensors padded to a capacity (padding is -1) with counts on the device,
an explicit head axis and absolute key positions. Queries stand at the end of the keys: query ``i``
has position ``i + k_len - q_len``, so chunked prefill and shards are ordinary cases. Every plan has
`to_mask`, its oracle (small sizes only), and `density`, the share of the causal pairs that it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "BlockPlan",
    "HeadAxis",
    "Plan",
    "RetentionPlan",
    "StripePlan",
    "TokenSetPlan",
    "TopKPlan",
    "WindowPlan",
    "causal_pairs",
]

HeadAxis = Literal["shared", "kv", "query"]
"""Whether a plan holds one set for all heads, one a KV head, or one a query head."""


@runtime_checkable
class Plan(Protocol):
    """What every plan offers."""

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs as bool ``[B or 1, Hx, q_len, k_len]`` (True attends)."""
        ...

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs, averaged over batch and heads (reads the device)."""
        ...

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError in one sentence if the plan was made for another shape."""
        ...


def causal_pairs(q_len: int, k_len: int) -> int:
    """Return the number of (query, key) pairs of bottom-right causal attention."""
    first = k_len - q_len
    return _triangle(k_len) - _triangle(first)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0


def _positions(q_len: int, k_len: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Return query positions ``[q_len, 1]`` and key positions ``[1, k_len]``."""
    rows = torch.arange(k_len - q_len, k_len, device=device).unsqueeze(1)
    return rows, torch.arange(k_len, device=device).unsqueeze(0)


def _check_heads(plan: str, axis: HeadAxis, size: int, q_heads: int, kv_heads: int) -> None:
    wanted = {"shared": 1, "kv": kv_heads, "query": q_heads}[axis]
    if size != wanted:
        raise ValueError(
            f"{plan} has {size} head sets but head_axis={axis!r} needs {wanted} here: build the plan "
            "for these heads or lower it"
        )


def _check_batch(plan: str, size: int, batch: int) -> None:
    if size != batch:
        raise ValueError(f"{plan} was made for batch {size}, the tensors have batch {batch}")


def _check_int32(plan: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{plan}.{name} must be int32, got {tensor.dtype}: use .to(torch.int32)")


def _check_rank(plan: str, name: str, tensor: Tensor, axes: str) -> None:
    rank = len(axes.split(","))
    if tensor.ndim != rank:
        raise ValueError(f"{plan}.{name} must be ({axes}), got shape {tuple(tensor.shape)}")


def _valid(indices: Tensor, counts: Tensor) -> Tensor:
    """Return which entries of ``indices [..., C]`` are real: inside the count and not -1."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    return (slots < counts.unsqueeze(-1)) & (indices >= 0)


def _scatter_set(indices: Tensor, valid: Tensor, size: int) -> Tensor:
    """Return membership ``[..., size]`` of the valid ``indices [..., C]``; others are dropped."""
    inside = valid & (indices < size)
    slots = torch.where(inside, indices, size).long()
    member = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return member.scatter_(-1, slots, True)[..., :size]


@dataclass(frozen=True)
class WindowPlan:
    """First tokens plus a sliding window (StreamingLLM, A-shape, Tri-shape, DuoAttention).

    Keeps key ``j`` of query position ``p`` when ``j <= p`` and (``j < sink_tokens`` or
    ``p - j <= window``).

    Attributes
    ----------
    window : int
        Earlier keys that a query sees besides itself (inclusive distance).
    sink_tokens : int
        First keys that every query sees.
    last_queries : int
        Last query rows that see everything (Tri-shape).
    head_windows : Tensor, (q_heads,), int32, optional
        Overrides ``window`` a query head.
    """

    window: int
    sink_tokens: int = 0
    last_queries: int = 0
    head_windows: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("window", "sink_tokens", "last_queries"):
            if getattr(self, name) < 0:
                raise ValueError(f"WindowPlan.{name} must be at least 0, got {getattr(self, name)}")
        if self.head_windows is not None:
            _check_int32("WindowPlan", head_windows=self.head_windows)
            _check_rank("WindowPlan", "head_windows", self.head_windows, "q_heads")

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[1, 1 or q_heads, q_len, k_len]``."""
        rows, columns = _positions(q_len, k_len, device)
        window: Tensor | int = self.window
        if self.head_windows is not None:
            window = self.head_windows.to(rows.device).long().view(-1, 1, 1)
        keep = (columns < self.sink_tokens) | (rows - columns <= window)
        keep = (keep | (rows >= k_len - self.last_queries)) & (columns <= rows)
        return keep.reshape(1, -1, q_len, k_len)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs."""
        rows = torch.arange(k_len - q_len, k_len, dtype=torch.int64)
        windows = torch.tensor([self.window]) if self.head_windows is None else self.head_windows.cpu()
        kept = 0
        for window in windows.tolist():
            near = rows.clamp(max=window) + 1
            sinks = (rows - window).clamp(min=0, max=self.sink_tokens)
            pairs = torch.where(rows >= k_len - self.last_queries, rows + 1, near + sinks)
            kept += int(pairs.sum())
        return kept / (len(windows) * causal_pairs(q_len, k_len))

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if ``head_windows`` is for another number of heads."""
        if self.head_windows is not None:
            _check_heads("WindowPlan", "query", self.head_windows.shape[0], q_heads, kv_heads)


@dataclass(frozen=True)
class TokenSetPlan:
    """One ascending set of tokens a head (Token Sparse Attention, FastKV, GemFilter).

    Attributes
    ----------
    indices : Tensor, (batch, heads, capacity), int32
        Absolute token positions, ascending, then -1.
    counts : Tensor, (batch, heads), int32
    head_axis : {"shared", "kv", "query"}
    scope : {"qkv", "kv"}
        Whether the set restricts queries and keys, or keys alone.
    """

    indices: Tensor
    counts: Tensor
    head_axis: HeadAxis
    scope: Literal["qkv", "kv"] = "qkv"

    def __post_init__(self) -> None:
        _check_int32("TokenSetPlan", indices=self.indices, counts=self.counts)
        _check_rank("TokenSetPlan", "indices", self.indices, "batch, heads, capacity")
        _check_rank("TokenSetPlan", "counts", self.counts, "batch, heads")

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[B, Hx, q_len, k_len]``."""
        member = _scatter_set(self.indices, _valid(self.indices, self.counts), k_len)
        member = member.to(device) if device is not None else member
        rows, columns = _positions(q_len, k_len, member.device)
        keep = member.unsqueeze(2) & (columns <= rows)
        if self.scope == "qkv":
            keep = keep & member[..., k_len - q_len :].unsqueeze(3)
        return keep

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs."""
        valid = _valid(self.indices, self.counts)
        first = k_len - q_len
        total = valid.sum(-1).double()
        if self.scope == "qkv":
            outside = (valid & (self.indices < first)).sum(-1).double()
            kept = total * (total + 1) / 2 - outside * (outside + 1) / 2
        else:
            seen_by = k_len - self.indices.clamp(min=first).double()
            kept = torch.where(valid, seen_by, 0.0).sum(-1)
        return float(kept.mean()) / causal_pairs(q_len, k_len)

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch, head count or length."""
        _check_batch("TokenSetPlan", self.indices.shape[0], batch)
        _check_heads("TokenSetPlan", self.head_axis, self.indices.shape[1], q_heads, kv_heads)


@dataclass(frozen=True)
class BlockPlan:
    """Key blocks a query block, in the layout of FlexAttention's BlockMask.

    Attributes
    ----------
    counts : Tensor, (batch, heads, q_blocks), int32
        Kept key blocks of each query block (``kv_num_blocks``).
    indices : Tensor, (batch, heads, q_blocks, capacity), int32
        Their numbers (``kv_indices``); entries past the count are ignored.
    block_q, block_k : int
        Tokens a block. Query blocks tile this call's queries, key blocks the absolute keys.
    head_axis : {"shared", "kv", "query"}
    """

    counts: Tensor
    indices: Tensor
    block_q: int
    block_k: int
    head_axis: HeadAxis

    def __post_init__(self) -> None:
        _check_int32("BlockPlan", counts=self.counts, indices=self.indices)
        _check_rank("BlockPlan", "counts", self.counts, "batch, heads, q_blocks")
        _check_rank("BlockPlan", "indices", self.indices, "batch, heads, q_blocks, capacity")
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(f"block sizes must be positive, got {self.block_q} x {self.block_k}")

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[B, Hx, q_len, k_len]``."""
        k_blocks = -(-k_len // self.block_k)
        kept = _scatter_set(self.indices, _valid(self.indices, self.counts), k_blocks)
        kept = kept.repeat_interleave(self.block_q, 2)[:, :, :q_len]
        kept = kept.repeat_interleave(self.block_k, 3)[..., :k_len]
        kept = kept.to(device) if device is not None else kept
        rows, columns = _positions(q_len, k_len, kept.device)
        return kept & (columns <= rows)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs."""
        first = k_len - q_len
        blocks = torch.arange(self.counts.shape[2], device=self.indices.device)
        q0 = (first + blocks * self.block_q).unsqueeze(1).double()
        q1 = (first + ((blocks + 1) * self.block_q).clamp(max=q_len)).unsqueeze(1).double()
        k0 = self.indices.double() * self.block_k
        k1 = (k0 + self.block_k).clamp(max=k_len)

        def triangle(n: Tensor) -> Tensor:
            n = n.clamp(min=0)
            return n * (n + 1) / 2

        # sum over rows r in [q0, q1) of clamp(r - k0 + 1, 0, k1 - k0), in closed form
        pairs = triangle(q1 - k0) - triangle(q0 - k0) - triangle(q1 - k1) + triangle(q0 - k1)
        kept = torch.where(_valid(self.indices, self.counts), pairs, 0.0).sum((2, 3))
        return float(kept.mean()) / causal_pairs(q_len, k_len)

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch, head count or length."""
        _check_batch("BlockPlan", self.counts.shape[0], batch)
        _check_heads("BlockPlan", self.head_axis, self.counts.shape[1], q_heads, kv_heads)
        wanted = -(-q_len // self.block_q)
        if self.counts.shape[2] != wanted:
            raise ValueError(
                f"BlockPlan has {self.counts.shape[2]} query blocks, {q_len} queries in blocks of "
                f"{self.block_q} need {wanted}: build the plan for this length"
            )


@dataclass(frozen=True)
class StripePlan:
    """Vertical key columns and slash diagonals (MInference, FlexPrefill).

    Attributes
    ----------
    vertical : Tensor, (batch, heads, capacity), int32
        Key positions that every later query sees; unique.
    vertical_counts : Tensor, (batch, heads), int32
    slash : Tensor, (batch, heads, capacity), int32
        Distances ``query - key`` that are kept; unique; 0 is the diagonal itself.
    slash_counts : Tensor, (batch, heads), int32
    head_axis : {"shared", "kv", "query"}
    """

    vertical: Tensor
    vertical_counts: Tensor
    slash: Tensor
    slash_counts: Tensor
    head_axis: HeadAxis

    def __post_init__(self) -> None:
        _check_int32(
            "StripePlan",
            vertical=self.vertical,
            vertical_counts=self.vertical_counts,
            slash=self.slash,
            slash_counts=self.slash_counts,
        )
        for name in ("vertical", "slash"):
            _check_rank("StripePlan", name, getattr(self, name), "batch, heads, capacity")
            _check_rank("StripePlan", f"{name}_counts", getattr(self, f"{name}_counts"), "batch, heads")

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[B, Hx, q_len, k_len]``."""
        columns_kept = _scatter_set(self.vertical, _valid(self.vertical, self.vertical_counts), k_len)
        diagonals = _scatter_set(self.slash, _valid(self.slash, self.slash_counts), k_len)
        if device is not None:
            columns_kept, diagonals = columns_kept.to(device), diagonals.to(device)
        rows, columns = _positions(q_len, k_len, columns_kept.device)
        distance = rows - columns
        on_slash = diagonals[..., distance.clamp(min=0)]
        return (columns_kept.unsqueeze(2) | on_slash) & (distance >= 0)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs."""
        first = k_len - q_len
        kept = 0.0
        for stripes, counts in (
            (self.vertical, self.vertical_counts),
            (self.slash, self.slash_counts),
        ):
            seen_by = (k_len - stripes.clamp(min=first)).clamp(min=0).double()
            kept += float(torch.where(_valid(stripes, counts), seen_by, 0.0).sum())
        # a column and a diagonal cross at query v + o: that pair was counted twice
        crossing = self.vertical.unsqueeze(-1) + self.slash.unsqueeze(-2)
        both = _valid(self.vertical, self.vertical_counts).unsqueeze(-1) & _valid(
            self.slash, self.slash_counts
        ).unsqueeze(-2)
        kept -= float((both & (crossing >= first) & (crossing < k_len)).sum())
        sets = self.vertical.shape[0] * self.vertical.shape[1]
        return kept / (sets * causal_pairs(q_len, k_len))

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch or head count."""
        for tensor in (self.vertical, self.slash):
            _check_batch("StripePlan", tensor.shape[0], batch)
            _check_heads("StripePlan", self.head_axis, tensor.shape[1], q_heads, kv_heads)


@dataclass(frozen=True)
class TopKPlan:
    """The best keys (or pages of keys) of each query (DeepSeek Sparse Attention, Quest, NSA).

    Attributes
    ----------
    indices : Tensor, (batch, q_len, heads, k), int32
        Key positions, or page numbers when ``page_size`` > 1; -1 anywhere means none.
    head_axis : {"shared", "kv"}
    page_size : int
        Consecutive keys that one index names.
    """

    indices: Tensor
    head_axis: HeadAxis = "shared"
    page_size: int = 1

    def __post_init__(self) -> None:
        _check_int32("TopKPlan", indices=self.indices)
        _check_rank("TopKPlan", "indices", self.indices, "batch, q_len, heads, k")
        if self.page_size < 1:
            raise ValueError(f"TopKPlan.page_size must be at least 1, got {self.page_size}")

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[B, Hx, q_len, k_len]``."""
        units = -(-k_len // self.page_size)
        member = _scatter_set(self.indices, self.indices >= 0, units)
        keep = member.transpose(1, 2).repeat_interleave(self.page_size, -1)[..., :k_len]
        keep = keep.to(device) if device is not None else keep
        if self.page_size == 1:
            return keep
        rows, columns = _positions(q_len, k_len, keep.device)
        return keep & (columns <= rows)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs; indices are taken to be unique in a row."""
        valid = self.indices >= 0
        rows = torch.arange(k_len - q_len, k_len, device=valid.device).view(1, -1, 1, 1)
        start = self.indices.long() * self.page_size
        size = (rows + 1 - start).clamp(min=0, max=self.page_size) if self.page_size > 1 else 1
        kept = (valid * size).sum((1, 3)).double()
        return float(kept.mean()) / causal_pairs(q_len, k_len)

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch, head count or length."""
        _check_batch("TopKPlan", self.indices.shape[0], batch)
        _check_heads("TopKPlan", self.head_axis, self.indices.shape[2], q_heads, kv_heads)
        if self.indices.shape[1] != q_len:
            raise ValueError(
                f"TopKPlan has rows for {self.indices.shape[1]} queries, q has {q_len}"
            )


@dataclass(frozen=True)
class RetentionPlan:
    """The cache slots to keep, ragged by KV head (SnapKV, H2O, StreamingLLM's cache).

    Attributes
    ----------
    indices : Tensor, (batch, kv_heads, capacity), int32
        Physical slots to keep, ascending, then -1.
    counts : Tensor, (batch, kv_heads), int32
    """

    indices: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        _check_int32("RetentionPlan", indices=self.indices, counts=self.counts)
        _check_rank("RetentionPlan", "indices", self.indices, "batch, kv_heads, capacity")
        _check_rank("RetentionPlan", "counts", self.counts, "batch, kv_heads")

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return what later queries see, ``[B, Hkv, q_len, k_len]`` (the same row for all queries)."""
        member = _scatter_set(self.indices, _valid(self.indices, self.counts), k_len)
        member = member.to(device) if device is not None else member
        return member.unsqueeze(2).expand(-1, -1, q_len, -1)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept slots / slots; ``q_len`` plays no part."""
        return float(_valid(self.indices, self.counts).sum(-1).double().mean()) / k_len

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if the plan was made for another batch or head count."""
        _check_batch("RetentionPlan", self.indices.shape[0], batch)
        _check_heads("RetentionPlan", "kv", self.indices.shape[1], q_heads, kv_heads)
