"""Check the built distributions: typed, licensed, with their entry points, and within size."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ENTRY_POINTS = {
    "longctx_core": ("[console_scripts]", "longctx = longctx.cli:main"),
    "longctx_models": ("[longctx]", "[longctx.cli]"),
    "longctx_backend_triton": ("[longctx]", "longctx_triton.plugin"),
    "longctx_backend_cupy": ("[longctx]", "longctx_cupy.plugin"),
    "longctx_backend_numba": ("[longctx]", "longctx_numba.plugin"),
}
LARGEST = 40 * 2**20


def problems(wheel: Path) -> list[str]:
    """Return what is wrong with one wheel."""
    found = []
    dist = wheel.name.split("-")[0]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = next((n for n in names if n.endswith("entry_points.txt")), None)
        text = archive.read(entry_points).decode() if entry_points else ""
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    found += [f"no {part} in entry_points.txt" for part in ENTRY_POINTS[dist] if part not in text]
    if not any(n.endswith("py.typed") for n in names):
        found.append("no py.typed")
    if not any("licenses/LICENSE" in n for n in names):
        found.append("no LICENSE")
    if "torch==" in metadata or " @ " in metadata:
        found.append("a pinned or direct dependency in METADATA")
    if dist == "longctx_models" and not any(n.endswith("needle/model.safetensors") for n in names):
        found.append("no packaged needle weights")
    if wheel.stat().st_size > LARGEST:
        found.append(f"larger than {LARGEST >> 20} MiB")
    return [f"{wheel.name}: {problem}" for problem in found]


def main() -> int:
    """Check every distribution of a folder; return the number of problems."""
    folder = Path(sys.argv[1])
    wheels = sorted(folder.glob("*.whl"))
    found = [problem for wheel in wheels for problem in problems(wheel)]
    built = {wheel.name.split("-")[0] for wheel in wheels}
    found += [f"{dist} was not built" for dist in sorted(set(ENTRY_POINTS) - built)]
    for source in sorted(folder.glob("*.tar.gz")):
        with tarfile.open(source) as archive:
            if not any(name.endswith("/LICENSE") for name in archive.getnames()):
                found.append(f"{source.name}: no LICENSE")
    print("\n".join(found) or f"{len(wheels)} wheels are as they should be")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
