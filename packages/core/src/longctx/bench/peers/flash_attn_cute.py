"""flash-attn-4: FlashAttention in the CuTe DSL (module ``flash_attn.cute``)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.peers.peer import missing_module, only_cuda
from longctx.bench.prepared import Prepared, backward_call, forward_call
from longctx.bench.workloads.workload import Inputs

__all__ = ["FlashAttnCute"]

_MODULE = "flash_attn.cute.interface"


@dataclass(frozen=True)
class FlashAttnCute:
    """``flash_attn.cute.flash_attn_func``, which has longctx's own layout."""

    name: str = "flash-attn-4"
    ops: frozenset[str] = frozenset({"flash_attention"})

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run here."""
        return only_cuda(device) or missing_module(_MODULE, self.name, "pip install flash-attn-4")

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why it does not run a case."""
        if torch.cuda.get_device_capability(device) < (9, 0):
            return "its kernels are for sm_90 and newer"
        return None if case.dtype in ("bf16", "fp16") else "takes bf16 and fp16"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Return the call."""
        flash_attn_func = importlib.import_module(_MODULE).flash_attn_func
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        options: dict[str, Any] = {"causal": case.causal}
        if case.window is not None:
            options = {"causal": False, "window_size": (case.window, 0)}

        def attend(*tensors: Tensor) -> Tensor:
            result = flash_attn_func(*tensors, **options)
            out: Tensor = result[0] if isinstance(result, tuple) else result
            return out

        if case.backward:
            return backward_call(attend, (q, k, v), inputs["dout"])
        return forward_call(lambda: attend(q, k, v), ("out",))
