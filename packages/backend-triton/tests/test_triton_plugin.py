"""The Triton backend checks the version of Triton before its kernels are imported."""

from __future__ import annotations

import pytest

from longctx_triton import plugin


@pytest.mark.parametrize(("version", "fits"), [("3.5.1", False), ("3.6.0", True), ("3.9.0", True)])
def test_the_version_of_triton_is_checked(monkeypatch, version, fits):
    monkeypatch.setattr(plugin, "missing_library", lambda *_: ())
    monkeypatch.setattr(plugin, "missing_cuda", lambda: ())
    monkeypatch.setattr(plugin.metadata, "version", lambda _: version)
    assert (plugin.missing() == ()) is fits
