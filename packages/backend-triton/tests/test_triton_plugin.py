"""The Triton backend registers, says what is missing, and claims nothing that it cannot run."""

from __future__ import annotations

import sys

import pytest
import torch

import longctx
from longctx_triton import plugin
from longctx_triton.support import SUPPORT


def test_registers_through_its_entry_point():
    info = longctx.registry().backends["triton"]
    assert info.protocol == longctx.PROTOCOL_VERSION
    assert longctx.registry().sources["backends", "triton"].startswith("longctx-backend-triton")


def test_discovery_does_not_import_the_kernel_library():
    assert "triton" not in sys.modules or torch.cuda.is_available()


def test_every_missing_piece_comes_with_a_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reasons = plugin.missing()
    assert reasons[0].code == longctx.ReasonCode.NOT_INSTALLED
    assert "triton" in reasons[0].message
    assert all(reason.hint for reason in reasons)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_gpu_is_told_so():
    codes = {reason.code for reason in plugin.missing()}
    assert longctx.ReasonCode.NO_DEVICE in codes
    candidates = longctx.explain("flash_attention", device="cpu").candidates
    row = next(c for c in candidates if c.backend == "triton")
    assert not row.can_run
    assert row.reasons


def test_a_call_that_asks_for_it_by_name_is_refused_with_the_reason():
    q = torch.randn(1, 4, 1, 64)
    if "flash_attention" in SUPPORT and torch.cuda.is_available():
        pytest.skip("this machine can run it")
    with pytest.raises(longctx.UnsupportedError, match="backend 'triton', asked for by argument"):
        longctx.flash_attention(q, q, q, backend="triton")


@pytest.mark.parametrize(("version", "fits"), [("3.5.1", False), ("3.6.0", True), ("3.9.0", True)])
def test_the_version_of_triton_is_checked(monkeypatch, version, fits):
    monkeypatch.setattr(plugin, "missing_library", lambda *_: ())
    monkeypatch.setattr(plugin, "missing_cuda", lambda: ())
    monkeypatch.setattr(plugin.metadata, "version", lambda _: version)
    assert (plugin.missing() == ()) is fits
