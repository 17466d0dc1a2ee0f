"""Declared support of a backend, and the refusals computed from it.

A backend declares one `OpSupport` an op. Core turns the table into `Reason` records for a given
`OpRequest`; dispatch, ``longctx explain``, ``longctx doctor``, the conformance kit and the support
matrix of the documentation all read the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

__all__ = [
    "DTYPES",
    "OpRequest",
    "OpSupport",
    "Reason",
    "ReasonCode",
    "dtype_name",
    "reasons_against",
]


class ReasonCode(StrEnum):
    """The closed set of codes that a refusal may carry."""

    NOT_INSTALLED = "not-installed"
    IMPORT_FAILED = "import-failed"
    PROTOCOL_VERSION = "protocol-version"
    DUPLICATE_NAME = "duplicate-name"
    NO_DEVICE = "no-device"
    OP = "op"
    DEVICE = "device"
    ARCH = "arch"
    DTYPE = "dtype"
    HEAD_DIM = "head-dim"
    HEADS = "heads"
    LAYOUT = "layout"
    FEATURE = "feature"
    GRADIENT = "gradient"
    DETERMINISTIC = "deterministic"
    MEMORY = "memory"
    DISABLED = "disabled-by-user"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a backend refuses a request.

    Attributes
    ----------
    code : ReasonCode
        Machine-readable kind of refusal.
    message : str
        What was asked and what is supported, in one phrase.
    hint : str
        What the user can do about it; empty when nothing helps.
    """

    code: ReasonCode
    message: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the record as plain strings, for JSON."""
        return {"code": self.code.value, "message": self.message, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class OpRequest:
    """The static properties of one call: all that dispatch may look at.

    Attributes
    ----------
    op : str
        Public op name, such as ``"flash_attention"``.
    device_type : str
        ``"cpu"``, ``"cuda"``, ...
    arch : (int, int) or None
        CUDA compute capability of the device, None elsewhere.
    dtype : torch.dtype
        Data type of the queries (or of the op's first tensor).
    head_dim, value_dim : int
        Sizes of one query/key head and of one value head.
    q_heads, kv_heads : int
        Numbers of query heads and of key/value heads.
    features : tuple of str
        Sorted names of the optional features that the call uses (``"window"``, ``"varlen"``, ...).
    gradient : bool
        Whether autograd will ask for a backward pass.
    """

    op: str
    device_type: str
    arch: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    q_heads: int
    kv_heads: int
    features: tuple[str, ...] = ()
    gradient: bool = False

    def describe(self) -> str:
        """Return the request in named axes, for error messages."""
        arch = f" sm_{self.arch[0]}{self.arch[1]}" if self.arch else ""
        dims = f"head_dim {self.head_dim}"
        if self.value_dim != self.head_dim:
            dims += f" (values {self.value_dim})"
        text = (
            f"q heads {self.q_heads}, kv heads {self.kv_heads}, {dims}, "
            f"{dtype_name(self.dtype)}, {self.device_type}{arch}"
        )
        if self.features:
            text += f", with {' + '.join(self.features)}"
        if self.gradient:
            text += ", gradient wanted"
        return text


@dataclass(frozen=True, slots=True)
class OpSupport:
    """What a backend declares for one op.

    Attributes
    ----------
    dtypes : frozenset of torch.dtype
        Accepted data types of the first tensor.
    head_dims : frozenset of int, or None
        Accepted head sizes; None accepts any.
    value_dims : frozenset of int, or None
        Accepted value-head sizes where they differ from ``head_dims``; None accepts any.
    devices : frozenset of str
        Device types.
    min_arch, max_arch : (int, int) or None
        Inclusive bounds on the CUDA compute capability; ignored on other devices.
    features : frozenset of str
        Optional features (see `longctx.protocols.families.FEATURES`) that the op honours.
    gradient : bool
        Whether the backward primitive exists.
    deterministic : bool
        Same inputs give the same bits, run to run.
    deterministic_gradient : bool
        So do gradients. Where False, they still do under ``torch.use_deterministic_algorithms``.
    priority : int
        Order among the backends that can run a request; higher wins.
    arch_priority : mapping of (int, int) to int
        Overrides ``priority`` on the given compute capabilities (set from recorded benchmarks).
    """

    dtypes: frozenset[torch.dtype]
    head_dims: frozenset[int] | None = None
    value_dims: frozenset[int] | None = None
    devices: frozenset[str] = frozenset({"cuda"})
    min_arch: tuple[int, int] | None = None
    max_arch: tuple[int, int] | None = None
    features: frozenset[str] = frozenset()
    gradient: bool = False
    deterministic: bool = True
    deterministic_gradient: bool = True
    priority: int = 50
    arch_priority: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def priority_on(self, arch: tuple[int, int] | None) -> int:
        """Return the priority on a device of compute capability ``arch``."""
        return self.priority if arch is None else self.arch_priority.get(arch, self.priority)

    def as_dict(self) -> dict[str, Any]:
        """Return the table as JSON-ready values."""
        return {
            "dtypes": sorted(dtype_name(d) for d in self.dtypes),
            "head_dims": None if self.head_dims is None else sorted(self.head_dims),
            "devices": sorted(self.devices),
            "min_arch": self.min_arch,
            "max_arch": self.max_arch,
            "features": sorted(self.features),
            "gradient": self.gradient,
            "deterministic": self.deterministic,
            "deterministic_gradient": self.deterministic_gradient,
            "priority": self.priority,
        }


DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""Data types by the short names used in messages and on the command line."""

_SHORT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a data type (``"bf16"``, ``"fp8_e4m3"``)."""
    return _SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def reasons_against(support: OpSupport | None, request: OpRequest) -> tuple[Reason, ...]:
    """Compare a request with a declared table.

    Parameters
    ----------
    support : OpSupport or None
        The table of ``request.op``; None when the backend lacks the op.
    request : OpRequest
        The call's static properties.

    Returns
    -------
    tuple of Reason
        Empty when the backend can run the request.
    """
    if support is None:
        return (Reason(ReasonCode.OP, f"does not implement {request.op}"),)
    found: list[Reason] = []
    if request.device_type not in support.devices:
        wanted = "/".join(sorted(support.devices))
        found.append(
            Reason(
                ReasonCode.DEVICE,
                f"runs on {wanted}, tensors are on {request.device_type}",
                f"move the tensors to {wanted}",
            )
        )
    elif request.arch is not None:
        found.extend(_arch_reasons(support, request.arch))
    if request.dtype not in support.dtypes:
        names = ", ".join(sorted(dtype_name(d) for d in support.dtypes))
        found.append(
            Reason(
                ReasonCode.DTYPE,
                f"{dtype_name(request.dtype)} not in {{{names}}}",
                f"cast to one of {names}",
            )
        )
    for what, size, sizes in (
        ("head_dim", request.head_dim, support.head_dims),
        ("value head_dim", request.value_dim, support.value_dims or support.head_dims),
    ):
        if sizes is not None and size not in sizes:
            larger = min((s for s in sizes if s > size), default=None)
            names = ", ".join(str(s) for s in sorted(sizes))
            hint = f"pad to {larger} with zeros" if larger else ""
            found.append(Reason(ReasonCode.HEAD_DIM, f"{what} {size} not in {{{names}}}", hint))
            break
    found.extend(
        Reason(ReasonCode.FEATURE, f"no {feature} yet", f"call without {feature}")
        for feature in request.features
        if feature not in support.features
    )
    if request.gradient and not support.gradient:
        found.append(Reason(ReasonCode.GRADIENT, "no backward pass", "call under torch.no_grad()"))
    return tuple(found)


def _arch_reasons(support: OpSupport, arch: tuple[int, int]) -> list[Reason]:
    low, high = support.min_arch, support.max_arch
    if low is not None and arch < low:
        return [
            Reason(
                ReasonCode.ARCH,
                f"needs sm_{low[0]}{low[1]} or newer, this is sm_{arch[0]}{arch[1]}",
            )
        ]
    if high is not None and arch > high:
        return [
            Reason(
                ReasonCode.ARCH,
                f"made for sm_{high[0]}{high[1]} at most, this is sm_{arch[0]}{arch[1]}",
            )
        ]
    return []
