"""Launches that find their compiled kernel by a cheap key from the second one on.

``kernel[grid](...)`` looks at the arguments of one of the kernels here for 20 to 30 microseconds.
Less decides what was compiled: constants, dtypes of tensors that begin at a multiple of 16 bytes,
and which numbers are 1 or multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from longctx_triton.launch.direct import Run, direct_run, raw_stream, watched

__all__ = ["Block", "Prepared", "launch"]

ALIGNMENT = 16
"""Triton compiles for pointers and for integers that are multiples of it, or for any."""
_INT32 = range(-(2**31), 2**31)

_known: dict[tuple[object, ...], Run] = {}
"""Compiled kernels by what decided them."""


class Block(NamedTuple):
    """What the copy engine moves of a tensor at a time.

    Attributes
    ----------
    shape, strides, block_shape : tuple of int
    describe : callable
        ``describe(tensor, shape, strides, block_shape)`` makes Triton's descriptor.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    describe: Callable[[Tensor, list[int], list[int], list[int]], Any]

    def of(self, tensor: Tensor) -> Any:
        """Return the descriptor of a tensor."""
        return self.describe(tensor, list(self.shape), list(self.strides), list(self.block_shape))


class Prepared:
    """A launch but for its tensors, for calls that repeat their shapes.

    Parameters
    ----------
    grid : tuple of int
        One to three extents.
    numbers : tuple of int or float
        The parameters between the tensors and the constants.
    constants : mapping of str to Any
        ``tl.constexpr`` parameters, which come last, and options such as ``num_warps``.
    blocks : tuple of Block
        How the first tensors are handed to the copy engine.
    """

    __slots__ = ("_runs", "_templates", "blocks", "constants", "grid", "numbers")

    def __init__(
        self,
        grid: tuple[int, ...],
        numbers: tuple[int | float, ...],
        constants: Mapping[str, Any],
        blocks: tuple[Block, ...] = (),
    ) -> None:
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.constants = constants
        self.blocks = blocks
        self._runs: dict[tuple[object, ...], Run] = {}
        self._templates: tuple[Any, ...] = ()

    def __call__(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launch ``kernel``, always the same, on the GPU that is current; the first is on it."""
        device = tensors[0].device.index  # type: ignore[union-attr]
        low = 0
        pointers: list[Any] = []
        dtypes: list[object] = [device]
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                dtypes.append(None)
            else:
                pointer = tensor.data_ptr()
                low |= pointer
                pointers.append(pointer)
                dtypes.append(tensor.dtype)
        if low % ALIGNMENT or watched():
            self._ordinary(kernel, tensors)
            return
        found = tuple(dtypes)
        run = self._runs.get(found)
        if run is None:
            run = self._find(kernel, found, tensors)
            if run is None:
                return
        if self._templates:
            described = map(_copied, self._templates, tensors)
            pointers[: len(self._templates)] = described
        run(*self.grid, raw_stream(device), *pointers, *self.numbers)

    def _ordinary(self, kernel: Any, tensors: tuple[Tensor | None, ...]) -> Any:
        arguments = (*self._described(tensors), *tensors[len(self.blocks) :], *self.numbers)
        return kernel[self.grid](*arguments, **self.constants)

    def _described(self, tensors: tuple[Tensor | None, ...]) -> list[Any]:
        return [
            block.of(tensor)
            for block, tensor in zip(self.blocks, tensors, strict=False)
            if tensor is not None
        ]

    def _find(
        self, kernel: Any, dtypes: tuple[object, ...], tensors: tuple[Tensor | None, ...]
    ) -> Run | None:
        """Return what was compiled for other shapes; else launch, and keep what that compiled."""
        blocks = [(block.block_shape, block.describe) for block in self.blocks]
        kinds = map(_kind, self.numbers)
        key = (id(kernel), *dtypes, *blocks, *kinds, *self.constants, *self.constants.values())
        run = _known.get(key)
        launched = run is None
        if run is None:
            compiled = self._ordinary(kernel, tensors)
            run = direct_run(kernel, compiled, len(tensors) + len(self.numbers))
        if run is not None:
            self._templates = tuple(_copied(d, None) for d in self._described(tensors))
            _known[key] = self._runs[dtypes] = run
        return None if launched else run


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Do ``kernel[grid](*args, **constants)`` on the GPU that is current.

    Parameters
    ----------
    kernel : triton.JITFunction
        A kernel of a module: its identity is part of the key.
    grid : tuple of int
        One to three extents.
    *args : Tensor, int, float or None
        The first is a tensor on that GPU.
    **constants
        ``tl.constexpr`` parameters, which come last, and options.
    """
    device = args[0].device.index
    values: list[Any] = []
    key: list[object] = [id(kernel), device]
    for value in args:
        if isinstance(value, Tensor):
            pointer = value.data_ptr()
            if pointer % ALIGNMENT:
                kernel[grid](*args, **constants)
                return
            values.append(pointer)
            key.append(value.dtype)
        else:
            values.append(value)
            key.append(_kind(value))
    if watched():
        kernel[grid](*args, **constants)
        return
    decided = (*key, *constants, *constants.values())
    run = _known.get(decided)
    if run is None:
        compiled = kernel[grid](*args, **constants)
        run = direct_run(kernel, compiled, len(args))
        if run is not None:
            _known[decided] = run
        return
    run(*(*grid, 1, 1)[:3], raw_stream(device), *values)


def _kind(value: object) -> object:
    """Return what Triton distinguishes about a number, at least."""
    if value is None:
        return None
    if type(value) is not int:
        return type(value)
    if value == 1:
        return 1
    return value % ALIGNMENT == 0, value in _INT32


def _copied(descriptor: Any, base: Tensor | None) -> Any:
    """Return a descriptor like another, of another tensor, without checking it again."""
    copied = object.__new__(type(descriptor))
    copied.__dict__.update(descriptor.__dict__, base=base)
    return copied
