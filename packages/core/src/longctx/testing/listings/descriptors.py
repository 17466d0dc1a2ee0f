"""Matrix descriptors that an assembler made on only some of the paths to their use."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["descriptors_of_one_path"]

_LABEL = re.compile(r"\s*([.$]\S+):\s*$")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@\S+\s+)?([^;]*?)\s*;")
_TARGET = re.compile(r"\.L_\w+")
_ENDS_BLOCK = re.compile(r"BR[AX]\b|EXIT\b|RET\b")
# `BRA UP0, ...` and `BRA.DIV UR4, ...` go on where their operand says so
_CONDITIONAL = re.compile(r"BRA\S* [^`]")
# other instructions that name a uniform register first only read it
_RESULT = re.compile(
    r"((?:U(?!ISETP|PLOP3)|R2UR|S2UR|CS2UR|REDUX|VOTEU|ELECT)[\w.]*) (?:U?P\w+, )*UR(\d+)\b"
)
_PAIR = re.compile(r"\.(?:64|WIDE)\b")
_USE = re.compile(r"[A-Z]GMMA\S* R\d+, (R\d+, )?gdesc\[UR(\d+)\]")

_Reaching = dict[int, frozenset[str]]
"""By uniform register: the instructions one of which has made its value."""
_Read = tuple[int, str, frozenset[str]]
"""Register, the matrix instruction that reads it, and what may have made it."""


@dataclass
class _Block:
    """Instructions without a branch between them: whether predicated, and the text."""

    instructions: list[tuple[bool, str]] = field(default_factory=list)
    successors: list[str | int] = field(default_factory=list)  # labels, or the next block's place


def descriptors_of_one_path(sass: str) -> tuple[str, ...]:
    """Return the descriptors that were made on only some of the paths to a matrix instruction.

    Two loops one after the other can share a descriptor, and the first one can be skipped. ptxas
    12.8 makes the sum before the first loop, and in the second one takes its registers for it
    even if the branch jumped past the sum: they hold whatever was left there, and the matrix
    instruction reads outside of shared memory.

    A register counts if instructions with different names can have made its value, or on some path
    none at all. Those of one name may well take turns, such as an R2UR before a loop and one in
    it, so that what was left there by an instruction of the same name is not found.
    Branches count as taken and as not, whatever else their conditions decided before.

    Parameters
    ----------
    sass : str
        Machine code of one kernel, as nvdisasm prints it.

    Returns
    -------
    tuple of str
        Register, a matrix instruction that reads it, and the instructions that may have made it.
    """
    tracked = {register for use in _USE.finditer(sass) for register in _operands(use)}
    if not tracked:
        return ()
    blocks, labels = _read_blocks(sass)
    entering = {0: dict.fromkeys(tracked, frozenset({"nothing"}))}
    mixed: dict[int, list[_Read]] = {}
    work = [0]
    while work:
        place = work.pop()
        leaving = dict(entering[place])
        mixed[place] = _run(blocks[place].instructions, leaving)
        for successor in blocks[place].successors:
            following = labels.get(successor) if isinstance(successor, str) else successor
            if following is None or following == len(blocks):
                continue  # out of the kernel
            known = entering.get(following, leaving)
            joined = {register: makers | known[register] for register, makers in leaving.items()}
            if joined != entering.get(following):
                entering[following] = joined
                work.append(following)
    found = {(read[0], read[2]): read for place in sorted(mixed) for read in mixed[place]}
    return tuple(
        f"UR{register} of {text} from {' or '.join(sorted(makers))}"
        for register, text, makers in found.values()
    )


def _operands(use: re.Match[str]) -> range:
    """Return the registers of the descriptors: of B alone where A lies in registers."""
    first = int(use[2])
    return range(first + 2 if use[1] else first, first + 4)


def _read_blocks(sass: str) -> tuple[list[_Block], dict[str, int]]:
    """Return the basic blocks in their order, and the places of the labels."""
    blocks = [_Block()]
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = _LABEL.match(line)
        instruction = _INSTRUCTION.match(line)
        if label:
            blocks[-1].successors.append(len(blocks))
            labels[label[1]] = len(blocks)
            blocks.append(_Block())
        elif instruction:
            predicate, text = instruction.groups()
            if not _ENDS_BLOCK.match(text):
                if _RESULT.match(text) or _USE.match(text):
                    blocks[-1].instructions.append((bool(predicate), text))
                continue
            blocks[-1].successors += _TARGET.findall(text)
            if predicate or _CONDITIONAL.match(text):
                blocks[-1].successors.append(len(blocks))
            blocks.append(_Block())
    return blocks, labels


def _run(instructions: list[tuple[bool, str]], reaching: _Reaching) -> list[_Read]:
    """Carry `reaching` through a block; return what is read there of more than one kind."""
    mixed: list[_Read] = []
    for predicated, text in instructions:
        use = _USE.match(text)
        if use:
            reads = [(register, text, reaching[register]) for register in _operands(use)]
            mixed += [r for r in reads if len({maker.partition(" ")[0] for maker in r[2]}) > 1]
        result = _RESULT.match(text)
        if result:
            first = int(result[2])
            for register in range(first, first + (2 if _PAIR.search(result[1]) else 1)):
                if register in reaching:
                    kept = reaching[register] if predicated else frozenset()
                    reaching[register] = kept | {text}
    return mixed
