"""Every pair of usable backends on the same inputs."""

from __future__ import annotations

import itertools

import pytest
import torch

import longctx
from longctx.support import OpRequest, reasons_against
from longctx.testing.budget import assert_within_budget
from longctx.testing.cases import CASES, cast
from longctx.testing.selection import device_for

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INSTALLED = list(longctx.registry().backends)
BACKENDS = [n for n in INSTALLED if not isinstance(longctx.registry().load_backend(n), tuple)]
PAIRS = list(itertools.combinations(BACKENDS, 2))


@pytest.mark.parametrize("backend", INSTALLED)
def test_backend_is_usable_here(backend):
    loaded = longctx.registry().load_backend(backend)
    if isinstance(loaded, tuple):
        pytest.skip("; ".join(reason.message for reason in loaded))


def device_of(backend, case, dtype):
    """Return where a backend runs a case; skip with its reasons if it does not declare it."""
    loaded = longctx.registry().load_backend(backend)
    device = device_for(loaded, case.op, "auto")
    arch = torch.cuda.get_device_capability() if device.type == "cuda" else None
    request = OpRequest(case.op, device.type, arch, dtype, 64, 64, 4, 2, case.features)
    reasons = reasons_against(loaded.support().get(case.op), request)
    if reasons := reasons or tuple(loaded.reasons(request)):
        pytest.skip(f"{backend}: " + "; ".join(reason.message for reason in reasons))
    return device


@pytest.mark.skipif(not PAIRS, reason="fewer than two usable backends")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_backends_agree(pair, case, dtype):
    made = case.inputs(torch.Generator().manual_seed(7))
    devices = [device_of(backend, case, dtype) for backend in pair]
    first, second = (
        case.call(backend, **cast(case, made, device, dtype))
        for backend, device in zip(pair, devices, strict=True)
    )
    exact, low = case.references(made, dtype)
    for a, b, right, about in zip(first, second, exact, low, strict=True):
        # two results within their budgets of the oracle are within the sum of both of each other
        budget = assert_within_budget(b.cpu(), right, about.to(b.dtype))
        difference = (a.cpu().double() - b.cpu().double()).nan_to_num(0.0)
        assert difference.abs().max() <= 2 * budget.allowed
