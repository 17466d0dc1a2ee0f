"""The Gluon kernel's own source, run by threads that stand for its warp groups.

Gluon has no interpreter. Here barriers, bulk copies and asynchronous products are played by
Python objects that take every liberty the hardware has: copies land late, products are evaluated
only when they are waited for, stores leave only when they are waited for. A missing wait or a
buffer given back too early then shows as a wrong number, a wrong phase as a barrier that nobody
completes. Numbers of the real device come from test_flash_kernels.py on a Hopper GPU.
"""

from __future__ import annotations

import math
import random
import threading
import time
import types

import pytest
import torch

from longctx.reference import flash as oracle
from longctx.testing.budget import assert_within_budget

pytest.importorskip("triton")

from longctx_triton import flash
from longctx_triton.kernels import flash_hopper as hopper_kernel
from longctx_triton.launch import flash_hopper as hopper_launch
from longctx_triton.launch.device import Device

PATIENCE = 20.0
"""Seconds after which a wait counts as a deadlock."""

GEOMETRY = threading.local()


class Barrier:
    """One mbarrier: a phase ends when its arrivals and its bytes have come."""

    def __init__(self):
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.phase = 0

    def _settle(self):
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count
            self.changed.notify_all()

    def init(self, count):
        self.count = self.missing = count

    def arrive(self, count=1, expected=0):
        with self.changed:
            assert self.missing >= count, "more arrivals than the barrier counts"
            self.missing -= count
            self.bytes += expected
            self._settle()

    def landed(self, nbytes):
        with self.changed:
            self.bytes -= nbytes
            self._settle()

    def wait(self, parity):
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != int(parity), PATIENCE), "deadlock"


class Shared:
    """A shared-memory descriptor: a view of memory, or barriers."""

    def __init__(self, data):
        self.data = data

    @property
    def dtype(self):
        return self.data.dtype

    def index(self, i):
        return Shared(self.data[int(i)])

    def reshape(self, shape):
        return Shared(self.data.view(*shape))

    def permute(self, order):
        return Shared(self.data.permute(*order))

    def store(self, value):
        self.data.copy_(value)


class Pointer:
    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)


class Description:
    """A tensor descriptor: copies past the end of an axis read zeros and write nothing."""

    def __init__(self, base, shape, strides, block_shape, layout):
        size = base.element_size()
        assert all((stride * size) % 16 == 0 and stride > 0 for stride in strides[:-1])
        self.base = base.as_strided(shape, strides)
        self.block, self.layout, self.dtype = block_shape, layout, base.dtype
        self.block_type = types.SimpleNamespace(nbytes=math.prod(block_shape) * size)

    def _slices(self, coordinates):
        starts = [int(c) for c in coordinates]
        ends = [
            min(a + n, size)
            for a, n, size in zip(starts, self.block, self.base.shape, strict=True)
        ]
        inside = tuple(slice(a, max(a, b)) for a, b in zip(starts, ends, strict=True))
        return inside, tuple(slice(0, max(0, b - a)) for a, b in zip(starts, ends, strict=True))

    def load(self, coordinates, memory):
        inside, part = self._slices(coordinates)
        memory.zero_()
        memory[part] = self.base[inside]

    def store(self, coordinates, memory):
        inside, part = self._slices(coordinates)
        self.base[inside] = memory[part]


class Product:
    def __init__(self, a, b, acc, use_acc):
        self.parts, self.value = (a, b, acc, use_acc), None

    def finish(self):
        a, b, acc, use_acc = self.parts
        a, b = (t.data if isinstance(t, Shared) else t for t in (a, b))
        self.value = a.float() @ b.float() + (acc if use_acc else 0)


def queue(name):
    if not hasattr(GEOMETRY, name):
        setattr(GEOMETRY, name, [])
    return getattr(GEOMETRY, name)


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    assert is_async
    queue("products").append(Product(a, b, acc, use_acc))
    return queue("products")[-1]


def warpgroup_mma_wait(outstanding, deps):
    time.sleep(
        random.choice([0.0] * 7 + [2e-3])
    )  # who reuses an operand too early has the time to
    products = queue("products")
    while len(products) > outstanding:
        products.pop(0).finish()
    (token,) = deps
    assert token.value is not None, "used before it was waited for"
    return token.value


def async_load(description, coordinates, barrier, memory):
    def land():
        time.sleep(random.random() * 2e-4)
        description.load(coordinates, memory.data)
        barrier.data.landed(description.block_type.nbytes)

    threading.Thread(target=land).start()


def async_store(description, coordinates, memory):
    queue("stores").append((description, coordinates, memory))


def store_wait(pending):
    assert pending == 0
    while queue("stores"):
        description, coordinates, memory = queue("stores").pop(0)
        description.store(coordinates, memory.data)


