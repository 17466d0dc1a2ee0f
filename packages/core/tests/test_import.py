"""Importing longctx is cheap, touches no GPU library and probes nothing."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, sys, time
import torch
start = time.perf_counter()
import longctx
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


def imported():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_pulls_in_no_heavy_module():
    modules = set(imported()["modules"])
    heavy = {
        "triton",
        "cupy",
        "numba",
        "transformers",
        "matplotlib",
        "rich",
        "typer",
        "torch._dynamo",
    }
    assert not heavy & modules
    assert not any(name.startswith("longctx.torch_backend") for name in modules)


def test_public_names_exist_and_are_sorted():
    import longctx

    assert all(hasattr(longctx, name) for name in longctx.__all__)
    assert longctx.__version__ == "0.1.0"
