"""The attention ops of one model, resolved once: what its layers call instead of dispatching."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.plans import BlockPlan, Plan, StripePlan, TokenSetPlan, TopKPlan, WindowPlan
from longctx_models.architectures.config import ModelConfig

__all__ = ["Kernels"]

_PLAN_FEATURES = {WindowPlan: "window-plan", BlockPlan: "block-plan", StripePlan: "stripe-plan"}
_HEAD_FEATURES = {"kv": ("per-kv-head",), "query": ("per-query-head",), "shared": ()}


class Kernels:
    """Bound ops for a model's head sizes, dtype and device.

    Each op is resolved on first use and kept, so that a method a model never runs needs no
    backend.

    Parameters
    ----------
    config : ModelConfig
    dtype : torch.dtype
    device : torch.device
    backend : str, optional
        A backend asked for by name; it runs or the first use of an op raises.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        backend: str | None = None,
    ) -> None:
        self._bind = functools.partial(
            longctx.bind,
            backend=backend,
            device=device,
            dtype=dtype,
            head_dim=config.head_dim,
            q_heads=config.q_heads,
            kv_heads=config.kv_heads,
        )
        self._windowed = ("window",) if any(w is not None for w in config.windows) else ()
        self._sparse: dict[Any, Callable[..., Tensor]] = {}
        self._decode: dict[bool, Callable[..., Tensor]] = {}

    @functools.cached_property
    def flash(self) -> Callable[..., Tensor]:
        """`longctx.flash_attention`."""
        return self._bind("flash_attention", features=self._windowed)

    @functools.cached_property
    def star(self) -> Callable[..., Tensor]:
        """`longctx.star_context_attention`."""
        return self._bind("star_context_attention")

    @functools.cached_property
    def token_scores(self) -> Callable[..., Tensor]:
        """`longctx.token_scores`."""
        return self._bind("token_scores")

    @functools.cached_property
    def select_tokens(self) -> Callable[..., TokenSetPlan]:
        """`longctx.select_tokens`."""
        # its input is the scores: fp32 at least, one value a head and token
        kind = torch.promote_types(self._bind.keywords["dtype"], torch.float32)
        heads = self._bind.keywords["q_heads"]
        return self._bind("select_tokens", dtype=kind, head_dim=1, kv_heads=heads)

    def resolve(self, *, paged: bool) -> None:
        """Resolve what dense generation needs now, so that a refusal comes before the weights."""
        _ = self.flash
        self.decode(paged)

    def decode(self, paged: bool) -> Callable[..., Tensor]:
        """`longctx.decode_attention` for a contiguous or a paged cache."""
        if paged not in self._decode:
            features = (*self._windowed, *(("paged",) if paged else ()))
            self._decode[paged] = self._bind("decode_attention", features=features)
        return self._decode[paged]

    def sparse(self, plan: Plan) -> Callable[..., Tensor]:
        """Return the op that executes a plan's kind, called with ``(q, k, v, plan, scale=...)``.

        Raises
        ------
        TypeError
            If no op executes such a plan.
        """
        axis = getattr(plan, "head_axis", "shared")
        key = (type(plan), axis, getattr(plan, "page_size", 1) > 1)
        if key not in self._sparse:
            self._sparse[key] = self._bind_sparse(plan, _HEAD_FEATURES[axis])
        return self._sparse[key]

    def _bind_sparse(self, plan: Plan, heads: tuple[str, ...]) -> Callable[..., Tensor]:
        if isinstance(plan, TokenSetPlan):
            return self._bind("token_sparse_attention", features=heads)
        if isinstance(plan, TopKPlan):
            pages = ("pages",) if plan.page_size > 1 else ()
            return self._bind("topk_attention", features=(*heads, *pages))
        for kind, feature in _PLAN_FEATURES.items():
            if isinstance(plan, kind):
                return self._bind("block_sparse_attention", features=(feature, *heads))
        raise TypeError(f"no op executes a {type(plan).__name__} during attention")
