"""Launches that find their compiled kernel by a cheap key from the second one on.

``kernel[grid](...)`` looks at the arguments of one of the kernels here for 20 to 30 microseconds.
Less decides what was compiled: constants, dtypes of tensors that begin at a multiple of 16 bytes,
and which numbers are 1 or multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from longctx_triton.launch.direct import (
    Encode,
    Run,
    direct_run,
    encoder,
    raw_stream,
    watched,
)

__all__ = ["Block", "Launches", "Prepared", "launch"]

ALIGNMENT = 16
"""Triton compiles for pointers and for integers that are multiples of it, or for any."""
_INT32 = range(-(2**31), 2**31)


class _Compiled(NamedTuple):
    """How a compiled kernel is started, and how its descriptors are encoded, if they are."""

    run: Run
    encode: Encode | None


_Chosen = Callable[[Sequence[Any]], tuple[Any, ...]]
_Describe = Callable[[list[int | None], tuple[Tensor | None, ...]], Sequence[object]]
_Step = tuple[
    int, int, int, Callable[..., Any], tuple[object, ...], _Describe | None, _Chosen,
    tuple[object, ...],
]  # fmt: skip
"""Grid, what starts, what comes first, descriptors, pointers, and what comes last."""

_known: dict[tuple[object, ...], _Compiled] = {}
"""Compiled kernels by what decided them."""
_repeated: dict[tuple[object, ...], Run] = {}
"""The same by the very numbers of earlier calls, which takes no look at each of them."""
MOST_REPEATED = 4096
MOST_ENCODED = 1024
"""Addresses at which a launch keeps a descriptor."""


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
        self._runs: dict[tuple[object, ...], _Started] = {}
        self._templates: tuple[Any, ...] = ()

    def __call__(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launch ``kernel``, always the same, on the GPU that is current; the first is on it."""
        device = tensors[0].get_device()  # type: ignore[union-attr]
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        low = 0
        for pointer in pointers:
            if pointer:
                low |= pointer
        if low % ALIGNMENT or watched():
            self._ordinary(kernel, tensors)
            return
        found = (device, *[None if t is None else t.dtype for t in tensors])
        started = self._runs.get(found)
        if started is None:
            started = self._find(kernel, found, tensors)
            if started is None:
                return
        start, head, tail = started.run
        if self._templates:
            count = len(self._templates)
            addresses = tuple(pointers[:count])
            described = started.described(self._templates, tensors, addresses)
            head, pointers = (*head, *described), pointers[count:]
        start(*self.grid, raw_stream(device), *head, *pointers, *tail)

    def step(self, places: tuple[int, ...], tensors: list[Tensor | None]) -> _Step | None:
        """Return how tensors of these dtypes, at these places among others, are launched.

        None if that is not known yet.
        """
        dtypes = [None if t is None else t.dtype for t in tensors]
        started = self._runs.get((tensors[0].get_device(), *dtypes))  # type: ignore[union-attr]
        if started is None:
            return None
        start, head, tail = started.run
        count = len(self._templates)
        describe = started.describing(self._templates, _chosen(places[:count])) if count else None
        x, y, z = self.grid
        return x, y, z, start, head, describe, _chosen(places[count:]), tail

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
    ) -> _Started | None:
        """Return what was compiled for other shapes; else launch, and keep what that compiled."""
        blocks = [(block.block_shape, block.describe) for block in self.blocks]
        kinds = map(_kind, self.numbers)
        key = (id(kernel), *dtypes, *blocks, *kinds, *self.constants, *self.constants.values())
        known = _known.get(key)
        launched = known is None
        if known is None:
            known = _compiled(
                kernel, self._ordinary(kernel, tensors), len(tensors) + len(self.numbers)
            )
        if known is None:
            return None
        self._templates = tuple(_copied(d, None) for d in self._described(tensors))
        _known[key] = known
        self._runs[dtypes] = _Started(known, len(self.blocks), self.numbers)
        return None if launched else self._runs[dtypes]


class Launches:
    """Launches one after another, which look at each tensor of a call once.

    Parameters
    ----------
    steps : tuple of (Prepared, tuple of int)
        Launches, and which of the call's tensors each of them takes.
    given : int, optional
        How many of the first tensors the caller gave, default all. The others are the call's own,
        of dtypes that follow from the plan and from these, at addresses that PyTorch chose.
    """

    __slots__ = ("_runs", "given", "steps")

    def __init__(self, *steps: tuple[Prepared, tuple[int, ...]], given: int | None = None) -> None:
        self.steps = steps
        self.given = given
        self._runs: dict[tuple[object, ...], list[_Step]] = {}

    def __call__(self, kernels: tuple[Any, ...], *tensors: Tensor | None) -> None:
        """Launch ``kernels``, always the same, on the GPU that is current."""
        device = tensors[0].get_device()  # type: ignore[union-attr]
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        low = 0
        for pointer in pointers[: self.given]:
            if pointer:
                low |= pointer
        found = (device, *[None if t is None else t.dtype for t in tensors[: self.given]])
        runs = self._runs.get(found)
        if runs is None or low % ALIGNMENT or watched():
            self._apart(kernels, tensors, found)
            return
        stream = raw_stream(device)
        for x, y, z, start, head, describe, chosen, tail in runs:
            described = describe(pointers, tensors) if describe else ()
            start(x, y, z, stream, *head, *described, *chosen(pointers), *tail)

    def _apart(
        self, kernels: tuple[Any, ...], tensors: tuple[Tensor | None, ...], found: tuple[Any, ...]
    ) -> None:
        """Launch one by one; keep how, once each is known."""
        runs = []
        for kernel, (prepared, places) in zip(kernels, self.steps, strict=True):
            given = [tensors[place] for place in places]
            prepared(kernel, *given)
            step = prepared.step(places, given)
            if step is not None:
                runs.append(step)
        if len(runs) == len(self.steps):
            self._runs[found] = runs


