"""Starting a compiled kernel without inspecting its arguments again."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getclosurevars
from types import FunctionType
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher, make_tensordesc_arg
from triton.compiler import CompiledKernel
from triton.runtime import driver

__all__ = ["Encode", "Run", "direct_run", "encoder", "raw_stream", "watched"]


class Run(NamedTuple):
    """A compiled kernel that can be started.

    Attributes
    ----------
    start : callable
        It takes grid x, y, z and the stream, then ``head``, the parameters and ``tail``.
    head, tail : tuple
    owner : object
        What lives as long as the compiled function.
    """

    start: Callable[..., Any]
    head: tuple[object, ...]
    tail: tuple[object, ...]
    owner: object

    def __call__(self, x: int, y: int, z: int, stream: int, *values: object) -> None:
        """Start the kernel with parameters that are no constants."""
        self.start(x, y, z, stream, *self.head, *values, *self.tail)


Encode = Callable[[int, Any], tuple[object, ...]]
"""Returns the parameters that stand for the descriptor at a position among the descriptors."""

_KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
"""Whether the launcher takes what it is given below."""

_BARE = triton.__version__.startswith("3.6.")
"""Whether what the launcher calls takes what it is given below, where no scratch memory is due."""


def direct_run(kernel: Any, compiled: object, count: int) -> Run | None:
    """Return how to start what ``kernel[grid](...)`` compiled.

    Parameters
    ----------
    kernel : triton.JITFunction
        Or what stands for it in the interpreter, which has no compiled form.
    compiled : object
        What the ordinary launch returned.
    count : int
        Leading parameters that a launch gives; the others are ``tl.constexpr``.

    Returns
    -------
    Run or None
        It takes pointers as integers, and descriptors as `encoder` says. None where the ordinary
        launch has to do it: in the interpreter, with hooks on the kernel, with parameters given
        by name, and under another Triton.
    """
    if not _KNOWN or not isinstance(compiled, CompiledKernel) or kernel.pre_run_hooks:
        return None
    constants = kernel.params[count:]
    if not all(parameter.is_constexpr for parameter in constants):
        return None
    # the launcher skips constants, which only have to be there
    return Run(*_launcher(compiled), (None,) * len(constants), compiled)


def encoder(compiled: object) -> Encode | None:
    """Return how descriptors are put into what `direct_run` takes for them, None for as they are.

    What it returns refers to no tensor: it may be kept for tensors of the same shape, strides and
    dtype at the same address.
    """
    if not isinstance(compiled, CompiledKernel):
        return None
    unwrapped = _unwrapped(compiled.run)
    if unwrapped is None or not unwrapped[1]:
        return None
    metadata = unwrapped[1]

    def encode(position: int, descriptor: Any) -> tuple[object, ...]:
        return tuple(make_tensordesc_arg(descriptor, metadata[position]))

    return encode


def _launcher(compiled: CompiledKernel) -> tuple[Callable[..., Any], tuple[object, ...]]:
    """Return what starts a kernel, and what it takes between the stream and the parameters."""
    start = compiled.run
    # neither launch metadata nor hooks
    hooks = (compiled.packed_metadata, None, None, None)
    unwrapped = _unwrapped(start)
    if unwrapped is None:
        return start, (compiled.function, *hooks)
    flags = (start.launch_cooperative_grid, start.launch_pdl)
    return unwrapped[0], (compiled.function, *flags, None, None, *hooks)


def _unwrapped(start: Any) -> tuple[Callable[..., Any], list[Any]] | None:
    """Return the compiled function under a launcher, and what it knows of descriptors.

    None where the launcher has more to do: to allocate scratch memory, or under a Triton whose
    launcher is not known from inside.
    """
    if not _BARE or not isinstance(start, CudaLauncher):
        return None
    if start.global_scratch_size or start.profile_scratch_size:
        return None
    launch = start.launch
    if not isinstance(launch, FunctionType):
        return launch, []
    # a Python function that expands descriptors, around the compiled one
    inside = getclosurevars(launch).nonlocals
    metadata = inside.get("tensordesc_meta")
    if "launcher" not in inside or not metadata or not all(metadata):
        return None
    return inside["launcher"], metadata


def raw_stream(device: int) -> int:
    """Return the current stream of a GPU, as the driver knows it."""
    stream: int = driver.active.get_current_stream(device)
    return stream


def watched() -> bool:
    """Return whether a profiler wants to hear of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
