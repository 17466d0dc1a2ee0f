"""Numeric environment variables: defaults, overrides and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.settings import SETTINGS, budget_bytes, cache_dir, is_set, number, switched_on


@pytest.mark.parametrize("name", SETTINGS)
def test_default_and_override(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    assert number(name) == SETTINGS[name].default
    monkeypatch.setenv(name, " ")
    assert number(name) == SETTINGS[name].default
    monkeypatch.setenv(name, "0.5")
    assert number(name) == 0.5
    assert budget_bytes(name) == 2**19


@pytest.mark.parametrize("text", ["much", "0", "-3", "nan", "inf"])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_no_number_is_refused_by_name(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=rf"{name} \(.*\) must be a number above 0, got '{text}'"):
        number(name)


def test_unknown_setting():
    with pytest.raises(LookupError, match="did you mean 'LONGCTX_INDEX_BUDGET_MIB'"):
        number("LONGCTX_INDEX_BUDGET_MB")


def test_switches_follow_the_environment(monkeypatch):
    name = "LONGCTX_CHECK_VALUES"
    monkeypatch.delenv(name, raising=False)
    assert (is_set(name), switched_on(name)) == (False, False)
    for text, on in (("1", True), (" yes ", True), ("", False), (" Off ", False), ("0", False)):
        monkeypatch.setenv(name, text)
        assert (is_set(name), switched_on(name)) == (True, on)
    monkeypatch.delenv(name)
    assert not is_set(name)


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("LONGCTX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "longctx"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "longctx"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/longctx")
    monkeypatch.setenv("LONGCTX_CACHE_DIR", "~/own")
    assert cache_dir() == tmp_path / "own"
