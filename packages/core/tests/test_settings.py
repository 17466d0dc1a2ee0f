"""Numeric environment variables: defaults, overrides and clear refusals."""

from __future__ import annotations

import pytest

from longctx.settings import SETTINGS, budget_bytes, number


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