def warp_specialize(partitions, _warps, _registers):
    failures = []
    place = GEOMETRY.program, GEOMETRY.programs

    def run(function, arguments):
        GEOMETRY.program, GEOMETRY.programs = place
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def allocate(dtype, shape, _layout):
    if dtype == torch.int64:
        return Shared([[Barrier()] for _ in range(shape[0])])
    return Shared(torch.full(shape, torch.nan, dtype=dtype))


def row(barriers):
    return barriers.data[0] if isinstance(barriers.data, list) else barriers.data


MBARRIER = types.SimpleNamespace(
    MBarrierLayout=lambda: None,
    init=lambda b, count: row(b).init(count),
    expect=lambda b, nbytes: row(b).arrive(1, nbytes),
    arrive=lambda b, count: row(b).arrive(count),
    wait=lambda b, parity: row(b).wait(parity),
)


def store(pointer, value, mask):
    where = pointer.offset[mask]
    pointer.data.view(-1)[where] = value[mask]


def hide(scores, last, after):
    assert after
    return torch.where(torch.arange(scores.shape[1]) <= last[:, None], scores, -torch.inf)


def quiet(*_args, **_kwargs):
    return None


LANGUAGE = types.SimpleNamespace(
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    SliceLayout=quiet,
    DotOperandLayout=quiet,
    NVMMADistributedLayout=quiet,
    allocate_shared_memory=allocate,
    arange=lambda a, b, _layout: torch.arange(a, b),
    convert_layout=lambda t, _layout, **_: t,
    exp2=torch.exp2,
    log2=torch.log2,
    full=lambda shape, value, dtype, _layout: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, _layout: torch.zeros(shape, dtype=dtype),
    load=lambda pointer: pointer.data.view(-1)[int(pointer.offset)],
    max=lambda t, axis: t.amax(axis),
    sum=lambda t, axis: t.sum(axis),
    maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    num_programs=lambda _axis: torch.tensor(GEOMETRY.programs),
    program_id=lambda _axis: torch.tensor(GEOMETRY.program),
    static_range=range,
    store=store,
    warp_specialize=warp_specialize,
    where=lambda c, a, b: torch.where(torch.as_tensor(c), a, b),
)


