"""Every installed backend against the oracle and the other backends, on the same inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from parity_cases import CASES, cast

import longctx
from longctx.support import OpRequest, reasons_against
from longctx.testing.budget import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16]
INSTALLED = list(longctx.registry().backends)
BACKENDS = [n for n in INSTALLED if not isinstance(longctx.registry().load_backend(n), tuple)]


def device_for(backend: str, case, dtype: torch.dtype) -> str:
    """Return where a backend can run a case; skip with its reasons if nowhere."""
    loaded = longctx.registry().load_backend(backend)
    assert not isinstance(loaded, tuple)
    reasons = ()
    for device in ("cuda", "cpu"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        arch = torch.cuda.get_device_capability() if device == "cuda" else None
        request = OpRequest(case.op, device, arch, dtype, 64, 64, 4, 2, case.features)
        reasons = reasons_against(loaded.support().get(case.op), request)
        reasons += tuple(loaded.reasons(request)) if not reasons else ()
        if not reasons:
            return device
    pytest.skip(f"{backend}: " + "; ".join(reason.message for reason in reasons))


@pytest.mark.parametrize("backend", INSTALLED)
def test_backend_is_usable_here(backend):
    loaded = longctx.registry().load_backend(backend)
    if isinstance(loaded, tuple):
        pytest.skip("; ".join(reason.message for reason in loaded))


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_matches_the_oracle(backend, case, dtype, parity_table):
    device = device_for(backend, case, dtype)
    made = case.inputs(torch.Generator().manual_seed(torch.seed() % 2**31))
    inputs = cast(case, made, device, dtype)
    results = case.call(backend, **inputs)
    # the oracle sees the values after rounding to the tested dtype
    rounded = cast(case, made, "cpu", dtype)
    exact = case.oracle(**cast(case, rounded, "cpu", torch.float64))
    low = case.oracle(**rounded)
    for position, (actual, right, reference) in enumerate(zip(results, exact, low, strict=True)):
        # some oracles widen their inputs: the output's own rounding belongs to the budget
        reference = reference.to(actual.dtype)
        budget = assert_within_budget(actual, right, reference, name=f"output {position}")
        parity_table(backend, case.op, dtype, budget)


PAIRS = list(itertools.combinations(BACKENDS, 2))


@pytest.mark.skipif(not PAIRS, reason="fewer than two usable backends")
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_backends_agree(pair, case, dtype):
    made = case.inputs(torch.Generator().manual_seed(7))
    devices = [device_for(backend, case, dtype) for backend in pair]
    first, second = (
        case.call(backend, **cast(case, made, device, dtype))
        for backend, device in zip(pair, devices, strict=True)
    )
    rounded = cast(case, made, "cpu", dtype)
    exact = case.oracle(**cast(case, rounded, "cpu", torch.float64))
    for a, b, right in zip(first, second, exact, strict=True):
        # two results within their budgets of the oracle are within the sum of both of each other
        assert_within_budget(a.cpu().double() - b.cpu().double() + right, right, b.cpu())
