"""A window plan: first tokens plus a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.plans.base import check_heads, check_int32, check_rank, positions, share

__all__ = ["WindowPlan"]


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
                raise ValueError(
                    f"WindowPlan.{name} must be at least 0, got {getattr(self, name)}"
                )
        if self.head_windows is not None:
            check_int32("WindowPlan", head_windows=self.head_windows)
            check_rank("WindowPlan", "head_windows", self.head_windows, "q_heads")

    def to_mask(self, q_len: int, k_len: int, *, device: torch.device | None = None) -> Tensor:
        """Return the kept pairs, ``[1, 1 or q_heads, q_len, k_len]``."""
        rows, columns = positions(q_len, k_len, device)
        window: Tensor | int = self.window
        if self.head_windows is not None:
            window = self.head_windows.to(rows.device).long().view(-1, 1, 1)
        keep = (columns < self.sink_tokens) | (rows - columns <= window)
        keep = (keep | (rows >= k_len - self.last_queries)) & (columns <= rows)
        return keep.reshape(1, -1, q_len, k_len)

    def density(self, q_len: int, k_len: int) -> float:
        """Return kept pairs / causal pairs."""
        # a query before the first key, at -1 or less, sees nothing
        rows = torch.arange(k_len - q_len, k_len, dtype=torch.int64).clamp(min=-1)
        windows = (
            torch.tensor([self.window]) if self.head_windows is None else self.head_windows.cpu()
        )
        kept = 0
        for window in windows.tolist():
            near = rows.clamp(max=window) + 1
            sinks = (rows - window).clamp(min=0, max=self.sink_tokens)
            pairs = torch.where(rows >= k_len - self.last_queries, rows + 1, near + sinks)
            kept += int(pairs.sum())
        return share(kept / max(len(windows), 1), q_len, k_len)

    def check(self, *, batch: int, q_heads: int, kv_heads: int, q_len: int, k_len: int) -> None:
        """Raise ValueError if ``head_windows`` is for another number of heads."""
        if self.head_windows is not None:
            check_heads("WindowPlan", "query", self.head_windows.shape[0], q_heads, kv_heads)
