"""The Gluon kernel of latent attention: its own source, run by threads for its warpgroups.

Gluon has no interpreter. Here copies land late, products are evaluated when they are waited for,
and every thread dawdles: a missing wait or a stage given back too early shows as a wrong number,
a wrong phase as a barrier that nobody completes. What the real device does with it is tested by
test_dsa_kernels.py on a Hopper GPU.
"""

from __future__ import annotations

import random
import threading
import time
import types
from collections import defaultdict

import pytest
import torch

from longctx.plans import TopKPlan
from longctx.reference import dsa as oracle
from longctx.testing.budget import assert_within_budget

pytest.importorskip("triton")

from longctx_triton import dsa
from longctx_triton.kernels import mailbox
from longctx_triton.kernels import mla_hopper as hopper_kernel
from longctx_triton.launch import mla_hopper as hopper_launch
from longctx_triton.launch.device import Device

PATIENCE = 20.0
"""Seconds after which a wait counts as a deadlock."""

PLACE = threading.local()


def dawdle():
    time.sleep(random.choice([0.0] * 7 + [2e-4]))


class Barrier:
    """One mbarrier: a phase ends when its arrivals have come."""

    def __init__(self):
        self.changed = threading.Condition()
        self.count = self.missing = self.phase = 0

    def init(self, count):
        self.count = self.missing = count

    def arrive(self, count):
        dawdle()
        with self.changed:
            assert self.missing >= count, "more arrivals than the barrier counts"
            self.missing -= count
            if self.missing == 0:
                self.phase ^= 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, parity):
        dawdle()
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != int(parity), PATIENCE), "deadlock"


class Shared:
    """A shared-memory descriptor: a view of memory."""

    def __init__(self, data):
        self.data = data
        self.dtype = data.dtype

    def index(self, i):
        return Shared(self.data[int(i)])

    def slice(self, start, length, axis=0):
        return Shared(self.data.narrow(axis, start, length))

    def permute(self, order):
        return Shared(self.data.permute(*order))

    def load(self, _layout):
        dawdle()
        return self.data.clone()

    def store(self, value):
        dawdle()
        assert self.data.shape == value.shape
        self.data.copy_(value)


class Barriers(list):
    def index(self, i):
        return self[int(i)]


class Pointer:
    """Addresses in one tensor's storage."""

    def __init__(self, data, offset):
        self.data, self.offset = data, offset
        self.dtype = types.SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)

    def __getitem__(self, index):
        return Pointer(self.data, self.offset[index])


class Product:
    def __init__(self, a, b, acc, use_acc):
        self.parts, self.value = (a, b, acc, use_acc), None
        if random.random() < 0.5:
            self.finish()

    def finish(self):
        if self.value is None:
            a, b, acc, use_acc = self.parts
            acc = acc.finish() if isinstance(acc, Product) else acc
            self.value = a.data.float() @ b.data.float() + (acc if use_acc else 0)
        return self.value


def wait_for_products(outstanding, deps):
    assert outstanding == 0
    dawdle()
    return deps[0].finish()


def pointer_to(tensor):
    memory = tensor.new_zeros(0).set_(tensor.untyped_storage())
    return Pointer(memory, torch.tensor(tensor.storage_offset()))


def load(pointer, mask, other):
    dawdle()
    offset, mask = torch.broadcast_tensors(pointer.offset, mask)
    offset = torch.where(mask, offset, 0)
    return torch.where(mask, pointer.data[offset], other)


def store(pointer, value, mask):
    offset, mask, value = torch.broadcast_tensors(pointer.offset, mask, value)
    assert pointer.data[offset[mask]].isnan().all(), "written twice"
    pointer.data[offset[mask]] = value[mask].to(pointer.data.dtype)


def copy(memory, pointers, mask):
    assert memory.data.shape == pointers.offset.shape
    PLACE.copies.append((memory, pointers, mask))


def arrive_after_copies(barrier, increment_count):
    """Let the copies so far land, in order, and then the 128 threads arrive."""
    assert not increment_count
    copies, PLACE.copies = PLACE.copies, []
    before, PLACE.landed = PLACE.landed, threading.Event()

    def land(landed):
        before.wait()
        for memory, pointers, mask in copies:
            memory.data.copy_(load(pointers, mask, 0.0))
        barrier.arrive(128)
        landed.set()

    threading.Thread(target=land, args=(PLACE.landed,)).start()


