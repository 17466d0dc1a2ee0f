"""What the device can do at best, measured in the same run: matrix products, copies, reads."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.bench.counting import Work
from longctx.bench.timing import Clock
from longctx.support import DTYPES

__all__ = ["Ceilings", "Floor", "measure_ceilings"]

REPEATS = 15


@dataclass(frozen=True)
class Ceilings:
    """Rates of plain operations.

    Attributes
    ----------
    matmul : dict of str to float
        FLOP/s of a large square product, by the short name of the data type.
    copy : float
        Bytes read and written a second by a large copy.
    read : float
        Bytes read a second by a large sum.
    """

    matmul: dict[str, float]
    copy: float
    read: float

    def floor(self, work: Work, dtype: str) -> Floor:
        """Return the least time for some work, and which ceiling sets it."""
        rate = self.matmul.get(dtype) or self.matmul.get("bf16") or 0.0
        arithmetic = work.flops / rate if rate else 0.0
        traffic = work.bytes / max(self.copy, self.read)
        if arithmetic > traffic:
            return Floor(arithmetic, "compute")
        return Floor(traffic, "memory")

    def as_dict(self) -> dict[str, float]:
        """Return the rates in TFLOP/s and TB/s, for JSON."""
        rates = {f"matmul_{dtype}_tflops": rate / 1e12 for dtype, rate in self.matmul.items()}
        return rates | {"copy_tbs": self.copy / 1e12, "read_tbs": self.read / 1e12}


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time that some work can take.

    Attributes
    ----------
    seconds : float
    bound : {"compute", "memory"}
    """

    seconds: float
    bound: str


def measure_ceilings(device: torch.device, dtypes: Iterable[str], clock: Clock) -> Ceilings:
    """Measure the rates of a device on random data.

    Parameters
    ----------
    device : torch.device
    dtypes : iterable of str
        Short names of the data types whose products matter.
    clock : Clock

    Returns
    -------
    Ceilings
        Without a product that the device does not have, such as fp8 on a CPU.
    """
    gpu = device.type == "cuda"
    size, elements = (8192, 2**29) if gpu else (1024, 2**25)
    matmul = {}
    for name in dict.fromkeys(("bf16", *dtypes) if gpu else dtypes):
        rate = _matmul_rate(device, name, size, clock)
        if rate is not None:
            matmul[name] = rate
    source = torch.randn(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    held = source.numel() * source.element_size()
    copy = 2 * held / _median(lambda: target.copy_(source), clock)
    # a sum of bytes as 64-bit words costs the least arithmetic; the data stay random
    words = source.view(torch.int64)
    read = held / _median(lambda: words.sum(), clock)
    return Ceilings(matmul, copy, read)


def _matmul_rate(device: torch.device, name: str, size: int, clock: Clock) -> float | None:
    dtype = DTYPES[name]
    try:
        if dtype.itemsize == 1:
            if device.type != "cuda":
                return None
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            one = torch.ones((), device=device)
            taken = _median(lambda: _scaled_product(a, b, one), clock)
        else:
            x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            taken = _median(lambda: x @ y, clock)
    except (RuntimeError, NotImplementedError):  # a GPU without fp8, a build without the product
        return None
    return 2.0 * size**3 / taken


def _scaled_product(a: Tensor, b: Tensor, one: Tensor) -> Tensor:
    return torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _median(call: Callable[[], object], clock: Clock) -> float:
    for _ in range(2):
        clock.seconds(call)
    return statistics.median(clock.seconds(call) for _ in range(REPEATS))
