"""The Gluon kernel of token sets, its own source run by threads: see hopper_simulator."""

from __future__ import annotations

import math
import random
import threading
import time
import types

import hopper_simulator as play
import pytest
import torch

from longctx import TokenSetPlan
from longctx.reference import token_sparse as oracle
from longctx.testing.budget import assert_within_budget

pytest.importorskip("triton")

from longctx_triton import token_sparse
from longctx_triton.kernels import (
    flash_hopper,
    flash_hopper_softmax,
    mailbox,
    token_attention_hopper,
)
from longctx_triton.launch import token_attention_hopper as launch
from longctx_triton.launch.device import Device

pytestmark = play.needs_interpreter


class Pointer:
    """Addresses in one tensor's storage."""

    def __init__(self, data, offset):
        self.data, self.offset = data, offset
        self.dtype = types.SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)

    def __getitem__(self, index):
        return Pointer(self.data, self.offset[index])


def pointer_to(tensor):
    memory = tensor.new_zeros(0).set_(tensor.untyped_storage())
    return Pointer(memory, torch.tensor(tensor.storage_offset()))


def load(pointer, mask=True, other=0):
    offset, mask = torch.broadcast_tensors(pointer.offset.long(), torch.as_tensor(mask))
    offset = torch.where(mask, offset, 0)
    assert ((offset >= 0) & (offset < len(pointer.data))).all()
    return torch.where(mask, pointer.data[offset], other)


def store(pointer, value, mask):
    offset, mask, value = torch.broadcast_tensors(pointer.offset, mask, value)
    offset = offset[mask]
    found = pointer.data[offset]
    assert ((found == 0) | found.isneginf()).all(), "written twice"
    pointer.data[offset] = value[mask].to(pointer.data.dtype)


def copy(memory, pointers, mask):
    assert memory.data.shape == pointers.offset.shape
    play.queue("copies").append((memory, pointers, mask))


def arrive_after_copies(barrier, increment_count):
    """Let the copies so far land, in order, and then the 128 threads arrive."""
    assert not increment_count
    copies = play.queue("copies")
    landing, copies[:] = list(copies), []
    landed = play.queue("landed")
    before = landed[-1] if landed else None
    landed.append(threading.Event())

    def land(after):
        if before is not None:
            before.wait()
        time.sleep(random.random() * 2e-4)
        for memory, pointers, mask in landing:
            memory.data.copy_(load(pointers, mask, 0.0))
        play.row(barrier).arrive(128)
        after.set()

    threading.Thread(target=land, args=(landed[-1],)).start()


def hide(scores, bounds, after):
    assert after
    return torch.where(torch.arange(scores.shape[1]) <= bounds[:, None], scores, -torch.inf)


ATOMICALLY = threading.Lock()


def atomic(change):
    """Return an atomic operation, on which programs meet in any order."""

    def operation(pointer, value, sem="acq_rel"):
        time.sleep(random.random() * 1e-3)
        with ATOMICALLY:
            old = pointer.data[pointer.offset].clone()
            pointer.data[pointer.offset] = change(old, torch.as_tensor(value)).to(old.dtype)
        return old

    return operation


class Mailbox(play.Shared):
    """Shared memory that is read as it is written, by ordinary instructions."""

    def index(self, i):
        return Mailbox(self.data[int(i)])

    def slice(self, start, length):
        return Mailbox(self.data[start : start + length])

    def load(self, _layout):
        return self.data.clone()


def allocate(dtype, shape, layout):
    if dtype == torch.int32:
        return Mailbox(torch.full(shape, 10**6, dtype=dtype))
    return play.allocate(dtype, shape, layout)


