"""The Gluon backward's own source, run by the threads of the forward's simulation."""

from __future__ import annotations

import math
import threading
import time
import types

import hopper_simulator as play
import pytest
import torch

from longctx.reference import flash as oracle
from longctx.testing.budget import assert_within_budget

pytest.importorskip("triton")

from longctx_triton import flash
from longctx_triton.kernels import flash_backward_hopper as hopper_kernel
from longctx_triton.kernels import flash_dq_products
from longctx_triton.launch import flash_backward_hopper as hopper_launch
from longctx_triton.launch import flash_hopper
from longctx_triton.launch.device import Device

pytestmark = play.needs_interpreter

LOCK = threading.Lock()


class Shared(play.Shared):
    def index(self, i):
        return Shared(self.data[int(i)])

    def reshape(self, shape):
        return Shared(self.data.view(*shape))

    def permute(self, order):
        return Shared(self.data.permute(*order))

    def slice(self, start, length, dim):
        return Shared(self.data.narrow(dim, start, length))

    def _reinterpret(self, dtype, shape, _layout):
        assert dtype == self.dtype
        return Shared(self.data.view(*shape))

    @property
    def layout(self):
        return None

    def load(self, _layout):
        return self.data.clone()

    @property
    def shape(self):
        return self.data.shape


class Pointer(play.Pointer):
    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)

    def to(self, _dtype):
        return self


class Product(play.Product):
    """One that may add to a product that nobody has waited for."""

    def finish(self):
        a, b, acc, use_acc = self.parts
        a, b = (t.data if isinstance(t, play.Shared) else t for t in (a, b))
        acc = acc.value if isinstance(acc, play.Product) else acc
        self.value = a.float() @ b.float() + (acc if use_acc else 0)


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    assert is_async
    play.queue("products").append(Product(a, b, acc, use_acc))
    return play.queue("products")[-1]


def arrive(barrier, count, pred=True):
    if pred:
        play.row(barrier).arrive(count)


def allocate(dtype, shape, layout):
    memory = play.allocate(dtype, shape, layout)
    single = dtype == torch.int64 and len(shape) == 1  # one barrier
    return Shared(memory.data[0] if single else memory.data)


def load_rows(memory, pointers):
    play.queue("rows").append((memory, pointers))


def rows_arrive(barrier, increment_count):
    """Arrive for the 32 threads of a warp once their copies have landed."""
    assert not increment_count
    copies = list(play.queue("rows"))
    play.queue("rows").clear()

    def land():
        time.sleep(2e-4)
        for memory, pointers in copies:
            memory.data.copy_(pointers.data.view(-1)[pointers.offset])
        play.row(barrier).arrive(32)

    threading.Thread(target=land).start()


def add(_assembly, _constraints, arguments, **_options):
    pointers, values = arguments
    with LOCK:
        pointers.data.view(-1).index_add_(0, pointers.offset, values)


