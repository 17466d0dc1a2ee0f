"""Rotary position embedding and its long-context scalings, in the half-split layout.

Formulas: default (Su et al., arXiv 2104.09864), linear (position interpolation, arXiv 2306.15595),
dynamic (NTK-aware base), yarn (arXiv 2309.00071), llama3 (Llama 3.1), longrope (arXiv 2402.13753);
values agree with transformers' ``modeling_rope_utils``.

Legend of suffixes: B batch, T tokens of this call, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ROPE_KINDS", "RopeConfig", "RotaryEmbedding", "apply_rope", "inverse_frequencies"]

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
"""The scaling kinds that `RopeConfig` knows."""


@dataclass(frozen=True)
class RopeConfig:
    """The ``rope_parameters`` of a checkpoint.

    Attributes
    ----------
    kind : str
        One of `ROPE_KINDS`.
    theta : float
        Base of the frequencies.
    head_dim : int
        Rotated sizes of a head: all of them.
    max_positions : int
        ``max_position_embeddings`` of the checkpoint.
    original_max_positions : int
        Length of the pretraining, before scaling.
    factor : float
        Stretch of the context.
    low_freq_factor, high_freq_factor : float
        Wavelength bounds of llama3.
    beta_fast, beta_slow : float
        Rotation counts between which yarn blends.
    truncate : bool
        Whether yarn rounds those bounds to whole dimensions.
    attention_factor : float
        Factor on cosine and sine (yarn, longrope), already resolved.
    short_factor, long_factor : tuple of float
        Longrope's factors a frequency, below and above ``original_max_positions``.
    """

    kind: str
    theta: float
    head_dim: int
    max_positions: int
    original_max_positions: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def usable_positions(self) -> int:
        """Context length with the scaling counted in."""
        if self.kind in ("linear", "dynamic"):
            return int(self.max_positions * self.factor)
        if self.kind == "yarn":
            return max(self.max_positions, int(self.original_max_positions * self.factor))
        return self.max_positions

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the sequence."""
        return self.kind in ("dynamic", "longrope")


def inverse_frequencies(rope: RopeConfig, length: int = 0) -> Tensor:
    """Return the angles a position adds, fp32 ``[head_dim // 2]`` on the CPU.

    Parameters
    ----------
    rope : RopeConfig
    length : int
        Tokens of the sequence so far; only dynamic and longrope look at it.
    """
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim
    if rope.kind == "dynamic":
        stretch = rope.factor * max(length, rope.max_positions) / rope.max_positions
        power = rope.head_dim / (rope.head_dim - 2)
        theta = rope.theta * (stretch - (rope.factor - 1)) ** power
        return torch.pow(theta, exponents).reciprocal()
    if rope.kind == "longrope":
        is_long = length > rope.original_max_positions
        factors = torch.tensor(rope.long_factor if is_long else rope.short_factor)
        return (factors * torch.pow(rope.theta, exponents)).reciprocal()
    frequencies = torch.pow(rope.theta, exponents).reciprocal()
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Divide long wavelengths by the factor, keep short ones, blend between."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Keep fast dimensions, divide slow ones by the factor, ramp between (NTK by parts)."""

    def dimension(rotations: float) -> float:
        wavelengths = rope.original_max_positions / (rotations * 2 * math.pi)
        return rope.head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001  # the ramp has no width: avoid 0 / 0
    ramp = (torch.arange(rope.head_dim // 2, dtype=torch.float32) - low) / (high - low)
    slow = ramp.clamp(0, 1)
    return frequencies / rope.factor * slow + frequencies * (1 - slow)


class RotaryEmbedding:
    """Cosine and sine of absolute positions; frequencies are kept a device.

    Parameters
    ----------
    config : RopeConfig
    """

    def __init__(self, config: RopeConfig) -> None:
        self.config = config
        self._frequencies: dict[tuple[torch.device, int], Tensor] = {}

    def tables(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return what `apply_rope` takes.

        Parameters
        ----------
        positions : Tensor, (tokens,) or (batch, tokens), int64
            Absolute positions.
        length : int
            Tokens of the whole sequence as far as it is known; dynamic and longrope choose their
            frequencies by it, so the chunks of one prompt must all be given the prompt's length.

        Returns
        -------
        cos, sin : Tensor, (..., tokens, 1, head_dim), float32
            The first half of ``sin`` carries the minus sign of the rotation.
        """
        angles = positions.unsqueeze(-1).float() * self._at(positions.device, length)
        cos, sin = angles.cos(), angles.sin()
        if self.config.attention_factor != 1.0:
            cos, sin = cos * self.config.attention_factor, sin * self.config.attention_factor
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def _at(self, device: torch.device, length: int) -> Tensor:
        key = (device, self._regime(length))
        if key not in self._frequencies:
            if len(self._frequencies) > 8:  # dynamic has one entry a length: keep the newest only
                self._frequencies.clear()
            self._frequencies[key] = inverse_frequencies(self.config, length).to(device)
        return self._frequencies[key]

    def _regime(self, length: int) -> int:
        if self.config.kind == "dynamic":
            return max(length, self.config.max_positions)
        return int(self.config.kind == "longrope" and length > self.config.original_max_positions)


def apply_rope(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, T, heads, D]`` by tables of `RotaryEmbedding.tables`, in fp32."""
    half = x_BTHD.shape[-1] // 2
    rotated = torch.addcmul(x_BTHD * cos, x_BTHD.roll(half, -1), sin)
    return rotated.to(x_BTHD.dtype)
