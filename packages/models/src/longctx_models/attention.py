"""The attention of a model's layers over a KV cache, as a method's policy has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from longctx.plans import Plan, RetentionPlan, causal_pairs
from longctx.protocols.kv_cache import KVCache
from longctx.protocols.selector import LayerChoice, Phase, SelectContext, SparsitySelector
from longctx_models.architectures.config import ModelConfig
from longctx_models.kernels import Kernels
from longctx_models.selectors.layers import AllLayers
from longctx_models.selectors.star import StarPlan

__all__ = ["CachedAttention", "Policy"]


@dataclass(frozen=True)
class Policy:
    """Which selector is asked when; None is dense attention over what the cache holds.

    Attributes
    ----------
    prefill : SparsitySelector, optional
        For the context part of the prompt.
    append : SparsitySelector, optional
        For the query part.
    decode : SparsitySelector, optional
        For generated tokens.
    retain : SparsitySelector, optional
        Asked after each layer's attention what the cache keeps; returns a `RetentionPlan` or None.
    layers : LayerChoice
        Layers at which the selectors are asked. Sliding-window layers are never asked: they keep
        the window that they were trained with.
    whole : bool
        Whether the prompt must be prefilled in one piece, query part included.
    reads_queries : bool
        Whether a selector looks at the queries. If none does, the last layer may skip those that
        nobody will read.
    """

    prefill: SparsitySelector | None = None
    append: SparsitySelector | None = None
    decode: SparsitySelector | None = None
    retain: SparsitySelector | None = None
    layers: LayerChoice = field(default_factory=AllLayers)
    whole: bool = False
    reads_queries: bool = True


@dataclass(frozen=True)
class _Call:
    """What one layer attended in one prefill call, for the density."""

    plan: Plan | None
    q_len: int
    k_len: int
    logical: int


class CachedAttention:
    """An ``attend`` for `Decoder`: appends to the cache, asks the policy, runs the kernels.

    Parameters
    ----------
    config : ModelConfig
    kernels : Kernels
    cache : KVCache
    policy : Policy
    """

    def __init__(
        self, config: ModelConfig, kernels: Kernels, cache: KVCache, policy: Policy
    ) -> None:
        self.config, self.kernels, self.cache, self.policy = config, kernels, cache, policy
        self.scale = config.head_dim**-0.5
        self.phase = Phase.PREFILL
        self._sparse_layers = [
            window is None and policy.layers.applies(layer, config.num_layers)
            for layer, window in enumerate(config.windows)
        ]
        self._windows = [None if left is None else (left, 0) for left in config.windows]
        self._earlier: dict[int, Plan] = {}
        self._calls: list[list[_Call]] = [[] for _ in config.windows]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attended values of ``q``; ``k [B, T, K, D]`` and ``v`` join the cache.

        ``q`` holds the queries of all ``T`` tokens, or of the last ones.
        """
        if layer == 0:
            self._earlier = {}
        self.cache.append(layer, k, v)
        if not self._sparse_layers[layer]:
            self._record(layer, None, k)
            return self._dense(layer, q)
        selector = {
            Phase.PREFILL: self.policy.prefill,
            Phase.APPEND: self.policy.append,
            Phase.DECODE: self.policy.decode,
        }[self.phase]
        plan = None if selector is None else selector.select(self._context(layer, q))
        self._record(layer, plan, k)
        if plan is None:
            out = self._dense(layer, q)
        else:
            self._earlier[layer] = plan
            out = self._planned(layer, q, plan)
        if self.policy.retain is not None:
            kept = self.policy.retain.select(self._context(layer, q))
            if kept is not None:
                self.cache.retain(layer, cast("RetentionPlan", kept))
        return out

    def pairs(self) -> tuple[float, int]:
        """Return the pairs that the prefill attended, averaged over layers, and all causal ones.

        Reads the device. A sliding-window layer counts as dense: the method takes nothing from it.
        """
        shares: dict[tuple[int, int, int], float] = {}
        kept, total = 0.0, 0
        for calls in self._calls:
            for call in calls:
                key = (id(call.plan), call.q_len, call.k_len)
                if key not in shares:
                    plan = call.plan
                    shares[key] = 1.0 if plan is None else plan.density(call.q_len, call.k_len)
                kept += shares[key] * causal_pairs(call.q_len, call.k_len)
                total += causal_pairs(call.q_len, call.logical)
        layers = len(self._calls)
        return kept / layers, total // layers

    def forget_plans(self) -> None:
        """Let go of the plans that `pairs` reads."""
        self._calls = [[] for _ in self._calls]
        self._earlier = {}

    def _context(self, layer: int, q: Tensor) -> SelectContext:
        decoding = self.phase is Phase.DECODE
        return SelectContext(
            phase=self.phase,
            layer=layer,
            num_layers=self.config.num_layers,
            q=q,
            k=self.cache.view(layer) if decoding else self.cache.gather(layer)[0],
            scale=self.scale,
            auxiliary=self.cache.auxiliary(layer),
            earlier=self._earlier,
        )

    def _record(self, layer: int, plan: Plan | None, k: Tensor) -> None:
        if self.phase is Phase.DECODE:
            return
        held, logical = self.cache.physical_length(layer), self.cache.logical_length()
        self._calls[layer].append(_Call(plan, k.shape[1], held, logical))

    def _dense(self, layer: int, q: Tensor) -> Tensor:
        window = self._windows[layer]
        if q.shape[1] > 1:
            k, v = self.cache.gather(layer)
            return self.kernels.flash(q, k, v, causal=True, window=window, scale=self.scale)
        view = self.cache.view(layer)
        decode = self.kernels.decode(view.page_table is not None)
        return decode(
            q,
            view.k,
            view.v,
            cache_seqlens=view.seqlens,
            page_table=view.page_table,
            window=window,
            scale=self.scale,
        )

    def _planned(self, layer: int, q: Tensor, plan: Plan) -> Tensor:
        k, v = self.cache.gather(layer)
        if isinstance(plan, StarPlan):
            return self._star(q, k, v, plan)
        return self.kernels.sparse(plan)(q, k, v, plan, scale=self.scale)

    def _star(self, q: Tensor, k: Tensor, v: Tensor, plan: StarPlan) -> Tensor:
        return self.kernels.star(
            q,
            k,
            v,
            block_size=plan.block_size,
            anchor_size=plan.anchor_size,
            scale=self.scale,
        )
