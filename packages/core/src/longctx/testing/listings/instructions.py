"""The closed vocabulary of instruction kinds, and how to count them in PTX and in machine code."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from longctx.errors import nearest_name

__all__ = ["INSTRUCTIONS", "InstructionKind", "count_ptx", "count_sass"]


@dataclass(frozen=True)
class InstructionKind:
    """How one kind of instruction is spelt.

    Attributes
    ----------
    meaning : str
        What the instructions of this kind do.
    ptx : str
        Regular expression for the start of a PTX instruction.
    sass : str
        Regular expression for a whole SASS mnemonic, without its modifiers.
    """

    meaning: str
    ptx: str
    sass: str


INSTRUCTIONS: Mapping[str, InstructionKind] = MappingProxyType(
    {
        "wgmma": InstructionKind(
            "matrix product of a warpgroup, operands in shared memory (sm_90a)",
            r"wgmma\.mma_async",
            r"[HQIB]GMMA",
        ),
        "mma": InstructionKind(
            "matrix product of a warp, operands in registers",
            r"(?:wmma\.mma|mma)\.(?:sp\S*\.)?sync",
            r"[HQIDB]MMA",
        ),
        "cp.async": InstructionKind(
            "copy from global to shared memory that bypasses registers",
            r"cp\.async\.c[ag]\.",
            r"LDGSTS",
        ),
        "tma": InstructionKind(
            "bulk copy or reduction by the copy engine (sm_90 and later)",
            r"cp\.(?:reduce\.)?async\.bulk\.(?!commit_group|wait_group|prefetch)",
            r"UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED",
        ),
        "ldmatrix": InstructionKind(
            "load of matrix fragments from shared memory", r"ldmatrix\.", r"LDSM"
        ),
        "stmatrix": InstructionKind(
            "store of matrix fragments to shared memory (sm_90 and later)", r"stmatrix\.", r"STSM"
        ),
        "atomic": InstructionKind(
            "atomic operation on global or shared memory",
            r"(?:atom|red)\.",
            r"ATOM|ATOMG|ATOMS(?!\.ARRIVE)|RED|REDG|REDS",
        ),
        "local": InstructionKind(
            "access to local memory: spilled registers, arrays indexed at run time",
            r"(?:ld|st)\.(?:volatile\.)?local\.",
            r"LDL|STL",
        ),
        "setmaxnreg": InstructionKind(
            "registers moved between warpgroups (sm_90a)", r"setmaxnreg\.", r"USETMAXREG"
        ),
        "fp64": InstructionKind(
            "arithmetic in double precision",
            r"(?:add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|min|max|abs|neg|setp)\.\S*f64",
            r"DADD|DMUL|DFMA|DSETP|DMNMX",
        ),
    }
)
"""Every kind by name."""


def count_ptx(ptx: str, kind: str) -> int:
    """Count the instructions of a kind in PTX; several may share a line of inline assembly.

    Parameters
    ----------
    ptx : str
        PTX of one kernel.
    kind : str
        A name of `INSTRUCTIONS`.

    Raises
    ------
    ValueError
        The kind is not in the vocabulary.
    """
    code = re.sub(r"//.*", "", ptx)
    return len(_pattern(rf"(?:^|[;{{}}])\s*(?:@!?%?\w+\s+)?(?:{_kind(kind).ptx})").findall(code))


def count_sass(sass: str, kind: str) -> int:
    """Count the instructions of a kind in a disassembly of nvdisasm; see `count_ptx`."""
    address, predicate = r"\s*(?:/\*[0-9a-f]+\*/\s*)?", r"(?:@!?U?P\w+\s+)?"
    return len(_pattern(rf"^{address}{predicate}(?:{_kind(kind).sass})\b").findall(sass))


def _kind(name: str) -> InstructionKind:
    if name not in INSTRUCTIONS:
        raise ValueError(f"no instruction kind {name!r}; {nearest_name(name, INSTRUCTIONS)}")
    return INSTRUCTIONS[name]


@functools.cache
def _pattern(expression: str) -> re.Pattern[str]:
    return re.compile(expression, re.MULTILINE)
