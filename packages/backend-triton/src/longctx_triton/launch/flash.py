"""Tile sizes of the flash kernels by device, head size and dtype."""

from __future__ import annotations

from typing import NamedTuple

from longctx_triton.launch.device import Device
from longctx_triton.launch.tuning import tuned

__all__ = ["Tiles", "dkdv_tiles", "dq_tiles", "forward_tiles"]


class Tiles(NamedTuple):
    """Sizes of one kernel's tiles and how Triton shall run it."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@tuned("flash_forward")
def forward_tiles(device: Device, width: int, plain: bool) -> Tiles:
    """Return the forward tiles.

    Parameters
    ----------
    device : Device
    width : int
        The larger of head_dim and value_dim, rounded up to a power of two.
    plain : bool
        Whether there is neither a left window nor a softcap nor fp8, which take registers.
    """
    width = max(width, 64)
    if device.arch == (0, 0):
        return Tiles(32, 16, 1, 1)
    if device.arch[0] == 9:
        if width == 64:
            return Tiles(128, 64, 8, 3)  # 128 registers: two blocks a multiprocessor
        if width == 128:
            return Tiles(128, 128, 8, 2) if plain else Tiles(128, 64, 8, 3)
        return Tiles(128, 64, 8, 2) if plain else Tiles(128, 32, 8, 3)
    if device.large_shared:
        large = {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3)}
        return large.get(width, Tiles(64, 32, 8, 2))
    small = {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 32, 8, 2)}
    return small.get(width, Tiles(64, 16, 8, 2))


@tuned("flash_dq")
def dq_tiles(device: Device, width: int, plain: bool) -> Tiles:
    """Return the tiles of the dq kernel; see `forward_tiles`."""
    width = max(width, 64)
    if device.arch == (0, 0):
        return Tiles(32, 16, 1, 1)
    if device.arch[0] == 9:
        if width == 64:
            return Tiles(128, 128, 8, 2) if plain else Tiles(128, 64, 8, 3)
        return Tiles(128, 64 if width == 128 else 32, 8, 2)
    if device.large_shared:
        large = {64: Tiles(128, 64, 8, 2), 128: Tiles(64, 64, 8, 2)}
        return large.get(width, Tiles(64, 32, 8, 1))
    small = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 1)}
    return small.get(width, Tiles(32, 16, 4, 1))


@tuned("flash_dkdv")
def dkdv_tiles(device: Device, width: int, plain: bool) -> Tiles:
    """Return the tiles of the dk, dv kernel; see `forward_tiles`."""
    width = max(width, 64)
    if device.arch == (0, 0):
        return Tiles(16, 32, 1, 1)
    if device.arch[0] == 9:
        hopper = {64: Tiles(64, 128, 8, 2), 128: Tiles(32, 128, 8, 3)}
        return hopper.get(width, Tiles(32, 64, 8, 1))
    if device.large_shared:
        large = {64: Tiles(32, 128, 8, 2), 128: Tiles(32, 64, 4, 2)}
        return large.get(width, Tiles(32, 64, 8, 1))
    small = {64: Tiles(32, 64, 4, 2), 128: Tiles(32, 64, 4, 1)}
    return small.get(width, Tiles(16, 32, 4, 1))
