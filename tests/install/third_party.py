"""Run where core and two third-party plugins are installed as wheels, one of them broken."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import longctx


def test_the_template_is_discovered_from_its_wheel():
    assert longctx.registry().backends["naive"].version == "0.3.0"
    assert longctx.registry().sources["backends", "naive"] == "longctx-naive 0.3.0"


def test_the_template_is_refused_where_it_declares_nothing():
    q = torch.randn(1, 5, 2, 80)
    with pytest.raises(longctx.UnsupportedError, match=r"head_dim 80 not in \{32, 64\}"):
        longctx.flash_attention(q, q, q, backend="naive")


def test_the_broken_plugin_is_recorded_and_harms_nobody():
    (failure,) = [f for f in longctx.registry().failures if f.dist == "longctx-broken-plugin"]
    assert failure.version == "9.9.0"
    assert "libmissing.so.7" in failure.reason.message
    q = torch.randn(1, 5, 2, 64)
    assert longctx.flash_attention(q, q, q).shape == q.shape


def test_doctor_shows_both():
    command = [sys.executable, "-m", "longctx", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert "naive" in {backend["name"] for backend in report["backends"]}
    assert report["failures"][0]["dist"] == "longctx-broken-plugin"


def test_strict_mode_raises():
    command = [sys.executable, "-c", "import longctx; longctx.registry()"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"LONGCTX_STRICT_PLUGINS": "1"}, check=False
    )
    assert done.returncode != 0
    assert "PluginError" in done.stderr
