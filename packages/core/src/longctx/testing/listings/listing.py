"""What a compiler made of one kernel for one architecture, and what is expected of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from longctx.testing.listings.carries import halves_of_one_register
from longctx.testing.listings.descriptors import descriptors_of_one_path
from longctx.testing.listings.instructions import INSTRUCTIONS, count_ptx, count_sass

__all__ = ["SHARED_LIMITS", "Listing", "assert_listing"]

SHARED_LIMITS: Mapping[str, int] = MappingProxyType(
    {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}
)
"""Shared memory in bytes that one block can have, by architecture (CUDA C++ Programming Guide,
table "Technical Specifications per Compute Capability")."""


@dataclass(frozen=True)
class Listing:
    """A compiled kernel.

    Attributes
    ----------
    kernel : str
        Name of the kernel, with what sets this variant apart.
    arch : str
        What it was assembled for, such as ``"sm_90a"``.
    registers : int
        Registers of a thread when the kernel starts.
    spill_bytes : int
        Bytes of spill stores plus spill loads, of the kernel and the functions it calls.
    stack_bytes : int
        Local memory of a thread: spilled registers, and arrays indexed at run time, which the
        assembler does not call spills.
    shared_bytes : int
        Shared memory of a block, static plus dynamic.
    warnings : tuple of str
        What the assembler warned about, such as serialised wgmma or an ignored setmaxnreg.
    ptx : str
        The PTX.
    sass : str or None
        The disassembled machine code; None if nvdisasm is not installed.
    """

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    warnings: tuple[str, ...]
    ptx: str = field(repr=False)
    sass: str | None = field(repr=False)

    def count(self, kind: str) -> int:
        """Count instructions of a kind in the machine code, or in the PTX if there is none.

        Parameters
        ----------
        kind : str
            A name of `INSTRUCTIONS`, such as ``"wgmma"``.

        Raises
        ------
        ValueError
            The kind is not in the vocabulary.
        """
        if self.sass is None:
            return count_ptx(self.ptx, kind)
        return count_sass(self.sass, kind)

    def has(self, kind: str) -> bool:
        """Tell whether there is any instruction of a kind; see `count`."""
        return self.count(kind) > 0

    def summary(self) -> str:
        """Return resources and instruction counts in one line."""
        counts = {kind: self.count(kind) for kind in INSTRUCTIONS}
        found = ", ".join(f"{kind} {n}" for kind, n in counts.items() if n)
        return (
            f"{self.registers} registers, {self.spill_bytes} bytes of spills, "
            f"{self.stack_bytes} bytes of stack, {self.shared_bytes} bytes of shared memory; "
            f"{found or 'no instruction of a known kind'}"
        )


def assert_listing(
    listing: Listing,
    *,
    expected: Collection[str] = (),
    forbidden: Collection[str] = (),
    max_registers: int | None = None,
    max_spill_bytes: int = 0,
    max_stack_bytes: int | None = None,
    max_shared_bytes: int | None = None,
    allowed_warnings: Collection[str] = (),
) -> Listing:
    """Fail with everything that is wrong with a compiled kernel; return the listing otherwise.

    Machine code of a known fault of the assembler fails too: see `halves_of_one_register` and
    `descriptors_of_one_path`.

    Parameters
    ----------
    listing : Listing
        The kernel.
    expected, forbidden : collection of str
        Kinds of `INSTRUCTIONS` that must, or must not, occur.
    max_registers : int, optional
        Most registers of a thread.
    max_spill_bytes : int
        Most bytes of spill stores plus spill loads.
    max_stack_bytes : int, optional
        Most bytes of local memory of a thread; `max_spill_bytes` if None.
    max_shared_bytes : int, optional
        Most shared memory of a block; what the architecture can give if None, so that a kernel
        which could not be launched fails here.
    allowed_warnings : collection of str
        Parts of assembler warnings that are no failure, such as ``"C7508"``.

    Raises
    ------
    AssertionError
        An expectation is not met; the message names kernel and architecture, every finding, and
        what there is.
    ValueError
        A kind is not in the vocabulary.
    """
    if isinstance(expected, str) or isinstance(forbidden, str):
        raise ValueError("expected and forbidden are collections of kinds: write ('wgmma',)")
    limits = {
        "registers": (listing.registers, max_registers),
        "bytes of spills": (listing.spill_bytes, max_spill_bytes),
        "bytes of stack": (
            listing.stack_bytes,
            max_spill_bytes if max_stack_bytes is None else max_stack_bytes,
        ),
        "bytes of shared memory": (
            listing.shared_bytes,
            SHARED_LIMITS.get(listing.arch.rstrip("a"))
            if max_shared_bytes is None
            else max_shared_bytes,
        ),
    }
    wrong = [f"no {kind}, which is expected" for kind in expected if not listing.has(kind)]
    wrong += [
        f"{listing.count(kind)} {kind}, which is forbidden"
        for kind in forbidden
        if listing.has(kind)
    ]
    wrong += [
        f"{found} {what}, at most {most} allowed"
        for what, (found, most) in limits.items()
        if most is not None and found > most
    ]
    wrong += [
        f"both halves of a sum from one register: {text}"
        for text in halves_of_one_register(listing.sass or "")
    ]
    wrong += [
        f"a matrix descriptor that is not made on every path to its use: {text}"
        for text in descriptors_of_one_path(listing.sass or "")
    ]
    wrong += [
        f"assembler warning: {text}"
        for text in listing.warnings
        if not any(allowed in text for allowed in allowed_warnings)
    ]
    if wrong:
        findings = "\n".join(f"  - {finding}" for finding in wrong)
        raise AssertionError(
            f"{listing.kernel} for {listing.arch}:\n{findings}\n  found: {listing.summary()}"
        )
    return listing
