"""Memory between the kernels of one call, kept for the next call.

Kernels of one stream run one after another, so that calls of one thread on one stream may share
it; another thread may launch between two kernels of a call, and has its own. An allocation takes
the host as long as half a launch.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from longctx_triton.launch.direct import raw_stream

__all__ = ["Pieces", "scratch"]

Pieces = tuple[tuple[int, torch.dtype] | tuple[int, torch.dtype, torch.dtype], ...]
"""Numbers and dtype of each piece, and the dtype in which it is handed out once more."""

ALIGNMENT = 256
"""Bytes, at whose multiples pieces begin."""
MOST_BYTES = 16 << 20
"""Of a stream; calls that need more, which take longer too, allocate them."""
LEAST_BYTES = 1 << 20
MOST_KEPT = 1024
"""Ways to cut memory that are remembered."""


class _Kept(threading.local):
    """Memory of a thread's streams, and the pieces that calls cut it into."""

    def __init__(self) -> None:
        self.memory: dict[tuple[int, int], Tensor] = {}
        self.pieces: dict[tuple[int, int, Pieces], tuple[Tensor, ...]] = {}


_kept = _Kept()


def scratch(like: Tensor, pieces: Pieces) -> tuple[Tensor, ...]:
    """Return memory for the kernels of one call, with anything in it.

    A call asks once: two answers may overlap. A call that is captured into a CUDA graph gets
    memory of its own, which stays the graph's.

    Parameters
    ----------
    like : Tensor
        On the GPU that is current.
    pieces : tuple of (int, torch.dtype) or (int, torch.dtype, torch.dtype)
        Size and dtype of each piece, of one dimension; one of two dtypes comes in both, the
        second, whose numbers fit the piece, right after the first.
    """
    index = like.get_device()
    if index >= 0 and not torch.cuda.is_current_stream_capturing():
        key = (index, raw_stream(index), pieces)
        found = _kept.pieces.get(key)
        if found is not None:
            return found
        size = _size(pieces)
        if size <= MOST_BYTES:
            return _keep(key, size, like.device)
    return _cut(_memory(_size(pieces), like.device), pieces)


def _bytes(piece: tuple[int, torch.dtype] | tuple[int, torch.dtype, torch.dtype]) -> int:
    return math.ceil(piece[0] * piece[1].itemsize / ALIGNMENT) * ALIGNMENT


def _size(pieces: Pieces) -> int:
    return sum(map(_bytes, pieces))


def _memory(size: int, device: torch.device) -> Tensor:
    """Return bytes, a multiple of 4 of them, allocated as numbers like any other."""
    return torch.empty(size // 4, dtype=torch.float32, device=device).view(torch.uint8)


def _cut(memory: Tensor, pieces: Pieces) -> tuple[Tensor, ...]:
    cut, begin = [], 0
    for piece in pieces:
        part = memory[begin : begin + piece[0] * piece[1].itemsize]
        cut += [part.view(dtype) for dtype in piece[1:]]
        begin += _bytes(piece)
    return tuple(cut)


def _keep(key: tuple[int, int, Pieces], size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return pieces of a stream's memory, which grows if it has to."""
    index, stream, pieces = key
    memory = _kept.memory.get((index, stream))
    if len(_kept.pieces) >= MOST_KEPT:
        _kept.pieces.clear()
    if memory is None or len(memory) < size:
        for other in [k for k in _kept.pieces if k[:2] == (index, stream)]:
            del _kept.pieces[other]
        memory = _kept.memory[index, stream] = _allocated(max(size, LEAST_BYTES), device)
    found = _kept.pieces[key] = _cut(memory, pieces)
    return found


def _allocated(size: int, device: torch.device) -> Tensor:
    """Return memory from the stream's usual pool, whatever pool this thread is told to use.

    A pool that ends with a block of code, as of the calls before a capture, must not hold what is
    kept longer; that choice is a thread's own.
    """
    stream = torch.cuda.current_stream(device)
    found: list[Tensor] = []

    def allocate() -> None:
        with torch.cuda.stream(stream):
            found.append(_memory(size, device))

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    # what failed there, such as for lack of memory, fails here with its own words
    return found[0] if found else _memory(size, device)
