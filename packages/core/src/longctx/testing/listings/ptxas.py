"""Reading of what ``ptxas -v`` says, stand-alone or inside NVRTC and nvJitLink."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Resources", "read_report"]

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_PROPERTIES = re.compile(
    r"Function properties for (\S+)\n.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_WARNING = re.compile(
    r"^(?:ptxas\S*\s+warning\s*:|ptxas\S*\s+info\s*:\s+\(C\d+\)).*$", re.MULTILINE
)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as the assembler reports it.

    Attributes
    ----------
    arch : str
        What the kernel was assembled for.
    registers : int
        Registers of a thread.
    spill_bytes : int
        Bytes of spill stores plus spill loads, functions that are not inlined included.
    stack_bytes : int
        Local memory of a thread, callees included.
    shared_bytes : int
        Static shared memory of a block.
    warnings : tuple of str
        Warnings about this kernel, or about none in particular.
    """

    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    warnings: tuple[str, ...]


def read_report(report: str, entry: str) -> Resources:
    """Find one kernel in the report of ``ptxas -v``.

    Parameters
    ----------
    report : str
        What the assembler printed; may speak of several kernels.
    entry : str
        Symbol of the kernel.

    Raises
    ------
    ValueError
        The report does not speak of this kernel.
    """
    kernels = dict(_ENTRY.findall(report))
    if entry not in kernels:
        known = ", ".join(kernels) or "none"
        raise ValueError(f"the assembler's report has no kernel {entry!r}; kernels in it: {known}")
    start = report.index(f"Compiling entry function '{entry}'")
    following = _ENTRY.search(report, start + 1)
    section = report[start : following.start() if following else None]
    # a function that is not inlined is reported once, after whichever kernel came first
    own = [p for p in _PROPERTIES.findall(report) if p[0] == entry or p[0] not in kernels]
    spills = sum(int(stores) + int(loads) for _, _, stores, loads in own)
    frame = max((int(stack) for name, stack, *_ in own if name == entry), default=0)
    cumulative = _largest(r"(\d+) bytes cumulative stack size", section)
    return Resources(
        arch=kernels[entry],
        registers=_largest(r"Used (\d+) registers", section),
        spill_bytes=spills,
        stack_bytes=max(frame, cumulative),
        shared_bytes=_largest(r"(\d+) bytes smem", section),
        warnings=_warnings(report, entry),
    )


def _warnings(report: str, entry: str) -> tuple[str, ...]:
    found = dict.fromkeys(text.strip() for text in _WARNING.findall(report))
    about = {text: re.search(r"function '([^']+)'", text) for text in found}
    return tuple(text for text, named in about.items() if named is None or named[1] == entry)


def _largest(pattern: str, text: str) -> int:
    return max((int(number) for number in re.findall(pattern, text)), default=0)
