"""Starting a compiled kernel without inspecting its arguments again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

__all__ = ["Run", "direct_run", "raw_stream", "watched"]

Run = Callable[..., None]
"""Starts a compiled kernel: grid x, y, z, stream, then the parameters that are no constants."""

_KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
"""Whether the launcher takes what it is given below."""


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
    callable or None
        It takes pointers as integers. None where the ordinary launch has to do it: in the
        interpreter, with hooks on the kernel, with parameters given by name, and under another
        Triton.
    """
    if not _KNOWN or not isinstance(compiled, CompiledKernel) or kernel.pre_run_hooks:
        return None
    constants = kernel.params[count:]
    if not all(parameter.is_constexpr for parameter in constants):
        return None
    start, loaded, packed = compiled.run, compiled, compiled.packed_metadata
    # the launcher skips constants, which only have to be there
    rest = (None,) * len(constants)

    def run(x: int, y: int, z: int, stream: int, *values: object) -> None:
        # the function lives as long as its owner; neither launch metadata nor hooks
        start(x, y, z, stream, loaded.function, packed, None, None, None, *values, *rest)

    return run


def raw_stream(device: int) -> int:
    """Return the current stream of a GPU, as the driver knows it."""
    stream: int = driver.active.get_current_stream(device)
    return stream


def watched() -> bool:
    """Return whether a profiler wants to hear of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
