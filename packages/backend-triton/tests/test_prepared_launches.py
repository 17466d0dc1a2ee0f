"""Launches by a cheap key: it tells apart what Triton tells apart, and the right values arrive."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from longctx_triton.launch import prepared
from longctx_triton.launch.direct import Run, direct_run, watched
from longctx_triton.launch.prepared import Block, Launches, Prepared, launch

BF16, FP16 = torch.bfloat16, torch.float16


def one_argument(x):
    """Stand for a kernel's signature."""


def test_kinds_are_as_fine_as_the_compiler_s():
    kernel = JITFunction(one_argument)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values = [None, 0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1]
    values += [-(2**31), -(2**31) - 1, -(2**31) - 16, 2**40, 2**40 + 1, 0.0, 0.5, 1.0, True, False]
    for a, b in product(values, repeat=2):
        if prepared._kind(a) == prepared._kind(b):
            assert bind(a)[1] == bind(b)[1], (a, b)


class Kernel:
    """A kernel that counts ordinary launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def ordinary(*args, **constants):
            self.launches.append((grid, args, constants))
            return self

        return ordinary


@pytest.fixture
def kernel(monkeypatch):
    """Return a kernel whose direct launches are kept in ``runs``."""
    made = Kernel()
    made.runs = []
    monkeypatch.setattr(prepared, "_known", {})
    monkeypatch.setattr(prepared, "_repeated", {})
    monkeypatch.setattr(prepared, "raw_stream", lambda _: 7)
    run = Run(lambda *values: made.runs.append(values), (), (), None)
    monkeypatch.setattr(prepared, "direct_run", lambda *_: run)
    return made


def numbers(*shape, dtype=BF16, shift=0):
    """Return a tensor that begins ``shift`` elements after a multiple of 16 bytes."""
    memory = torch.empty(1024, dtype=dtype)
    shift += -memory.data_ptr() // memory.itemsize % (16 // memory.itemsize)
    return memory[shift : shift + torch.Size(shape).numel()].view(shape)


def test_second_launch_is_direct(kernel):
    plan = Prepared((3, 2), (5, 0.5), {"BLOCK": 16})
    plan(kernel, numbers(4), None, numbers(2))
    assert len(kernel.launches) == 1
    x, y = numbers(4), numbers(2)
    plan(kernel, x, None, y)
    assert len(kernel.launches) == 1
    assert kernel.runs == [(3, 2, 1, 7, x.data_ptr(), None, y.data_ptr(), 5, 0.5)]


def test_other_shapes_find_what_was_compiled(kernel):
    Prepared((3,), (32, 1), {"BLOCK": 16})(kernel, numbers(4))
    x = numbers(4)
    Prepared((9,), (64, 1), {"BLOCK": 16})(kernel, x)
    assert len(kernel.launches) == 1
    assert kernel.runs == [(9, 1, 1, 7, x.data_ptr(), 64, 1)]


@pytest.mark.parametrize(
    ("tensors", "values", "constants"),
    [
        ((numbers(4, dtype=FP16), None), (32,), {"BLOCK": 16}),
        ((numbers(4), numbers(4)), (32,), {"BLOCK": 16}),
        ((numbers(4), None), (33,), {"BLOCK": 16}),
        ((numbers(4), None), (1,), {"BLOCK": 16}),
        ((numbers(4), None), (2**40,), {"BLOCK": 16}),
        ((numbers(4), None), (32,), {"BLOCK": 32}),
        ((numbers(4), None), (32,), {"BLOCK": 16, "num_warps": 8}),
    ],
)
@pytest.mark.parametrize("planned", [True, False])
def test_what_is_compiled_apart_is_kept_apart(kernel, tensors, values, constants, planned):
    def go(tensors, values, constants):
        if planned:
            Prepared((1,), values, constants)(kernel, *tensors)
        else:
            launch(kernel, (1,), *tensors, *values, **constants)

    go((numbers(4), None), (32,), {"BLOCK": 16})
    go(tensors, values, constants)
    assert len(kernel.launches) == 2
    go((numbers(4), None), (48,), {"BLOCK": 16})
    go(tensors, values, constants)
    assert len(kernel.launches) == 2
    assert len(kernel.runs) == 2


@pytest.mark.parametrize("planned", [True, False])
def test_odd_addresses_and_profilers_take_the_ordinary_way(kernel, monkeypatch, planned):
    plan = Prepared((1,), (32,), {"BLOCK": 16})

    def go(x):
        if planned:
            plan(kernel, x)
        else:
            launch(kernel, (1,), x, 32, BLOCK=16)

    go(numbers(4, shift=1))
    go(numbers(4, shift=1))
    assert len(kernel.launches) == 2
    go(numbers(4))
    go(numbers(4, shift=1))
    assert len(kernel.launches) == 4
    monkeypatch.setattr(prepared, "watched", lambda: True)
    go(numbers(4))
    assert len(kernel.launches) == 5
    assert kernel.runs == []
    assert all(args[1:] == (32,) for _, args, _ in kernel.launches)


def test_launches_share_what_they_look_at(kernel):
    other = Kernel()
    plan = Launches(
        (Prepared((3,), (5,), {"BLOCK": 16}), (0, 1)), (Prepared((2,), (7,), {}), (2, 1, 0))
    )
    plan((kernel, other), numbers(4), None, numbers(2))
    assert (len(kernel.launches), len(other.launches)) == (1, 1)
    x, y = numbers(4), numbers(2)
    plan((kernel, other), x, None, y)
    expected = [
        (3, 1, 1, 7, x.data_ptr(), None, 5),
        (2, 1, 1, 7, y.data_ptr(), None, x.data_ptr(), 7),
    ]
    assert kernel.runs == expected
    assert (len(kernel.launches), len(other.launches)) == (1, 1)
    # of other dtypes, another kernel
    plan((kernel, other), numbers(4, dtype=FP16), None, y)
    plan((kernel, other), numbers(4, dtype=FP16), None, y)
    assert (len(kernel.launches), len(other.launches)) == (2, 2)
    # at odd addresses, the ordinary way for those that take them
    plan((kernel, other), x, None, numbers(2, shift=1))
    assert (len(kernel.launches), len(other.launches)) == (2, 3)
    plan((kernel, other), x, None, y)
    assert kernel.runs[-2:] == expected


def test_launches_look_at_what_the_caller_gave(kernel):
    plan = Launches((Prepared((3,), (5,), {"BLOCK": 16}), (0, 1, 2)), given=2)
    x, own = numbers(4), numbers(8)
    for given in (x, None, numbers(4, dtype=FP16), numbers(4, shift=1)):
        plan((kernel,), x, given, own)
    assert (len(kernel.launches), kernel.runs) == (4, [])
    # what is the call's own is taken for what it was
    own = numbers(8, shift=1)
    plan((kernel,), x, x, own)
    assert len(kernel.launches) == 4
    assert kernel.runs == [(3, 1, 1, 7, x.data_ptr(), x.data_ptr(), own.data_ptr(), 5)]


def test_launch_gives_pointers_and_numbers_in_order(kernel):
    x, y = numbers(4), numbers(2, dtype=torch.float32)
    for scale, length in ((0.5, 32), (0.25, 48)):
        launch(kernel, (2, 3), x, None, y, scale, length, 1, BLOCK=16)
    assert len(kernel.launches) == 1
    assert kernel.runs == [(2, 3, 1, 7, x.data_ptr(), None, y.data_ptr(), 0.25, 48, 1)]


class Description:
    """Stand for Triton's tensor descriptor."""

    made = 0

    def __init__(self, base, shape, strides, block_shape):
        type(self).made += 1
        self.base, self.shape, self.strides = base, shape, strides
        self.block_shape = block_shape


