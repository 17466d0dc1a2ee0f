"""What the quantiser launches, from shapes alone."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from longctx_triton.launch.device import Device
from longctx_triton.launch.prepared import Prepared
from longctx_triton.launch.sizes import padded

__all__ = ["QuantizePlan", "quantize_plan"]

TILE_ELEMENTS = 4096
"""Numbers that a program takes."""


class QuantizePlan(NamedTuple):
    """How rows are quantised.

    Attributes
    ----------
    launch : Prepared or None
        Of ``quantize_kernel``; None where there are no rows.
    hardware : bool
        Whether the GPU converts to e4m3; otherwise the kernel writes the codes as bytes.
    copied : bool
        Whether rows are copied first: their layout needs more than three strides.
    """

    launch: Prepared | None
    hardware: bool
    copied: bool


@lru_cache(maxsize=512)
def quantize_plan(
    shape: tuple[int, ...], strides: tuple[int, ...], power: bool, device: Device
) -> QuantizePlan:
    """Return how ``x (..., channels)`` of these strides is quantised.

    ``power`` rounds scales up to powers of two.
    """
    hardware = device.arch >= (8, 9)
    dim, rows = shape[-1], math.prod(shape[:-1])
    if rows == 0:
        return QuantizePlan(None, hardware, False)
    sizes, steps = _row_axes(shape, strides)
    copied = len(sizes) > 3
    if copied:
        sizes, steps = [rows], [dim]
    missing = 3 - len(sizes)
    sizes, steps = [1] * missing + sizes, [0] * missing + steps
    block = padded(dim)
    tile = max(1, TILE_ELEMENTS // block)
    launch = Prepared(
        (-(-rows // tile),),
        (*steps, rows, sizes[1], sizes[2]),
        {
            "D": dim, "BLOCK_D": block, "BLOCK_R": tile, "POWER": power, "HARDWARE": hardware,
            "num_warps": 4,
        },
    )  # fmt: skip
    return QuantizePlan(launch, hardware, copied)


def _row_axes(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Return sizes and strides of the leading axes, those that follow each other merged."""
    sizes: list[int] = []
    steps: list[int] = []
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if sizes and steps[-1] == stride * size:
            sizes[-1] *= size
            steps[-1] = stride
        else:
            sizes.append(size)
            steps.append(stride)
    return sizes, steps