class Simulated:
    """The kernel, called as Triton's is, program after program in this process."""

    def __init__(self, function):
        module = vars(hopper_kernel)
        names = {
            name: types.FunctionType(item.fn.__code__, {})
            for name, item in module.items()
            if hasattr(item, "fn") and hasattr(item.fn, "__code__")
        }
        world = {
            **names,
            "gl": LANGUAGE,
            "tma": types.SimpleNamespace(store_wait=store_wait),
            "mbarrier": MBARRIER,
            "fence_async_shared": quiet,
            "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": warpgroup_mma_wait,
            "async_load": lambda d, c, b, m: async_load(d, c, Shared(row(b)), m),
            "async_store": async_store,
            "_depth": quiet,
            "_exp2": lambda t, _poly: torch.exp2(t),
            "faded": lambda t, fade, _lazy: t * fade[:, None],
            "hide": hide,
            "_sum_in_threads": lambda t, _layout: t.unflatten(1, (-1, 4, 2)).sum((1, 3)),
            "ROW_THREADS": None,
            "_ROWS": hopper_kernel.ROWS,
            "_LOG2E": math.log2(math.e),
            "_LN2": math.log(2),
            "float": float,
        }
        for item in names.values():
            item.__globals__.update(world)
        self.function = names[function]
        self.launches = 0

    def __getitem__(self, grid):
        def launch(p_q, p_k, p_v, p_o, lse, *arguments, num_warps, **constants):
            self.launches += 1
            assert num_warps == 4
            pointers = [None if t is None else Pointer(t) for t in (lse, *arguments[:4])]
            scale, *sizes = arguments[4:]
            sizes = [torch.tensor(size) for size in sizes]
            for program in range(grid[0]):
                GEOMETRY.program, GEOMETRY.programs = program, grid[0]
                self.function(p_q, p_k, p_v, p_o, *pointers, scale, *sizes, **constants)

        return launch


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that the CPU is a Hopper GPU of three multiprocessors."""
    kernel = Simulated("flash_hopper_kernel")
    device = Device((9, 0), 3, 1 << 16)
    monkeypatch.setattr(hopper_launch, "flash_hopper_kernel", kernel)
    monkeypatch.setattr(hopper_launch, "TensorDescriptor", Description)
    monkeypatch.setattr(flash, "device_of", lambda _: device)
    monkeypatch.delenv("LONGCTX_TRITON_FLASH", raising=False)
    return kernel


def tiles(monkeypatch, *sizes):
    monkeypatch.setattr(
        hopper_launch, "hopper_tiles", lambda _dim, _fp8: hopper_launch.HopperTiles(*sizes)
    )


def each_head(factors, t):
    return factors.repeat_interleave(t.shape[2] // factors.shape[1], 1)[:, None, :, None]


def run(q, k, v, *, causal, sinks=None, scale=0.125, descales=(None, None, None)):
    out, lse = flash.flash_forward(
        q, k, v, causal=causal, window_left=None, window_right=None, softcap=0.0, sinks=sinks,
        scale=scale, cu_seqlens_q=None, cu_seqlens_k=None,
        **dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True)),
    )  # fmt: skip
    options = {"causal": causal, "scale": scale}
    q, k, v = (
        t.double() if f is None else t.double() * each_head(f.double(), t)
        for t, f in zip((q, k, v), descales, strict=True)
    )
    exact, exact_lse = oracle.flash_attention(
        q, k, v, **options, sinks=None if sinks is None else sinks.double()
    )
    rough, _ = oracle.flash_attention(
        *(t.to(out.dtype) for t in (q, k, v)), **options,
        sinks=None if sinks is None else sinks.to(out.dtype),
    )  # fmt: skip
    assert_within_budget(out, exact, rough)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=2e-6)


# batch, q_len, k_len, q_heads, kv_heads
SHAPES = [
    (1, 300, 300, 2, 1),
    (2, 130, 300, 4, 2),
    (1, 5, 70, 2, 2),
    (1, 1, 64, 3, 1),
    (2, 257, 257, 1, 1),
]


@pytest.mark.parametrize("sizes", [(2, 32, 2, 240, False), (2, 32, 3, 240, True),
                                   (3, 64, 2, 160, False), (3, 64, 3, 160, True)])  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(hopper, monkeypatch, shape, causal, sizes):
    torch.manual_seed(0)
    tiles(monkeypatch, *sizes)
    batch, q_len, k_len, q_heads, kv_heads = shape
    q = torch.randn(batch, q_len, q_heads, 64).half()
    k, v = (torch.randn(batch, k_len, kv_heads, 64).half() for _ in range(2))
    run(q, k, v, causal=causal)
    run(q, k, v, causal=causal, sinks=torch.randn(q_heads))
    assert hopper.launches == 2


def test_the_shipped_tiles_and_strided_inputs(hopper):
    q = torch.randn(2, 4, 150, 128).half().transpose(1, 2)
    k = torch.randn(2, 300, 3, 128).half()[:, :, 1:]
    v = torch.randn(2, 300, 2, 256).half()[..., 64:192]
    run(q, k, v, causal=True)
    run(q, k, v, causal=False)
    assert hopper.launches == 2


@pytest.mark.parametrize("given", ["", "q", "kv", "qkv"])
def test_fp8(hopper, monkeypatch, given):
    torch.manual_seed(0)
    monkeypatch.setattr(hopper_launch, "widened", lambda t: t.half())
    q, k, v = (
        torch.randn(2, length, heads, 64).to(torch.float8_e4m3fn)
        for length, heads in ((70, 4), (150, 2), (150, 2))
    )
    descales = tuple(torch.rand(2, 2) * 2 + 0.1 if name in given else None for name in "qkv")
    run(q, k, v, causal=True, descales=descales)
    run(q, k, v, causal=False, descales=descales)
    assert hopper.launches == 2


def test_what_the_kernel_declines_runs_portably(hopper, monkeypatch):
    q, k, v = (torch.randn(1, 20, 1, 64).half() for _ in range(3))
    base = {
        "causal": True, "window_left": None, "window_right": None, "softcap": 0.0, "sinks": None,
        "scale": 0.125, "cu_seqlens_q": None, "cu_seqlens_k": None, "q_descale": None,
        "k_descale": None, "v_descale": None,
    }  # fmt: skip
    flash.flash_forward(q, k, v, **base)
    assert hopper.launches == 1
    refused = [
        ({"softcap": 1.0}, q, k, v),
        ({"scale": -1.0}, q, k, v),
        ({"causal": False, "window_right": 2}, q, k, v),
        ({}, q, k[:, :9], v[:, :9]),
        ({}, q, k, torch.randn(1, 20, 1, 128).half()),
        ({}, q[:, ::1, :, ::1], torch.randn(1, 20, 68).half()[..., 4:].unsqueeze(2), v),
    ]
    for options, *tensors in refused:
        flash.flash_forward(*tensors, **base | options)
    monkeypatch.setenv("LONGCTX_TRITON_FLASH", "portable")
    flash.flash_forward(q, k, v, **base)
    assert hopper.launches == 1