class Simulated:
    """The kernel, called as Triton's is, its programs at once in this process."""

    def __init__(self):
        modules = (flash_hopper_softmax, flash_hopper, mailbox, token_attention_hopper)
        names = {
            name: types.FunctionType(item.fn.__code__, {})
            for module in modules
            for name, item in vars(module).items()
            if hasattr(item, "fn") and hasattr(item.fn, "__code__")
        }
        language = {
            **vars(play.LANGUAGE),
            "load": load,
            "store": store,
            "allocate_shared_memory": allocate,
            "atomic_add": atomic(torch.add),
            "atomic_max": atomic(torch.maximum),
            "atomic_xchg": atomic(lambda _old, new: new),
            "NVMMASharedLayout": play.quiet,
            "SwizzledSharedLayout": play.quiet,
        }
        world = {
            **names,
            "gl": types.SimpleNamespace(**language),
            "mbarrier": play.MBARRIER,
            "async_copy": types.SimpleNamespace(mbarrier_arrive=arrive_after_copies),
            "async_load_rows": copy,
            "barrier": play.quiet,
            "fence_async_shared": play.quiet,
            "warpgroup_mma": play.warpgroup_mma,
            "warpgroup_mma_wait": play.warpgroup_mma_wait,
            **play.SOFTMAX,
            "hide": hide,
            "NOTHING_SEEN": flash_hopper_softmax.NOTHING_SEEN.value,
            **dict.fromkeys(("_COPIED", "_LISTED", "_ONE")),
            "float": float,
            "_ROWS": launch.ROWS,
            "_PLACES": mailbox.PLACES,
            "_SLACK": flash_hopper_softmax.SLACK,
            "_TILE": 2 * launch.ROWS,
            "_GATHER_THREADS": 128,
            "_LN2": math.log(2),
        }
        for item in names.values():
            item.__globals__.update(world)
        self.functions = names
        self.launches = 0
        self.further = 0  # programs beside those that the launch asks for

    def __getitem__(self, grid):
        def start(*args, num_warps, **constants):
            self.launches += 1
            assert num_warps == 4
            given = [
                pointer_to(value) if isinstance(value, torch.Tensor) else torch.tensor(value)
                for value in args
            ]
            programs = grid[0] + self.further
            play.GEOMETRY.program = play.GEOMETRY.programs = None
            play.warp_specialize(
                [(self.program, (i, programs, given, constants)) for i in range(programs)], (), ()
            )

        return start

    def program(self, number, programs, given, constants):
        play.GEOMETRY.program, play.GEOMETRY.programs = number, programs
        self.functions["token_attention_hopper_kernel"](*given, **constants)


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that the CPU is a Hopper GPU of three multiprocessors."""
    kernel = Simulated()
    monkeypatch.setattr(launch, "token_attention_hopper_kernel", kernel)
    kept = torch.full((1,), -7, dtype=torch.int32)
    monkeypatch.setattr(launch, "scratch", lambda _like, _pieces: (kept,))
    launch._plan.cache_clear()
    monkeypatch.setattr(token_sparse, "device_of", lambda _: Device((9, 0), 3, 1 << 16))
    monkeypatch.delenv("LONGCTX_TRITON_FLASH", raising=False)
    return kernel


@pytest.fixture(params=[2, 3])
def stages(request, monkeypatch):
    """Run with so many stages."""
    monkeypatch.setattr(
        launch, "gather_tiles", lambda _dim: launch.GatherTiles(request.param, 232, 40)
    )


def inputs(q_len, k_len, q_heads, kv_heads, dim=64):
    torch.manual_seed(q_len + k_len)
    q = torch.randn(2, q_len, q_heads, dim).half()
    k, v = (torch.randn(2, k_len, kv_heads, dim).half() for _ in range(2))
    return q, k, v


def plan_of(axis, k_len, sets, keep, beyond=5):
    """Sets of different sizes, one of them empty, with garbage behind the last slot of another."""
    indices = torch.full((2, sets, k_len + beyond), -1, dtype=torch.int32)
    counts = torch.zeros(2, sets, dtype=torch.int32)
    for b in range(2):
        for h in range(sets):
            chosen = (torch.rand(k_len) < keep).nonzero().squeeze(1).int()
            indices[b, h, : len(chosen)] = chosen
            counts[b, h] = len(chosen)
    counts[1, -1] = 0
    return TokenSetPlan(indices, counts, axis)


def run_and_check(q, k, v, plan):
    out, lse = token_sparse.token_sparse_forward(q, k, v, plan.indices, plan.counts, scale=0.125)
    wide = (t.double() for t in (q, k, v))
    exact, exact_lse = oracle.token_sparse_attention(*wide, plan, scale=0.125)
    rough, _ = oracle.token_sparse_attention(q, k, v, plan, scale=0.125)
    assert_within_budget(out, exact, rough)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize(
    ("axis", "q_len", "k_len", "q_heads", "kv_heads", "keep"),
    [
        ("query", 300, 300, 4, 2, 0.6),
        ("kv", 75, 390, 4, 2, 0.9),
        ("shared", 256, 256, 4, 2, 1.0),
        ("query", 1, 300, 2, 1, 0.9),
        ("query", 300, 150, 2, 1, 0.9),
        ("kv", 60, 60, 2, 2, 0.0),
        ("kv", 700, 700, 2, 1, 0.9),
    ],
)
def test_against_the_oracle(hopper, stages, axis, q_len, k_len, q_heads, kv_heads, keep):
    q, k, v = inputs(q_len, k_len, q_heads, kv_heads)
    sets = {"shared": 1, "kv": kv_heads, "query": q_heads}[axis]
    run_and_check(q, k, v, plan_of(axis, k_len, sets, keep))
    assert hopper.launches == 1


@pytest.mark.parametrize("further", [0, 1, 20])
def test_the_counter_is_cleared_before_each_launch(hopper, stages, further):
    """Whatever it holds, and whatever the number of programs, those without a task included."""
    hopper.further = further
    q, k, v = inputs(300, 300, 2, 1)
    for keep in (0.9, 0.0, 0.2):
        run_and_check(q, k, v, plan_of("query", 300, 2, keep))
    assert hopper.launches == 3


@pytest.mark.parametrize(("q_len", "keep"), [(390, 0.1), (3, 0.9), (140, 0.9)])
def test_idle_tiles(hopper, stages, q_len, keep):
    """Beyond the slots in use, and before the first token with a query."""
    q, k, v = inputs(q_len, 390, 4, 2)
    run_and_check(q, k, v, plan_of("query", 390, 4, keep, beyond=1000))
    counts = torch.tensor([[1, 128, 129, 0], [256, 257, 0, 0]], dtype=torch.int32)
    indices = torch.arange(390, dtype=torch.int32).expand(2, 4, 390).contiguous()
    run_and_check(q, k, v, TokenSetPlan(indices, counts, "query"))


def test_idle_tasks_are_left_out_together(hopper, monkeypatch):
    """A set much smaller than its room costs few claims."""
    claims = []
    language = hopper.functions["_claim"].__globals__["gl"]
    add = language.atomic_add
    monkeypatch.setattr(
        language, "atomic_add", lambda *a, **o: claims.append(add(*a, **o)) or claims[-1]
    )
    q, k, v = inputs(300, 300, 2, 1)
    run_and_check(q, k, v, plan_of("query", 300, 2, 0.9, beyond=128 * 1000))
    tiles, heads, programs = 3, 4, 3
    assert len(claims) <= tiles * heads + programs * (heads + 2)


def test_the_shipped_tiles(hopper):
    q, k, v = inputs(300, 300, 2, 1, dim=128)
    run_and_check(q, k, v, plan_of("query", 300, 2, 0.7))
    assert hopper.launches == 1


def test_what_nobody_chose_and_other_strides(hopper):
    q, k, v = inputs(200, 270, 2, 1)
    plan = plan_of("kv", 270, 1, 0.8)
    indices, counts = plan.indices, plan.counts
    indices[0, 0, counts[0, 0] :] = 10**6
    for b in range(2):
        unused = torch.ones(270, dtype=torch.bool)
        unused[indices[b, 0, : counts[b, 0]].long()] = False
        k[b, unused], v[b, unused] = torch.nan, torch.nan
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    dirty = token_sparse.token_sparse_forward(q, k, v, indices, counts, scale=0.125)
    clean = token_sparse.token_sparse_forward(
        q, k.nan_to_num(0), v.nan_to_num(0), indices, counts, scale=0.125
    )
    assert all(torch.equal(*pair) for pair in zip(dirty, clean, strict=True))
    run_and_check(q, k.nan_to_num(0), v.nan_to_num(0), plan)
    assert hopper.launches == 3


def test_what_the_kernel_declines_runs_portably(hopper):
    q, k, v = inputs(40, 40, 2, 1)
    plan = plan_of("query", 40, 2, 0.5)
    odd = torch.zeros(2, 40, 2, 72).half()[..., :64]
    wide = torch.zeros(2, 40, 1, 128).half()
    for tensors, scale in (
        ((q, k, v), -0.1),
        ((odd, k, v), 0.1),
        ((q, k, wide), 0.1),
        ((q.float(), k.float(), v.float()), 0.1),
    ):
        token_sparse.token_sparse_forward(*tensors, plan.indices, plan.counts, scale=scale)
    assert hopper.launches == 0
