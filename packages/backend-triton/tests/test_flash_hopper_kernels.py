"""The dense Gluon kernel's own source, run by threads: see hopper_simulator.

Numbers of the real device come from test_flash_kernels.py on a Hopper GPU.
"""

from __future__ import annotations

import math
import types
from collections import defaultdict

import hopper_simulator as play
import pytest
import torch

from longctx.reference import flash as oracle
from longctx.testing.budget import assert_within_budget

pytest.importorskip("triton")

from longctx_triton import flash
from longctx_triton.kernels import flash_hopper as hopper_kernel
from longctx_triton.kernels import flash_hopper_softmax
from longctx_triton.launch import flash_hopper as hopper_launch
from longctx_triton.launch.device import Device

pytestmark = play.needs_interpreter


class Simulated:
    """The kernel, called as Triton's is, program after program in this process."""

    def __init__(self, function):
        module = {**vars(flash_hopper_softmax), **vars(hopper_kernel)}
        names = {
            name: types.FunctionType(item.fn.__code__, {})
            for name, item in module.items()
            if hasattr(item, "fn") and hasattr(item.fn, "__code__")
        }
        world = {
            **names,
            "gl": play.LANGUAGE,
            "tma": types.SimpleNamespace(store_wait=play.store_wait),
            "mbarrier": play.MBARRIER,
            "fence_async_shared": play.quiet,
            "warpgroup_mma": play.warpgroup_mma,
            "warpgroup_mma_wait": play.warpgroup_mma_wait,
            "async_load": lambda d, c, b, m: play.async_load(d, c, play.Shared(play.row(b)), m),
            "async_store": play.async_store,
            "_depth": play.quiet,
            **play.SOFTMAX,
            "hide": play.hide,
            "NOTHING_SEEN": flash_hopper_softmax.NOTHING_SEEN.value,
            "_ROWS": hopper_kernel.ROWS,
            "_LOG2E": math.log2(math.e),
            "_LN2": math.log(2),
            "_SLACK": flash_hopper_softmax.SLACK,
            "float": float,
            "len": len,
        }
        for item in names.values():
            item.__globals__.update(world)
        self.function = names[function]
        self.launches = 0

    def __getitem__(self, grid):
        def launch(p_q, p_k, p_v, p_o, lse, *arguments, num_warps, **constants):
            self.launches += 1
            assert num_warps == 4
            pointers = [None if t is None else play.Pointer(t) for t in (lse, *arguments[:4])]
            scale, *sizes = arguments[4:]
            sizes = [torch.tensor(size) for size in sizes]
            for program in range(grid[0]):
                play.GEOMETRY.program, play.GEOMETRY.programs = program, grid[0]
                self.function(p_q, p_k, p_v, p_o, *pointers, scale, *sizes, **constants)

        return launch


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that the CPU is a Hopper GPU of three multiprocessors."""
    kernel = Simulated("flash_hopper_kernel")
    device = Device((9, 0), 3, 1 << 16)
    monkeypatch.setattr(hopper_launch, "flash_hopper_kernel", kernel)
    monkeypatch.setattr(hopper_launch, "TensorDescriptor", play.Description)
    hopper_launch._plan.cache_clear()
    monkeypatch.setattr(flash, "device_of", lambda _: device)
    monkeypatch.delenv("LONGCTX_TRITON_FLASH", raising=False)
    return kernel


def tiles(monkeypatch, *sizes):
    monkeypatch.setattr(
        hopper_launch, "hopper_tiles", lambda _dim, _fp8: hopper_launch.HopperTiles(*sizes)
    )
    hopper_launch._plan.cache_clear()


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


@pytest.mark.parametrize("rise", [0.7, 5.0, 40.0, -40.0])
def test_scores_that_rise_or_fall_from_block_to_block(hopper, monkeypatch, rise):
    """The walk goes from the last key to the first; some maxima pass the slack, some do not."""
    torch.manual_seed(0)
    tiles(monkeypatch, 2, 32, 2, 240, False)
    q = torch.randn(1, 130, 2, 64).half()
    q[..., 0] = 8.0
    k, v = (torch.randn(1, 300, 1, 64).half() for _ in range(2))
    k[..., 0] = (-rise * (torch.arange(300) // 32)).half().view(1, 300, 1)
    run(q, k, v, causal=True)
    assert hopper.launches == 1


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

    def widen(t, out, *_numbers, **_constants):
        out.copy_(t.half().reshape(-1))

    monkeypatch.setattr(hopper_launch, "widen_kernel", defaultdict(lambda: widen))
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