def test_descriptors_are_of_the_call_s_tensors(kernel):
    block = Block((4, 16), (16, 1), (2, 16), Description)
    plan = Prepared((1,), (32,), {}, (block,))
    plan(kernel, numbers(4, 16), numbers(4))
    assert isinstance(kernel.launches[0][1][0], Description)
    made = Description.made
    x, y = numbers(4, 16), numbers(4)
    plan(kernel, x, y)
    plan(kernel, y.view(1, 4), x)
    assert Description.made == made
    (*_, first, pointer, number), (*_, second, _, _) = kernel.runs
    assert (first.base is x, first.shape, first.strides) == (True, [4, 16], [16, 1])
    assert (pointer, number) == (y.data_ptr(), 32)
    assert second.base.data_ptr() == y.data_ptr()
    assert plan._templates[0].base is None


def test_descriptors_are_encoded_once_an_address(kernel, monkeypatch):
    encoded = []

    def encode(position, descriptor):
        encoded.append((position, descriptor.base.data_ptr()))
        return f"map of {descriptor.base.data_ptr()}", *descriptor.shape

    monkeypatch.setattr(prepared, "encoder", lambda _: encode)
    plan = Prepared((1,), (32,), {}, (Block((4, 16), (16, 1), (2, 16), Description),))
    x, y, z = numbers(4, 16), numbers(4, 16), numbers(4)
    for first in (x, x, y, x, y):
        plan(kernel, first, z)
    assert encoded == [(0, x.data_ptr()), (0, y.data_ptr())]
    expected = [(f"map of {t.data_ptr()}", 4, 16, z.data_ptr(), 32) for t in (x, y, x, y)]
    assert [run[4:] for run in kernel.runs] == expected
    # of other dtypes, another map of the same address
    plan(kernel, x.view(FP16), z)
    plan(kernel, x.view(FP16), z)
    assert encoded[2:] == [(0, x.data_ptr())]


