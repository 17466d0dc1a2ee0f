"""Stand-ins for what a Gluon kernel finds on Hopper, so that threads can run its own source.

Gluon has no interpreter. Here barriers, bulk copies and asynchronous products are played by
Python objects that take every liberty the hardware has: copies land late, products are evaluated
only when they are waited for, stores leave only when they are waited for. A missing wait or a
buffer given back too early then shows as a wrong number, a wrong phase as a barrier that nobody
completes.
"""

from __future__ import annotations

import math
import random
import threading
import time
import types

import pytest
import torch

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="beside what is simulated, kernels run in Triton's interpreter: off where a GPU is",
)

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

    def slice(self, start, length):
        return Shared(self.data[start : start + length])

    def store(self, value):
        self.data.copy_(value)

    def load(self, _layout):
        return self.data.clone()


class Pointer:
    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)


class Description:
    """A tensor descriptor: outside of an axis copies read zeros and write nothing."""

    def __init__(self, base, shape, strides, block_shape, layout):
        size = base.element_size()
        assert all((stride * size) % 16 == 0 and stride > 0 for stride in strides[:-1])
        self.base = base.as_strided(shape, strides)
        self.block, self.layout, self.dtype = block_shape, layout, base.dtype
        self.block_type = types.SimpleNamespace(nbytes=math.prod(block_shape) * size)

    def _slices(self, coordinates):
        inside, part = [], []
        for start, extent, size in zip(coordinates, self.block, self.base.shape, strict=True):
            start = int(start)
            first, last = min(max(start, 0), size), min(max(start + extent, 0), size)
            inside.append(slice(first, last))
            part.append(slice(first - start, last - start) if last > first else slice(0, 0))
        return tuple(inside), tuple(part)

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
    if dtype == torch.int32:
        return Shared(torch.full(shape, 10**6, dtype=dtype))
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


SOFTMAX = {
    "_halves": lambda x: x.unflatten(0, (-1, 2, 8)).unbind(1),
    "_whole": lambda x, y, _like: torch.stack((x, y), 1).flatten(0, 2),
    "_like": lambda x, _other: x,
    "_beside": lambda x, _other: x[:, :, None],
    "faded": lambda t, fade: t * fade[:, None],
    "ROW_THREADS": None,
}
"""What `flash_hopper_softmax` says in layouts and in assembly."""


LANGUAGE = types.SimpleNamespace(
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    BlockedLayout=quiet,
    SliceLayout=quiet,
    SwizzledSharedLayout=quiet,
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
