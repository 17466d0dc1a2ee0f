"""The GPU backend packages register, say what is missing, and claim nothing that cannot run."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import longctx

LIBRARIES = {"triton": "triton", "cupy": "cupy", "numba": "numba_cuda"}


@pytest.fixture(params=LIBRARIES)
def name(request):
    return request.param


@pytest.fixture
def plugin(name):
    return importlib.import_module(f"longctx_{name}.plugin")


def test_registers_through_its_entry_point(name):
    assert longctx.registry().backends[name].protocol == longctx.PROTOCOL_VERSION
    assert longctx.registry().sources["backends", name].startswith(f"longctx-backend-{name}")


def test_discovery_imports_no_kernel_library():
    code = "import sys, longctx; longctx.registry(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(LIBRARIES.values()) & set(done.stdout.split())


def test_every_missing_piece_comes_with_a_remedy(name, plugin, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    reasons = plugin.missing()
    assert reasons[0].code == longctx.ReasonCode.NOT_INSTALLED
    assert LIBRARIES[name] in reasons[0].message
    assert all(reason.hint for reason in reasons)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_gpu_is_told_so(name, plugin):
    codes = {reason.code for reason in plugin.missing()}
    assert longctx.ReasonCode.NO_DEVICE in codes
    candidates = longctx.explain("flash_attention", device="cpu").candidates
    row = next(c for c in candidates if c.backend == name)
    assert not row.can_run
    assert row.reasons


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_call_that_asks_for_it_by_name_is_refused_with_the_reason(name):
    q = torch.randn(1, 4, 1, 64)
    with pytest.raises(longctx.UnsupportedError, match=f"{name!r}, asked for by argument"):
        longctx.flash_attention(q, q, q, backend=name)
