"""What is installed, what works and why the rest does not: ``longctx doctor`` as data."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from longctx.dispatch import absent_backends
from longctx.plugins import PluginFailure, registry
from longctx.probes import cuda_driver
from longctx.protocols.version import PROTOCOL_VERSION
from longctx.support import Reason, ReasonCode

__all__ = ["BackendReport", "DoctorReport", "SmokeResult", "diagnose"]


@dataclass(frozen=True)
class SmokeResult:
    """Outcome of one small attention call on one backend.

    Attributes
    ----------
    device : str
        Where it ran.
    max_error : float or None
        Largest absolute difference from the fp64 oracle; None if the call failed.
    error : str
        The failure; empty when it ran.
    """

    device: str
    max_error: float | None
    error: str = ""


@dataclass(frozen=True)
class BackendReport:
    """State of one backend.

    Attributes
    ----------
    name, version, source : str
        Its name, version, and the distribution (or module) that brings it.
    protocol : str
        Protocol version it speaks.
    usable : bool
        Whether it loads on this machine and declares at least one op.
    ops : tuple of str
        Ops that it declares.
    reasons : tuple of Reason
        What is missing.
    smoke : SmokeResult or None
        Present when a smoke test was asked for and the backend is usable.
    """

    name: str
    version: str
    source: str
    protocol: str
    usable: bool
    ops: tuple[str, ...]
    reasons: tuple[Reason, ...]
    smoke: SmokeResult | None = None


@dataclass(frozen=True)
class DoctorReport:
    """Everything that ``longctx doctor`` prints.

    Attributes
    ----------
    environment : mapping of str to str
        Versions, platform, driver, GPUs, and the LONGCTX_* variables that are set.
    backends : tuple of BackendReport
    failures : tuple of PluginFailure
        Plugins that are not used, and why.
    selectors, kv_caches : tuple of str
        Names registered by plugins.
    """

    environment: dict[str, str]
    backends: tuple[BackendReport, ...]
    failures: tuple[PluginFailure, ...]
    selectors: tuple[str, ...]
    kv_caches: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)


def diagnose(*, smoke: bool = False) -> DoctorReport:
    """Look at the machine, the plugins and the backends.

    Parameters
    ----------
    smoke : bool
        Also run a small attention call on every usable backend and compare it with the oracle.

    Returns
    -------
    DoctorReport
    """
    found = registry()
    reports = [_backend_report(name, smoke) for name in found.backends]
    for name, reasons in absent_backends().items():
        reports.append(BackendReport(name, "", "", "", False, (), reasons))
    return DoctorReport(
        environment=_environment(),
        backends=tuple(reports),
        failures=tuple(found.failures),
        selectors=tuple(found.selectors),
        kv_caches=tuple(found.kv_caches),
    )


def _environment() -> dict[str, str]:
    driver = cuda_driver()
    found = {
        "longctx-core": _version_of("longctx-core"),
        "longctx-models": _version_of("longctx-models"),
        "protocol": ".".join(map(str, PROTOCOL_VERSION)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "cuda driver": f"CUDA {driver.version[0]}.{driver.version[1]}"
        if driver.version
        else f"none ({driver.error})",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found[f"gpu {index}"] = (
                f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB"
            )
    else:
        found["gpu"] = "none"
    found.update({k: v for k, v in sorted(os.environ.items()) if k.startswith("LONGCTX_")})
    return found


def _version_of(dist: str) -> str:
    try:
        return metadata.version(dist)
    except metadata.PackageNotFoundError:
        return "not installed"


def _backend_report(name: str, smoke: bool) -> BackendReport:
    found = registry()
    info = found.backends[name]
    loaded = found.load_backend(name)
    reasons: tuple[Reason, ...] = ()
    ops: tuple[str, ...] = ()
    if isinstance(loaded, tuple):
        reasons = loaded
    else:
        ops = tuple(loaded.support())
        if not ops:
            reasons = (Reason(ReasonCode.OP, "declares no op yet"),)
    return BackendReport(
        name=name,
        version=info.version,
        source=found.sources["backends", name],
        protocol=".".join(map(str, info.protocol)),
        usable=bool(ops),
        ops=ops,
        reasons=reasons,
        smoke=_smoke(name) if smoke and "flash_attention" in ops else None,
    )


def _smoke(name: str) -> SmokeResult:
    """Run a small causal attention and compare it with the oracle."""
    from longctx.ops.flash import flash_attention
    from longctx.reference.flash import flash_attention as oracle

    loaded = registry().load_backend(name)
    assert not isinstance(loaded, tuple)
    devices = loaded.support()["flash_attention"].devices
    device = "cuda" if torch.cuda.is_available() and "cuda" in devices else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 129, h, 64, generator=generator) for h in (4, 2, 2))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensors = [t.to(device, dtype) for t in (q, k, v)]
    try:
        out = flash_attention(*tensors, causal=True, backend=name)
    except Exception as error:  # a doctor reports whatever a backend raises
        return SmokeResult(device, None, f"{type(error).__name__}: {error}")
    exact, _ = oracle(*(t.double().cpu() for t in tensors), causal=True)
    return SmokeResult(device, float((out.double().cpu() - exact).abs().max()))