@pytest.mark.parametrize("encoded", [False, True])
def test_launches_describe_what_each_of_them_takes(kernel, monkeypatch, encoded):
    def encode(position, descriptor):
        return position, descriptor.base.data_ptr(), *descriptor.shape

    monkeypatch.setattr(prepared, "encoder", lambda _: encode if encoded else None)
    block, long = (Block((n, 16), (16, 1), (2, 16), Description) for n in (4, 8))
    plan = Launches(
        (Prepared((3,), (5,), {"BLOCK": 16}), (0, 2)),
        (Prepared((2,), (7,), {}, (block, long)), (1, 0, 2)),
        (Prepared((4,), (9,), {}, (block,)), (1, 2, 3)),
    )
    kernels = (kernel, Kernel(), Kernel())

    def seen(run):
        return tuple(
            (v.base.data_ptr(), *v.shape) if isinstance(v, Description) else v for v in run
        )

    def given():
        return numbers(8, 16), numbers(4, 16), numbers(4), None

    plan(kernels, *given())
    for tensors in (given(), given()):
        first, second, third = (t.data_ptr() for t in tensors[:3])
        plan(kernels, *tensors)
        short, wide = (second, 4, 16), (first, 8, 16)
        expected = [(short, wide), (short,)]
        if encoded:
            expected = [(0, *short, 1, *wide), (0, *short)]
        assert [seen(run) for run in kernel.runs[-3:]] == [
            (3, 1, 1, 7, first, third, 5),
            (2, 1, 1, 7, *expected[0], third, 7),
            (4, 1, 1, 7, *expected[1], third, None, 9),
        ]
    assert [len(k.launches) for k in kernels] == [1, 1, 1]


def three_arguments(x, n, BLOCK: tl.constexpr):
    """Stand for a kernel's signature."""


def compiled(seen):
    """Return what an ordinary launch returns, with a launcher that keeps what it is given."""
    made = object.__new__(CompiledKernel)
    made._run = lambda *given: seen.append(given)
    made.function, made.packed_metadata, made.module = 11, (4, 1, 0), None
    return made


def test_the_launcher_gets_every_parameter():
    seen = []
    kernel = JITFunction(three_arguments)
    run = direct_run(kernel, compiled(seen), 2)
    run(1, 2, 3, 7, 160, 32)
    assert seen == [(1, 2, 3, 7, 11, (4, 1, 0), None, None, None, 160, 32, None)]


def test_what_has_no_direct_launch():
    kernel = JITFunction(three_arguments)
    assert direct_run(kernel, None, 2) is None  # the interpreter's
    assert direct_run(kernel, compiled([]), 1) is None  # a parameter was given by name
    kernel.add_pre_run_hook(print)
    assert direct_run(kernel, compiled([]), 2) is None


def test_a_profiler_s_hook_is_seen():
    assert not watched()
    knobs.runtime.launch_enter_hook.add(print)
    try:
        assert watched()
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    assert not watched()
