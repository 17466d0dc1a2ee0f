"""Which tiles are worth a try beside the code's own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longctx_triton.launch.tuning import Value

__all__ = ["MOVES", "Built", "neighbours", "unfit"]

SPILLS = 16
"""Spilled registers that a loop may hide, where the code's own tiles have none."""

Move = Mapping[str, Value]
"""New values by field; a text such as ``"*2"``, ``"/2"``, ``"+1"`` or ``"-1"`` changes the old."""

_LOOPS: tuple[Move, ...] = (
    {"block_k": "/2"},
    {"block_k": "/2", "num_stages": "+1"},
    {"block_k": "*2", "num_stages": "-1"},
    {"num_stages": "+1"},
    {"num_stages": "-1"},
    {"block_q": "/2", "num_warps": 4},
)
"""Of kernels that hold queries and walk keys."""

_KEY_LOOPS: tuple[Move, ...] = (
    {"block_q": "/2"},
    {"block_q": "/2", "num_stages": "+1"},
    {"block_q": "*2", "num_stages": 2},
    {"num_stages": "+1"},
    {"num_stages": "-1"},
    {"block_k": "/2", "num_warps": 4},
    {"block_k": "/2", "block_q": "*2"},
)
"""Of the kernel that holds keys and walks queries."""

_SPARSE: tuple[Move, ...] = (
    {"keys": "/2"},
    {"keys": "/2", "stages": "+1"},
    {"stages": "+1"},
    {"stages": "-1"},
    {"queries": "/2", "warps": 4},
    {"queries": "/2", "keys": "/2", "warps": 4},
    {"queries": "/2", "keys": "/2", "warps": 4, "stages": "+1"},
)

MOVES: Mapping[str, tuple[Move, ...]] = {
    "flash_forward": _LOOPS,
    "flash_dq": _LOOPS,
    "flash_dkdv": _KEY_LOOPS,
    "decode": (
        {"block_n": "/2"},
        {"block_n": "/2", "num_stages": "+2"},
        {"block_n": "*2"},
        {"num_stages": "+1"},
        {"num_stages": "+2"},
        {"num_stages": "-1"},
        {"num_warps": 2},
        {"num_warps": 8},
        {"num_warps": 8, "programs": 1, "num_stages": 7},
        {"num_warps": 8, "programs": 1, "block_n": "*2", "num_stages": 4},
    ),
    "lightning": (
        {"block_v": "/2"},
        {"block_v": "*2", "num_warps": 8},
        {"block_t": "*2", "num_warps": 8, "num_stages": 2},
        {"num_stages": "+1"},
        {"num_stages": "-1"},
        {"num_warps": "*2"},
        {"num_warps": "/2"},
    ),
    "block_list": _SPARSE,
    "key_range": _SPARSE,
    "key_range_star": _SPARSE,
    "token_attention": _SPARSE,
    "topk_attention": (
        {"keys": "/2"},
        {"keys": "/2", "stages": "+1"},
        {"keys": "*2", "stages": "-1"},
        {"stages": "+1"},
        {"stages": "-1"},
        {"warps": "*2"},
        {"warps": "/2"},
        {"keys": "/2", "warps": "*2"},
    ),
    "index_scores": (
        {"keys": "/2"},
        {"keys": "/2", "stages": "+1"},
        {"stages": "+1"},
        {"stages": "-1"},
        {"warps": 4},
        {"keys": "/2", "warps": 4},
    ),
    "flash_hopper": (
        {"ping_pong": True},
        {"stages": "+1"},
        {"consumers": 3, "block_k": 64, "stages": 4, "registers": 160},
        {"block_k": "/2", "stages": 4},
    ),
    "key_walk": (
        {"stages": "+1"},
        {"block_k": "/2", "stages": "*2"},
    ),
    "token_walk": (
        {"stages": "-1"},
        {"stages": "+2"},
        {"registers": 232, "gather_registers": 40},
    ),
}
"""Changes of the code's own tiles, by the name of the choice: a handful each."""

_STEPS: Mapping[str, Callable[[int, int], int]] = {
    "*": operator.mul,
    "/": operator.floordiv,
    "+": operator.add,
    "-": operator.sub,
}


def neighbours(default: Any, moves: tuple[Move, ...]) -> list[dict[str, Value]]:
    """Return what the moves make of tiles, a NamedTuple, each once and without the tiles itself.

    A move is left out where a field does not exist or falls below 1.
    """
    old: dict[str, Value] = default._asdict()
    found: list[dict[str, Value]] = []
    for move in moves:
        if not move.keys() <= old.keys():
            continue
        new = old | {field: _moved(old[field], change) for field, change in move.items()}
        small = any(value < 1 for value in new.values() if type(value) is int)
        if not small and new != old and new not in found:
            found.append(new)
    return found


def _moved(old: Value, change: Value) -> Value:
    if isinstance(change, str) and isinstance(old, int):
        return _STEPS[change[0]](old, int(change[1:]))
    return change


@dataclass(frozen=True)
class Built:
    """What the compiler made of one kernel.

    Attributes
    ----------
    kernel : str
    spills : int
        Registers of a thread, of 4 bytes, that did not fit.
    """

    kernel: str
    spills: int


def unfit(built: Sequence[Built], default: Sequence[Built]) -> str:
    """Return why tiles are not worth timing; empty if they are.

    Parameters
    ----------
    built, default : sequence of Built
        Kernels of a call with these tiles and with the code's own.
    """
    allowed = max((kernel.spills for kernel in default), default=0)
    worst = max(built, key=lambda kernel: kernel.spills, default=None)
    if worst is not None and worst.spills > max(SPILLS, allowed):
        return f"{worst.kernel} spills {worst.spills} registers"
    return ""
