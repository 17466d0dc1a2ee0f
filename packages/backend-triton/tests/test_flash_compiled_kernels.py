"""The flash kernels compiled for sm_80 and sm_90, without a GPU: instructions and spills.

Compilation happens in a process of its own, because Triton decides at import whether kernels are
compiled or interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

pytest.importorskip("triton")

COMPILER = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile as compile_kernel

TOOL = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
POINTERS = {
    "lse": "fp32", "sinks": "fp32", "lse2": "fp32", "delta": "fp32", "q_descale": "fp32",
    "k_descale": "fp32", "v_descale": "fp32", "ends_q": "i32", "ends_k": "i32",
}
DATA = {"q", "k", "v", "dout", "dq", "dk", "dv"}


def listing(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return [
            subprocess.run([TOOL, option, file.name], capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        ]


def report(kernel):
    usage, sass = listing(kernel.asm["cubin"])
    return {
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "spills in loops": spills_in_loops(sass),
        "ptx": kernel.asm["ptx"],
    }


def spills_in_loops(sass):
    # local memory between a backward branch and its target, where nothing but products loops
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)]
    loops = [
        (int(m[1], 16), address)
        for address, text in lines
        if "BRA" in text and (m := re.search(r"0x([0-9a-f]+)", text)) and int(m[1], 16) < address
    ]
    products = [address for address, text in lines if "MMA" in text]
    hot = [(a, b) for a, b in loops if any(a <= p <= b for p in products)]
    # retries of a barrier stand at the end and jump back into a loop: they are no loop themselves
    hot = [x for x in hot if not any(y[0] < x[0] < y[1] < x[1] for y in hot)]
    # of the others the innermost
    hot = [x for x in hot if not any(x[0] <= y[0] and y[1] <= x[1] and x != y for y in hot)]
    local = [address for address, text in lines if "LDL" in text or "STL" in text]
    assert hot, "no loop of products in the listing"
    return sum(any(a <= x <= b for a, b in hot) for x in local)


def portable(arch, which, head_dim, fp8, **features):
    from longctx_triton.kernels import flash_backward as backward
    from longctx_triton.launch.flash import Device, backward_tiles, forward_tiles
    from longctx_triton.kernels.flash_forward import flash_forward_kernel

    device = Device(divmod(arch, 10), 132, 50 << 20)
    softcap, left = features.get("softcap", False), features.get("left", False)
    plain = not (softcap or left or fp8)
    constants = {
        "HEAD_DIM": head_dim, "VALUE_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_V": head_dim,
        "SOFTCAP": softcap, "HAS_LEFT": left, "HAS_RIGHT": features.get("right", True),
        "VARLEN": features.get("varlen", False),
    }
    if which == "forward":
        function, tiles = flash_forward_kernel, forward_tiles(device, head_dim, plain)
        constants |= {"PRESCALED": softcap or bool(fp8), "FP8": fp8}
    else:
        function = backward.flash_dq_kernel if which == "dq" else backward.flash_dkdv_kernel
        tiles = backward_tiles(device, head_dim, plain)[which == "dkdv"]
    constants |= {"BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k}
    data = {"": "bf16", "native": "fp8e4nv", "bytes": "u8"}[fp8]
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        aligned = True
        if name in constants:
            signature[name], aligned = "constexpr", False
        elif name.startswith("ends_") and not constants["VARLEN"]:
            signature[name], constants[name], aligned = "constexpr", None, False
        elif name in DATA or name == "out":
            signature[name] = "*bf16" if name == "out" else f"*{data}"
        elif name in POINTERS:
            signature[name] = f"*{POINTERS[name]}"
        elif name in ("scale", "softcap"):
            signature[name], aligned = "fp32", False
        else:
            signature[name], aligned = "i32", name.startswith("stride_")
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return compile_kernel(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )


def hopper(head_dim, causal, ping_pong):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from longctx_triton.launch.flash_hopper import hopper_tiles
    from longctx_triton.kernels.flash_hopper import ROWS, flash_hopper_kernel as function

    tiles = hopper_tiles(head_dim)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    constants = {
        "CONSUMERS": tiles.consumers, "BLOCK_K": tiles.block_k, "HEAD_DIM": head_dim,
        "VALUE_DIM": head_dim, "STAGES": tiles.stages, "CAUSAL": causal, "HAS_SINKS": True,
        "PING_PONG": ping_pong, "REGISTERS": tiles.registers,
    }
    fixed = {"lse": "*fp32", "sinks": "*fp32", "scale": "fp32"}
    rows = {"p_q": ROWS, "p_o": ROWS, "p_k": tiles.block_k, "p_v": tiles.block_k}
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in rows:
            signature[name] = f"tensordesc<bf16[1, {rows[name]}, 1, {head_dim}],{layout!r}>"
        else:
            signature[name] = fixed.get(name, "i32")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if name in ("lse", "sinks")
    }
    source = GluonASTSource(function, signature, constants, attrs=attributes)
    return compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


for name, arguments in json.loads(sys.argv[1]):
    try:
        found = report(globals()[name](**arguments))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)
"""

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


