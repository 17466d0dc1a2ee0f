"""PyTorch's ``scaled_dot_product_attention`` with a given kernel."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longctx.bench.case import Case
from longctx.bench.peers.peer import only_cuda
from longctx.bench.prepared import Prepared, backward_call, forward_call
from longctx.bench.workloads.workload import Inputs

__all__ = ["Sdpa"]

_KERNELS = {
    "sdpa-fa2": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Sdpa:
    """SDPA: ``"sdpa"`` on a CPU, FlashAttention-2 or cuDNN on a GPU.

    Attributes
    ----------
    name : {"sdpa", "sdpa-fa2", "sdpa-cudnn"}
    """

    name: str
    ops: frozenset[str] = frozenset({"flash_attention", "decode_attention"})

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run here: each kernel has its device."""
        if self.name in _KERNELS:
            return only_cuda(device)
        return "the kernels have names of their own on cuda" if device.type == "cuda" else None

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why it does not run a case."""
        if case.window is not None:
            return "SDPA has no sliding window"
        if case.get("page_size", 0):
            return "SDPA takes no page table"
        if case.kv_dtype and case.kv_dtype != case.dtype:
            return f"SDPA takes no {case.kv_dtype} cache"
        if case.dtype == "fp8_e4m3":
            return "SDPA takes no fp8"
        if case.dtype == "fp32" and self.name in _KERNELS:
            return "the kernel takes bf16 and fp16"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Return the call on views with heads first, which the kernels take as they are."""
        decode = case.op == "decode_attention"
        names = ("q", "k_cache", "v_cache") if decode else ("q", "k", "v")
        q, k, v = (inputs[name].transpose(1, 2) for name in names)
        options: dict[str, Any] = {
            "is_causal": case.causal and not decode,
            "enable_gqa": q.shape[1] != k.shape[1],
        }

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **options)

        kernel = _KERNELS.get(self.name)
        setting = nullcontext if kernel is None else functools.partial(sdpa_kernel, kernel)
        if case.backward:
            dout = inputs["dout"].transpose(1, 2)
            with setting():  # chooses the forward pass, which brings its own gradient
                return backward_call(attend, (q, k, v), dout, heads_first=True)
        call = functools.partial(attend, q, k, v)
        return forward_call(call, ("out",), heads_first=True, setting=setting)
