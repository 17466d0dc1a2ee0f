"""Sums of 64 bits that an assembler got wrong."""

from __future__ import annotations

import re

__all__ = ["halves_of_one_register"]

_OPERAND = re.compile(r"U?R\d+|U?P\d")
_LOW = re.compile(r"\bU?IADD3 (U?R\d+), (U?P\d), (U?R\d+)")
_HIGH = re.compile(r"\bU?IADD3\.X (.*);")
_WRITTEN = re.compile(r"\*/\s+(?:@!?U?P\w+ )?[A-Z0-9_.]+ (?:U?P\w+, )*(U?R\d+)")


def halves_of_one_register(sass: str) -> tuple[str, ...]:
    """Return the sums whose high half is added from the register of the low half.

    Both halves of an address or of a matrix descriptor never lie in one register. ptxas 12.8 takes
    the base of shared memory for both where it should have made a descriptor of it: the matrix
    instruction then reads outside of shared memory.
    """
    found: list[str] = []
    pending: dict[str, tuple[str, str]] = {}  # by the predicate that carries: source, instruction
    for line in sass.splitlines():
        high = _HIGH.search(line)
        if high:
            operands = _OPERAND.findall(high[1])[1:]
            found += [
                f"{instruction} with {high[0]}"
                for carry, (source, instruction) in pending.items()
                if carry in operands and source in operands
            ]
        written = _WRITTEN.search(line)
        if written:
            pending = {c: kept for c, kept in pending.items() if kept[0] != written[1]}
        low = _LOW.search(line)
        if low and low[1] != low[3]:
            pending[low[2]] = (low[3], low[0])
        elif low:
            pending.pop(low[2], None)
    return tuple(found)