def _chosen(places: tuple[int, ...]) -> _Chosen:
    """Return what takes the values at these places, always as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple([values[place] for place in places])


class _Started:
    """A compiled kernel for tensors of some dtypes, and the descriptors that it was given."""

    __slots__ = ("_encode", "_encoded", "_together", "run")

    def __init__(self, compiled: _Compiled, blocks: int, numbers: tuple[int | float, ...]) -> None:
        run, self._encode = compiled
        self.run = run.start, run.head, (*numbers, *run.tail)
        self._encoded: list[dict[int, tuple[object, ...]]] = [{} for _ in range(blocks)]
        self._together: dict[tuple[int | None, ...], list[object]] = {}

    def describing(self, templates: tuple[Any, ...], chosen: _Chosen) -> _Describe:
        """Return what describes those of a call's addresses and tensors that ``chosen`` takes."""
        together = self._together

        def describe(
            pointers: list[int | None], tensors: tuple[Tensor | None, ...]
        ) -> Sequence[object]:
            addresses = chosen(pointers)
            found = together.get(addresses)
            if found is None:
                found = self.described(templates, chosen(tensors), addresses)
            return found

        return describe

    def described(
        self,
        templates: tuple[Any, ...],
        tensors: tuple[Tensor | None, ...],
        addresses: tuple[int | None, ...],
    ) -> list[object]:
        """Return what stands for the descriptors of the first tensors, at these addresses."""
        if self._encode is None:
            return [
                _copied(template, tensor)
                for template, tensor in zip(templates, tensors, strict=False)
            ]
        found = self._together.get(addresses)
        if found is None:
            found = self._described_new(self._encode, templates, tensors)
            if len(self._together) >= MOST_ENCODED:
                self._together.clear()
            self._together[addresses] = found
        return found

    def _described_new(
        self, encode: Encode, templates: tuple[Any, ...], tensors: tuple[Tensor | None, ...]
    ) -> list[object]:
        found: list[object] = []
        for position, template in enumerate(templates):
            tensor = tensors[position]
            pointer = tensor.data_ptr()  # type: ignore[union-attr]
            encoded = self._encoded[position]
            parameters = encoded.get(pointer)
            if parameters is None:
                if len(encoded) >= MOST_ENCODED:
                    encoded.clear()
                parameters = encode(position, _copied(template, tensor))
                encoded[pointer] = parameters
            found += parameters
        return found


def _compiled(kernel: Any, compiled: object, count: int) -> _Compiled | None:
    """Return how to start what an ordinary launch compiled, if that is known."""
    run = direct_run(kernel, compiled, count)
    return None if run is None else _Compiled(run, encoder(compiled))


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
    device = args[0].get_device()
    low = 0
    values: list[Any] = []
    exact: list[object] = [id(kernel), device]
    for value in args:
        if isinstance(value, Tensor):
            pointer = value.data_ptr()
            low |= pointer
            values.append(pointer)
            exact.append(value.dtype)
        else:
            values.append(value)
            # equal numbers of different types are compiled apart
            exact.append(value if type(value) is int else (type(value), value))
    if low % ALIGNMENT or watched():
        kernel[grid](*args, **constants)
        return
    key = (*exact, *constants, *constants.values())
    run = _repeated.get(key)
    if run is None:
        run = _launch_new(kernel, grid, args, constants, key)
        if run is None:
            return
    run(*(*grid, 1, 1)[:3], raw_stream(device), *values)


def _launch_new(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: Mapping[str, Any],
    exact: tuple[object, ...],
) -> Run | None:
    """Return what was compiled for other numbers; else launch, and keep what that compiled."""
    kinds = [value.dtype if isinstance(value, Tensor) else _kind(value) for value in args]
    key = (id(kernel), args[0].get_device(), *kinds, *constants, *constants.values())
    known = _known.get(key)
    launched = known is None
    if known is None:
        known = _compiled(kernel, kernel[grid](*args, **constants), len(args))
    if known is None:
        return None
    if len(_repeated) >= MOST_REPEATED:
        _repeated.clear()
    _known[key] = known
    _repeated[exact] = known.run
    return None if launched else known.run


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