class Simulated:
    """The kernel, called as Triton's is, program after program in this process."""

    def __init__(self):
        module = vars(flash_dq_products) | vars(hopper_kernel)
        names = {
            name: types.FunctionType(item.fn.__code__, {})
            for name, item in module.items()
            if hasattr(item, "fn") and hasattr(item.fn, "__code__")
        }
        language = types.SimpleNamespace(**vars(play.LANGUAGE))
        language.BlockedLayout = language.NVMMASharedLayout = play.quiet
        language.SwizzledSharedLayout = play.quiet
        language.allocate_shared_memory = allocate
        language.inline_asm_elementwise = add
        world = {
            **names,
            "gl": language,
            "tma": types.SimpleNamespace(store_wait=play.store_wait),
            "mbarrier": types.SimpleNamespace(**vars(play.MBARRIER) | {"arrive": arrive}),
            "async_copy": types.SimpleNamespace(mbarrier_arrive=rows_arrive),
            "fence_async_shared": play.quiet,
            "barrier": play.quiet,
            "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": play.warpgroup_mma_wait,
            "async_load": lambda d, c, b, m: play.async_load(d, c, Shared(play.row(b)), m),
            "async_load_rows": load_rows,
            "async_store": play.async_store,
            "_add_assembly": play.quiet,
            "hide": lambda scores, first, after: torch.where(
                torch.arange(scores.shape[1]) >= first[:, None], scores, -torch.inf
            ),
            "_ROW_PAIRS": None,
            "_KEYS": hopper_kernel.KEYS,
            "_ROWS": hopper_kernel.ROWS,
            "_LOG2E": math.log2(math.e),
            "float": float,
        }
        for item in names.values():
            item.__globals__.update(world)
        self.function = names["flash_backward_hopper_kernel"]
        self.launches = 0

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **constants):
            self.launches += 1
            assert num_warps == 4
            *descriptions, lse2, delta, sums = arguments[:9]
            pointers = [Pointer(t) for t in (lse2, delta, sums)]
            scale, *sizes = arguments[9:]
            sizes = [torch.tensor(size) for size in sizes]
            for program in range(grid[0]):
                play.GEOMETRY.program, play.GEOMETRY.programs = program, grid[0]
                self.function(*descriptions, *pointers, scale, *sizes, **constants)

        return launch


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that the CPU is a Hopper GPU."""
    kernel = Simulated()
    monkeypatch.setattr(hopper_launch, "flash_backward_hopper_kernel", kernel)
    monkeypatch.setattr(flash_hopper, "TensorDescriptor", play.Description)
    monkeypatch.setattr(flash, "device_of", lambda _: Device((9, 0), 3, 1 << 19))
    monkeypatch.delenv("LONGCTX_TRITON_FLASH", raising=False)
    return kernel


def tiles(monkeypatch, *sizes):
    monkeypatch.setattr(
        hopper_launch, "backward_tiles", lambda _dim: hopper_launch.BackwardTiles(*sizes)
    )


def gradients(q, k, v, dout, dlse, sinks, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    if sinks is not None:
        leaves.append(sinks.detach().to(dtype).requires_grad_())
    out, lse = oracle.flash_attention(
        *leaves[:3], sinks=leaves[3] if sinks is not None else None, **options
    )
    loss = (out * dout.to(dtype)).sum()
    loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * dlse.to(dtype)).sum()
    return [grad.nan_to_num() for grad in torch.autograd.grad(loss, leaves)]


def run(q, k, v, *, causal, sinks=None, scale=0.125, dout=None):
    options = {"causal": causal, "scale": scale}
    wide = None if sinks is None else sinks.double()
    out, lse = oracle.flash_attention(q.double(), k.double(), v.double(), sinks=wide, **options)
    out, lse = out.to(q.dtype), lse.float()
    if dout is None:
        dout = torch.randn(out.shape).to(q.dtype)
    dlse = torch.randn(lse.shape)
    *found, dsinks = flash.flash_backward(
        dout, dlse, q, k, v, out, lse, **options, window_left=None, window_right=None,
        softcap=0.0, sinks=sinks, cu_seqlens_q=None, cu_seqlens_k=None,
    )  # fmt: skip
    exact = gradients(q, k, v, dout, dlse, sinks, torch.float64, **options)
    rough = gradients(q, k, v, dout, dlse, sinks, q.dtype, **options)
    if sinks is not None:
        found.append(dsinks)
    for name, grad, right, low in zip(
        ("dq", "dk", "dv", "dsinks"), found, exact, rough, strict=False
    ):
        assert_within_budget(grad, right, low, name=name)


# batch, q_len, k_len, q_heads, kv_heads
SHAPES = [
    (1, 300, 300, 2, 1),
    (2, 130, 300, 4, 2),
    (1, 300, 140, 1, 1),
    (1, 5, 70, 2, 2),
    (1, 1, 64, 3, 1),
    (1, 257, 129, 2, 2),
]


@pytest.mark.parametrize("sizes", [(2, 2, True, 64, 208, 72),
                                   (3, 2, True, 32, 208, 72), (2, 2, False, 0, 240),
                                   (3, 3, False, 0, 240)])  # fmt: skip
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


@pytest.mark.parametrize("dim", [64, 128])
def test_the_shipped_tiles_and_strided_inputs(hopper, dim):
    q = torch.randn(2, 4, 150, dim).half().transpose(1, 2)
    k = torch.randn(2, 200, 3, dim).half()[:, :, 1:]
    v = torch.randn(2, 200, 2, dim + 128).half()[..., 64 : 64 + dim]
    run(q, k, v, causal=True)
    run(q, k, v, causal=False, dout=torch.ones(dim, dtype=torch.half).expand(q.shape))
    assert hopper.launches == 2


def test_what_the_kernel_declines_runs_portably(hopper, monkeypatch):
    taken = []
    monkeypatch.setattr(flash, "hopper_backward", lambda *_a, **_k: taken.append(1))
    q, k, v = (torch.randn(1, 20, 1, 64).half() for _ in range(3))
    lse = torch.zeros(1, 1, 20)
    base = {
        "causal": True, "window_left": None, "window_right": None, "softcap": 0.0, "sinks": None,
        "scale": 0.125, "cu_seqlens_q": None, "cu_seqlens_k": None,
    }  # fmt: skip
    flash.flash_backward(q, None, q, k, v, q, lse, **base)
    assert taken == [1]
    refused = [
        ({"window_left": 3}, k, v),
        ({"softcap": 1.0}, k, v),
        ({"scale": -1.0}, k, v),
        ({"causal": False, "window_right": 2}, k, v),
        ({}, torch.randn(1, 20, 68).half()[..., 4:].unsqueeze(2), v),
    ]
    for options, *tensors in refused:
        flash.flash_backward(q, None, q, *tensors, q, lse, **base | options)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    flash.flash_backward(q, None, q, k, v, q, lse, **base)
    monkeypatch.undo()
    assert taken == [1]