def warp_specialize(partitions, _warps, _registers):
    failures = []
    place = PLACE.program, PLACE.programs

    def run(function, arguments):
        PLACE.program, PLACE.programs = place
        PLACE.copies, PLACE.landed = [], threading.Event()
        PLACE.landed.set()
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
        return Barriers(Barrier() for _ in range(shape[0])) if len(shape) > 1 else Barrier()
    return Shared(torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype))


def quiet(*_args, **_kwargs):
    return None


LANGUAGE = types.SimpleNamespace(
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    NVMMADistributedLayout=quiet,
    NVMMASharedLayout=quiet,
    SliceLayout=quiet,
    SwizzledSharedLayout=quiet,
    allocate_shared_memory=allocate,
    arange=lambda a, b, _layout: torch.arange(a, b, dtype=torch.int32),
    convert_layout=lambda t, _layout, assert_trivial=False: t,
    exp2=torch.exp2,
    log2=torch.log2,
    full=lambda shape, value, dtype, _layout: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, _layout: torch.zeros(shape, dtype=dtype),
    load=load,
    max=lambda t, axis: t.amax(axis),
    sum=lambda t, axis: t.sum(axis),
    maximum=torch.maximum,
    minimum=torch.minimum,
    num_programs=lambda _axis: torch.tensor(PLACE.programs),
    program_id=lambda _axis: torch.tensor(PLACE.program),
    static_range=range,
    store=store,
    warp_specialize=warp_specialize,
    where=torch.where,
)


