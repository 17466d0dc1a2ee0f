"""What plans share: the protocol, and checks and masks of index sets."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "HeadAxis",
    "Plan",
    "causal_pairs",
    "check_batch",
    "check_counts",
    "check_heads",
    "check_int32",
    "check_rank",
    "positions",
    "scatter_set",
    "share",
    "triangle",
    "valid_entries",
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
    return triangle(k_len) - triangle(first)


def triangle(n: int) -> int:
    """Return the number of pairs in a triangle of ``n`` rows."""
    return n * (n + 1) // 2 if n > 0 else 0


def positions(q_len: int, k_len: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Return query positions ``[q_len, 1]`` and key positions ``[1, k_len]``."""
    rows = torch.arange(k_len - q_len, k_len, device=device).unsqueeze(1)
    return rows, torch.arange(k_len, device=device).unsqueeze(0)


def check_heads(plan: str, axis: HeadAxis, size: int, q_heads: int, kv_heads: int) -> None:
    """Raise if the number of head sets does not fit the head axis."""
    wanted = {"shared": 1, "kv": kv_heads, "query": q_heads}[axis]
    if size != wanted:
        raise ValueError(
            f"{plan} has {size} head sets but head_axis={axis!r} needs {wanted} here: build the "
            "plan for these heads or lower it"
        )


def check_batch(plan: str, size: int, batch: int) -> None:
    """Raise if the plan was made for another batch."""
    if size != batch:
        raise ValueError(f"{plan} was made for batch {size}, the tensors have batch {batch}")


def check_int32(plan: str, **tensors: Tensor) -> None:
    """Raise unless every named argument is a tensor of int32."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{plan}.{name} must be an int32 tensor, got {type(tensor).__name__}: use "
                "torch.tensor(..., dtype=torch.int32)"
            )
        if tensor.dtype != torch.int32:
            raise TypeError(
                f"{plan}.{name} must be int32, got {tensor.dtype}: use .to(torch.int32)"
            )


def check_rank(plan: str, name: str, tensor: Tensor, axes: str) -> None:
    """Raise unless a tensor has the named axes."""
    rank = len(axes.split(","))
    if tensor.ndim != rank:
        raise ValueError(f"{plan}.{name} must be ({axes}), got shape {tuple(tensor.shape)}")


def check_counts(plan: str, names: str, indices: Tensor, counts: Tensor) -> None:
    """Raise unless there is one count a set of indices."""
    if counts.shape != indices.shape[:-1]:
        raise ValueError(
            f"{plan} needs one count a set in {names}, got counts {tuple(counts.shape)} for "
            f"indices {tuple(indices.shape)}"
        )


def share(kept: float, q_len: int, k_len: int) -> float:
    """Return kept pairs / causal pairs; 0 where there is no pair at all."""
    return kept / max(causal_pairs(q_len, k_len), 1)


def valid_entries(indices: Tensor, counts: Tensor) -> Tensor:
    """Return which entries of ``indices [..., C]`` are real: inside the count and not -1."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    return (slots < counts.unsqueeze(-1)) & (indices >= 0)


def scatter_set(indices: Tensor, valid: Tensor, size: int) -> Tensor:
    """Return membership ``[..., size]`` of the valid ``indices [..., C]``; others are dropped."""
    inside = valid & (indices < size)
    slots = torch.where(inside, indices, size).long()
    member = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return member.scatter_(-1, slots, True)[..., :size]
