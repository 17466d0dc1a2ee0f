"""Sessions of the monorepo; ``nox -l`` lists them, ``nox -s NAME`` runs one."""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]

PACKAGES = [
    f"packages/{name}" for name in ("core", "backend-triton", "backend-cupy", "backend-numba")
]
MODELS = "packages/models[plot,transformers]"
TEST_TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "sybil>=9")
DOC_TOOLS = ("sphinx>=8", "furo>=2024.8", "myst-parser>=4", "numpydoc>=1.8")


def install(session: nox.Session, *requirements: str) -> None:
    """Install with the versions of constraints.txt."""
    session.install("-c", "constraints.txt", *requirements)


def editable(session: nox.Session) -> None:
    """Install every package of the checkout, editable, in one call that resolves the siblings."""
    sources = [argument for package in (*PACKAGES, MODELS) for argument in ("-e", package)]
    install(session, *sources, *TEST_TOOLS)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Install core and models into a new environment and run the demo."""
    install(session, "packages/core", "packages/models[plot]")
    session.run("longctx", "doctor")
    session.run("longctx", "demo", *session.posargs)


# one thread a worker: the workers are what fills the cores
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def workers() -> list[str]:
    """Return the arguments that let pytest use the cores."""
    return ["-n", str(min(os.cpu_count() or 1, 8))]


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test that needs no GPU; the conformance suite is parity's."""
    editable(session)
    if session.posargs:
        session.run("pytest", *session.posargs, env=ONE_THREAD)
        return
    triton = "packages/backend-triton"
    others = [path for path in (*PACKAGES, "packages/models") if path != triton]
    paths = (*others, "tests/plugins", "docs", "README.md")
    session.run("pytest", *workers(), *paths, env=ONE_THREAD)
    # apart, because these tests switch Triton's interpreter on for their whole process; those of
    # its compiler that are marked slow repeat the others for more devices and options
    session.run("pytest", *workers(), triton, "-m", "not slow", env=ONE_THREAD)


@nox.session
def parity(session: nox.Session) -> None:
    """Run the conformance suite over every usable backend, and compare the backends."""
    editable(session)
    if session.posargs:
        session.run("pytest", "tests/parity", *session.posargs, env=ONE_THREAD)
        return
    # a fixed seed: a check-in is judged on what it changes, not on luck
    seed = "--longctx-seed=1"
    session.run("pytest", "tests/parity", seed, *workers(), env=ONE_THREAD)
    # Triton's interpreter is slow: the ready-made cases of every op, and the comparison
    chosen = ("-k", "TestEveryOp or agree", "--longctx-max-length=260")
    interpret = {**ONE_THREAD, "TRITON_INTERPRET": "1"}
    session.run("pytest", "tests/parity", seed, *workers(), *chosen, env=interpret)


@nox.session
def conformance(session: nox.Session) -> None:
    """Run the kit on the plugin template as a wheel, alone and beside a broken plugin."""
    session.install("build", "setuptools>=77", "wheel")
    wheels = Path(session.create_tmp()) / "wheels"
    template, broken = "docs/plugin-template", "tests/plugins/broken_plugin"
    for source in ("packages/core", template, broken):
        session.run(
            "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), source,
            silent=True,
        )  # fmt: skip
    session.run("pip", "uninstall", "--yes", "longctx-broken-plugin", silent=True)
    built = {path.name.split("-")[0]: str(path) for path in sorted(wheels.glob("*.whl"))}
    broken_wheel = built.pop("longctx_broken_plugin")
    install(session, "--force-reinstall", "--no-deps", *built.values())
    install(session, "--find-links", str(wheels), "longctx-core", *TEST_TOOLS)
    suite = ("pytest", "-c", f"{template}/pyproject.toml", f"{template}/tests")
    session.run(*suite, *session.posargs)
    install(session, "--force-reinstall", "--no-deps", broken_wheel)
    session.run(*suite, "-q", *session.posargs)
    session.run("pytest", "tests/install/third_party.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("ruff>=0.8")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types: strict for every package."""
    editable(session)
    session.install("mypy>=1.13")
    for package in sorted(Path("packages").glob("*/src/*")):
        if (package / "py.typed").exists():
            session.run("mypy", str(package))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    editable(session)
    install(session, *DOC_TOOLS)
    session.run(
        "sphinx-build",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "docs",
        "docs/_build/html",
        *session.posargs,
    )


@nox.session
def bench(session: nox.Session) -> None:
    """Run the CPU shapes of ``longctx bench`` and the scripts that measure what it does not."""
    editable(session)
    session.run("longctx", "bench", *(session.posargs or ["--all", "--device", "cpu"]))
    if not session.posargs:
        for script in sorted(Path("packages/core/benchmarks").glob("*.py")):
            session.run("python", str(script))


@nox.session
def build(session: nox.Session) -> None:
    """Build wheels and sdists, check their contents, rehearse an installation from them."""
    session.install("build", "setuptools>=77", "wheel", "twine")
    dist = Path(session.create_tmp()) / "dist"
    for package in (*PACKAGES, "packages/models"):
        session.run(
            "python", "-m", "build", "--no-isolation", "--outdir", str(dist), package, silent=True
        )
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    session.run("python", "tests/install/wheel_contents.py", str(dist))
    siblings = ("longctx-core", "longctx-models", "longctx-backend-triton")
    session.install("--dry-run", "--no-deps", "--no-index", "--find-links", str(dist), *siblings)