class Simulated:
    """The kernel, called as Triton's is, program after program in this process."""

    def __init__(self):
        module = {**vars(mailbox), **vars(hopper_kernel)}
        names = {
            name: types.FunctionType(item.fn.__code__, {})
            for name, item in module.items()
            if hasattr(item, "fn") and hasattr(item.fn, "__code__")
        }
        constants = {
            name: item.value
            for name, item in module.items()
            if name.startswith("_") and type(item).__name__ == "constexpr"
        }
        world = {
            **names,
            **constants,
            "gl": LANGUAGE,
            "ROW_THREADS": None,
            "async_copy": types.SimpleNamespace(mbarrier_arrive=arrive_after_copies),
            "async_load_rows": copy,
            "barrier": dawdle,
            "fence_async_shared": quiet,
            "float": float,
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=quiet,
                init=lambda b, count: b.init(count),
                arrive=lambda b, count: b.arrive(count),
                wait=lambda b, parity: b.wait(parity),
            ),
            "range": range,
            "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=True: Product(
                a, b, acc, use_acc
            ),
            "warpgroup_mma_wait": wait_for_products,
        }
        for item in names.values():
            item.__globals__.update(world)
        self.function = names["latent_hopper_kernel"]
        self.launches = 0

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **constants):
            self.launches += 1
            assert num_warps == 4
            given = [
                pointer_to(a) if isinstance(a, torch.Tensor) else torch.tensor(a)
                for a in arguments
            ]
            for program in range(grid[0]):
                PLACE.program, PLACE.programs = program, grid[0]
                self.function(*given, **constants)

        return launch


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that the CPU is a Hopper GPU of three multiprocessors."""
    kernel = Simulated()
    empty, outputs = torch.empty, dsa.attention_outputs

    def merged(parts_out, parts_lse, sinks, out, lse, parts, *_sizes, SINKS, **_):
        parts_out = parts_out.view(parts, *out.shape)
        parts_lse = parts_lse.view(parts, *lse.shape)
        logs = (
            torch.cat([parts_lse, sinks.view(1, 1, -1, 1).expand(1, *parts_lse.shape[1:])])
            if SINKS
            else parts_lse
        )
        lse.copy_(logs.logsumexp(0))
        shares = (parts_lse - lse).exp().nan_to_num(0).transpose(2, 3)
        out.copy_((parts_out * shares.unsqueeze(-1)).sum(0))

    monkeypatch.setattr(hopper_launch, "latent_hopper_kernel", kernel)
    monkeypatch.setattr(hopper_launch, "LEAST_HEADS", 1)
    monkeypatch.setattr(hopper_launch, "merge_parts_kernel", defaultdict(lambda: merged))
    monkeypatch.setattr(dsa, "device_of", lambda _: Device((9, 0), 3, 50 << 20))
    # outputs that are never written stay NaN
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(
        dsa, "attention_outputs", lambda *t: [r.fill_(torch.nan) for r in outputs(*t)]
    )
    return kernel


def latent(batch, q_len, k_len, heads, slots):
    """Return q, k and lists with holes; one row names nothing, another little."""
    q = torch.randn(batch, q_len, heads, 576).half()
    k = torch.randn(batch, k_len, 1, 576).half()
    order = torch.rand(batch, q_len, 1, max(k_len, slots)).argsort(-1)[..., :slots].int()
    indices = order.masked_fill(order >= k_len, -1)
    indices[torch.rand(indices.shape) < 0.2] = -1
    indices[:, q_len // 2, :, slots // 3 + 1 :] = -1
    if q_len > 1:
        indices[:, 0] = -1
    return q, k, indices


def run(q, k, indices, *, sinks=None, scale=192**-0.5):
    return dsa.topk_attention_forward(
        q, k, k[..., :512], indices, page_size=1, scale=scale, sinks=sinks
    )


def run_and_check(q, k, indices, *, sinks=None):
    out, lse = run(q, k, indices, sinks=sinks)
    plan, options = TopKPlan(indices), {"scale": 192**-0.5, "sinks": sinks}
    exact, exact_lse = oracle.topk_attention(
        q.double(), k.double(), k[..., :512].double(), plan, **options
    )
    rough, _ = oracle.topk_attention(q, k, k[..., :512], plan, **options)
    assert_within_budget(out, exact, rough)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=2e-6)


# batch, q_len, k_len, heads, slots
SHAPES = [(1, 4, 300, 128, 130), (2, 3, 99, 8, 200), (1, 3, 50, 100, 64), (1, 2, 30, 64, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(hopper, shape):
    torch.manual_seed(0)
    made = latent(*shape)
    run_and_check(*made)
    run_and_check(*made, sinks=torch.randn(shape[3]))
    assert hopper.launches == 2


def test_few_tokens_are_cut_over_their_lists(hopper, monkeypatch):
    monkeypatch.setattr(dsa, "device_of", lambda _: Device((9, 0), 8, 50 << 20))
    made = latent(1, 1, 500, 128, 333)
    run_and_check(*made)
    run_and_check(*made, sinks=torch.randn(128))
    assert hopper.launches == 2


def test_nothing_listed_and_what_nobody_lists(hopper):
    q, k, indices = latent(1, 3, 80, 64, 90)
    indices[indices == 7] = 8
    k[:, 7] = torch.nan
    out, _ = run(q, k, indices)
    assert out.isfinite().all()
    out, lse = run(q, k, indices[..., :0])
    assert not out.any()
    assert lse.isneginf().all()
    assert hopper.launches == 2


def test_strided_inputs(hopper):
    q, k, indices = latent(2, 3, 80, 64, 90)
    run_and_check(q.transpose(1, 2).contiguous().transpose(1, 2), k, indices)
    wide = torch.randn(2, 80, 2, 640).half()
    run_and_check(q, wide[:, :, 1:, :576], indices)
    assert hopper.launches == 2


def test_what_the_kernel_declines_runs_portably(hopper, monkeypatch):
    q, k, _ = latent(1, 2, 40, 64, 20)
    v = k[..., :512]
    indices = torch.zeros(1, 2, 1, 20, dtype=torch.int32)
    results = dsa.attention_outputs(q, v)
    options = {"page_size": 1, "scale": 0.1, "sinks": None, "processors": 3}

    def takes(q=q, k=k, v=v, **changed):
        return hopper_launch.latent_forward(q, k, v, *results, indices, **options | changed)

    assert takes()
    assert not takes(scale=-0.1)
    assert not takes(page_size=2)
    assert not takes(v=v.contiguous())
    assert not takes(q=q.float())
    assert not takes(q=torch.zeros(1, 2, 64, 584).half()[..., :576])
    two = torch.zeros(1, 40, 2, 576).half()
    assert not takes(k=two, v=two[..., :512])
    monkeypatch.setattr(hopper_launch, "LEAST_HEADS", 65)
    assert not takes()
