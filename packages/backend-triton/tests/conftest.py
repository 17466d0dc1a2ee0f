"""Kernels run on a CUDA device when there is one, in Triton's interpreter otherwise."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported and kernels are decorated

collect_ignore_glob = [] if TRITON else ["test_*_kernels.py"]


@pytest.fixture(scope="session", autouse=True)
def no_tables_of_the_user(tmp_path_factory):
    """Keep tiles that were tuned on this machine out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGCTX_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def device():
    """Return the device that kernels are tested on."""
    return torch.device("cpu" if INTERPRETED else "cuda")


def _mend_bf16() -> None:
    """Mend bf16 in the interpreter, which multiplies its bits as integers and truncates."""
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    create_dot, convert = builder.create_dot, interpreter._convert_float

    def widened(operand: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    def to_nearest_even(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

    builder.create_dot = dot
    interpreter._convert_float = to_nearest_even


if INTERPRETED and TRITON:
    _mend_bf16()
