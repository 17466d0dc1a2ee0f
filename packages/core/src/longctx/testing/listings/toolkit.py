"""Where pieces of the CUDA toolkit are: pip's NVIDIA wheels, Triton's own, CUDA_HOME, PATH."""

from __future__ import annotations

import ctypes.util
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["disassemble", "find_include_folders", "find_library", "is_installed"]


def is_installed(module: str) -> bool:
    """Tell whether a module can be found, without importing it (but its parents are)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def find_library(name: str) -> str | None:
    """Return the path of a toolkit's shared library such as ``"nvrtc"``, or None."""
    for folder in _folders("lib", "lib64"):
        found = sorted(folder.glob(f"lib{name}.so*"))
        if found:
            return str(found[-1])
    return ctypes.util.find_library(name)


def find_include_folders() -> list[str]:
    """Return the folders that hold CUDA headers, for ``-I``."""
    return [str(folder) for folder in _folders("include")]


def disassemble(cubin: bytes, entry: str) -> str | None:
    """Return the machine code of one kernel as text.

    Parameters
    ----------
    cubin : bytes
        An assembled module.
    entry : str
        Symbol of the kernel.

    Returns
    -------
    str or None
        None if no nvdisasm is installed (``pip install nvidia-cuda-nvdisasm``).

    Raises
    ------
    ValueError
        The module has no such kernel.
    """
    tool = _nvdisasm()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "module.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([tool, "-c", str(file)], capture_output=True, text=True, check=False)
    text = done.stdout.partition(f"\n.text.{entry}:\n")[2]
    if not text:
        raise ValueError(f"no kernel {entry!r} in the disassembly; {done.stderr.strip()}")
    return re.split(r"^//-{8,}", text, maxsplit=1, flags=re.MULTILINE)[0]


@functools.cache
def _nvdisasm() -> str | None:
    """Return the newest nvdisasm: it reads what older compilers write, not the reverse."""
    found = [folder / "nvdisasm" for folder in _folders("bin")]
    on_path = shutil.which("nvdisasm")
    tools = [str(tool) for tool in found if tool.is_file()] + ([on_path] if on_path else [])
    return max(tools, key=_release, default=None)


def _release(tool: str) -> tuple[int, ...]:
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"V(\d+)\.(\d+)\.(\d+)", done.stdout)
    return tuple(int(part) for part in version.groups()) if version else ()


def _folders(*names: str) -> Iterator[Path]:
    roots: list[Path] = []
    if is_installed("nvidia"):
        spec = importlib.util.find_spec("nvidia")
        locations = (spec.submodule_search_locations if spec else None) or ()
        roots += [child for place in locations for child in sorted(Path(place).glob("*"))]
    if is_installed("triton") and (triton := importlib.util.find_spec("triton")) and triton.origin:
        roots.append(Path(triton.origin).parent / "backends" / "nvidia")
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for root in roots:
        yield from (root / name for name in names if (root / name).is_dir())
