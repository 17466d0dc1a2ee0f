"""Numbers that one warpgroup of a Hopper kernel tells others, turn after turn.

A mail is ``(numbers, told, heard)``: int32 shared memory ``[2, 128]``, and two mbarriers each,
which the teller arrives at and every hearer. The teller may be a turn ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from longctx_triton.compat import barrier

__all__ = ["PLACES", "hear", "read_place", "tell"]

PLACES = 128
"""Threads of a warpgroup.

Each writes a place of its own: writes of one number to one place by many threads are right too,
but a checker of races knows one writer only.
"""
_PLACES = gl.constexpr(PLACES)
_ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def read_place(numbers, place: gl.constexpr):
    """Return the number at ``place`` of shared memory, for every thread."""
    return gl.max(numbers.slice(place, 1).load(_ONE), 0)


@gluon.jit
def tell(turn, number, mail, layout: gl.constexpr):
    """Give ``number`` for turn ``turn``; ``layout`` has one of 128 places a thread."""
    numbers, told, heard = mail
    mbarrier.wait(heard.index(turn % 2), ((turn // 2) & 1) ^ 1)
    numbers.index(turn % 2).store(gl.full([_PLACES], 0, gl.int32, layout) + number)
    barrier()
    mbarrier.arrive(told.index(turn % 2), count=1)


@gluon.jit
def hear(turn, mail):
    """Return the number of turn ``turn``."""
    numbers, told, heard = mail
    mbarrier.wait(told.index(turn % 2), (turn // 2) & 1)
    number = read_place(numbers.index(turn % 2), 0)
    barrier()
    mbarrier.arrive(heard.index(turn % 2), count=1)
    return number
