"""Which layers a sparse method touches: all, a list, the late ones, those with little drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.plans import Plan
from longctx.protocols.selector import LayerChoice, SelectContext, SparsitySelector

__all__ = [
    "AllLayers",
    "DenseFirst",
    "DriftMeter",
    "DriftProfile",
    "LayerList",
    "ReuseFrom",
    "SecondHalf",
    "parse_layers",
]


@dataclass(frozen=True)
class AllLayers:
    """Every layer."""

    def applies(self, layer: int, num_layers: int) -> bool:
        """Return True."""
        return True


@dataclass(frozen=True)
class DenseFirst:
    """All layers but the first ``count``."""

    count: int

    def applies(self, layer: int, num_layers: int) -> bool:
        """Return whether the layer comes after the dense ones."""
        return layer >= self.count


@dataclass(frozen=True)
class LayerList:
    """The layers of an explicit list."""

    layers: tuple[int, ...]

    def applies(self, layer: int, num_layers: int) -> bool:
        """Return whether the layer is in the list.

        Raises
        ------
        ValueError
            If the list names a layer that the model lacks.
        """
        beyond = [n for n in self.layers if not 0 <= n < num_layers]
        if beyond:
            raise ValueError(
                f"the model has layers 0 to {num_layers - 1}, the list names {beyond[0]}"
            )
        return layer in self.layers


@dataclass(frozen=True)
class SecondHalf:
    """The later half of the layers: what the drift rule gives for most decoders."""

    def applies(self, layer: int, num_layers: int) -> bool:
        """Return whether the layer is in the later half."""
        return layer >= num_layers // 2


@dataclass(frozen=True)
class DriftProfile:
    """The layers that change the hidden states least (Inter-Layer Representation Drift).

    Dropping a token in a layer that hardly moves its state costs little (Token Sparse Attention,
    arXiv 2602.03216, section 3.3).

    Attributes
    ----------
    drift : tuple of float
        ``R_l = mean_t |h_{l+1,t} - h_{l,t}| / |h_{l,t}|`` of each layer; `DriftMeter` measures it.
    share : float
        Share of the layers to take, those of least drift first.
    """

    drift: tuple[float, ...]
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be between 0 and 1, got {self.share}")

    @property
    def layers(self) -> tuple[int, ...]:
        """The chosen layers, ascending; of equal drift the later goes first."""
        order = sorted(range(len(self.drift)), key=lambda n: (self.drift[n], -n))
        return tuple(sorted(order[: int(self.share * len(order))]))

    def applies(self, layer: int, num_layers: int) -> bool:
        """Return whether the layer is among those of least drift.

        Raises
        ------
        ValueError
            If the profile was measured on a model of another depth.
        """
        if len(self.drift) != num_layers:
            raise ValueError(
                f"the drift profile covers {len(self.drift)} layers, the model has {num_layers}: "
                "measure it again on this model"
            )
        return layer in self.layers


class DriftMeter:
    """Measures the drift of every layer during a forward call; give it as ``observe``."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def __call__(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Take the residual stream ``[B, T, E]`` before and after a layer."""
        before, after = before.float(), after.float()
        ratios = (after - before).norm(dim=-1) / (before.norm(dim=-1) + 1e-8)
        total = self._sums.get(layer, torch.zeros((), device=before.device))
        self._sums[layer] = total + ratios.sum()
        self._tokens[layer] = self._tokens.get(layer, 0) + ratios.numel()

    def profile(self, share: float = 0.5) -> DriftProfile:
        """Return what was measured so far."""
        drift = (float(self._sums[n]) / self._tokens[n] for n in sorted(self._sums))
        return DriftProfile(tuple(drift), share)


@dataclass(frozen=True)
class ReuseFrom:
    """A selector that copies an earlier layer's plan where told to (IndexCache, arXiv 2603.12201).

    Attributes
    ----------
    inner : SparsitySelector
        Asked at all other layers.
    sources : mapping of int to int
        For a layer, the earlier layer whose plan it takes.
    """

    inner: SparsitySelector
    sources: Mapping[int, int]

    def __post_init__(self) -> None:
        for layer, source in self.sources.items():
            if source >= layer:
                raise ValueError(f"layer {layer} can only reuse an earlier layer, got {source}")

    def select(self, context: SelectContext) -> Plan | None:
        """Return the source layer's plan (None if it was dense), or ask the inner selector."""
        if context.layer in self.sources:
            return context.earlier.get(self.sources[context.layer])
        return self.inner.select(context)


def parse_layers(text: str) -> LayerChoice:
    """Return the layer choice that a command line names.

    Parameters
    ----------
    text : str
        ``"all"``, ``"second-half"``, ``"from:N"`` (dense before N) or a list such as
        ``"3,4,8-11"``.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    text = text.strip().lower()
    if text in ("all", "second-half"):
        return AllLayers() if text == "all" else SecondHalf()
    try:
        if text.startswith("from:"):
            return DenseFirst(int(text.removeprefix("from:")))
        layers: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
        return LayerList(tuple(layers))
    except ValueError:
        raise ValueError(
            f"layers {text!r} not understood: use all, second-half, from:N or a list like 3,4,8-11"
        ) from None
