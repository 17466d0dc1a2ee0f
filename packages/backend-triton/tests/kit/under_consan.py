"""Run a script under Triton's concurrency sanitizer: python under_consan.py SCRIPT ARGUMENTS.

The sanitizer keeps in global memory who may read and write each buffer of shared memory, follows
mbarriers and copies, and stops the kernel at an access that nothing orders.
"""

from __future__ import annotations

import os
import runpy
import sys

os.environ["TRITON_INSTRUMENTATION_MODE"] = "consan"
os.environ["CUDA_LAUNCH_BLOCKING"] = "1"

import torch
from triton.runtime import _allocation


def _memory(_self: object, size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


# in place of the allocator that refuses, which is what autograd's threads have
_allocation.NullAllocator.__call__ = _memory
# those threads find the GPU's context by this
torch.cuda.current_blas_handle()

sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