TUNED = version("triton").startswith("3.6.")

SLACK = 16
"""Bytes of local memory outside of the loops that do not matter."""

PASSES = ("forward", "dq", "dkdv")
JOBS = {}
for which in PASSES:
    for arch, head_dim in ((80, 128), (90, 64), (90, 128), (89, 256), (90, 256)):
        job = {"arch": arch, "which": which, "head_dim": head_dim, "fp8": ""}
        JOBS[f"{which} {head_dim} sm_{arch}"] = ["portable", job]
    job = {"arch": 90, "which": which, "head_dim": 128, "fp8": ""}
    job |= {"softcap": True, "left": True, "varlen": True}
    JOBS[f"{which} with every feature"] = ["portable", job]
for arch, fp8 in ((80, "bytes"), (89, "native"), (90, "native")):
    job = {"arch": arch, "which": "forward", "head_dim": 128, "fp8": fp8}
    JOBS[f"fp8 sm_{arch}"] = ["portable", job]
for head_dim in (64, 128):
    for causal in (False, True):
        job = {"head_dim": head_dim, "causal": causal, "ping_pong": False}
        JOBS[f"hopper {head_dim} {'causal' if causal else 'full'}"] = ["hopper", job]
JOBS["hopper ping-pong"] = ["hopper", {"head_dim": 128, "causal": True, "ping_pong": True}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def listings():
    """Return what each job compiled to: PTX, bytes of stack and of shared memory, spills."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILER, json.dumps(list(JOBS.values()))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(JOBS, reports, strict=True))


@pytest.mark.parametrize("job", JOBS)
def test_listing(listings, job):
    found = listings[job]
    assert "error" not in found, found["error"]
    name, arguments = JOBS[job]
    arch, ptx = arguments.get("arch", 90), found["ptx"].replace("\t", "")
    assert found["shared"] <= SHARED_LIMIT[arch]
    assert ("wgmma.mma_async" in ptx) == (arch == 90)
    assert ("mma.sync" in ptx) == (arch < 90)
    if name == "hopper":
        assert "wgmma.wait_group.sync.aligned 1" in ptx
        assert "cp.async.bulk.tensor.4d" in ptx
        assert "setmaxnreg" in ptx
    elif arguments["fp8"] == "native":
        assert ".e4m3.e4m3" in ptx
    if not TUNED:
        pytest.skip("instructions are right; the tiles were chosen by Triton 3.6's registers")
    if name == "hopper":
        assert found["spills in loops"] == 0
    if arguments["head_dim"] < 256 and "left" not in arguments:
        assert found["stack"] <= SLACK
    else:
        assert found["stack"] <= 8 * SLACK
