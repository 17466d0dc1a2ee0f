"""FlashInfer: prefill of one sequence, paged decode, merging of partial results."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Outputs
from longctx.bench.peers.peer import missing_module, only_cuda
from longctx.bench.prepared import Prepared
from longctx.bench.workloads.workload import Inputs

__all__ = ["FlashInfer"]

_MODULE = "flashinfer"

WORKSPACE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class FlashInfer:
    """FlashInfer's own kernels; planning is done beforehand, as its users do."""

    name: str = "flashinfer"
    ops: frozenset[str] = frozenset({"flash_attention", "decode_attention", "merge_attention"})

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run here."""
        return only_cuda(device) or missing_module(
            _MODULE, "FlashInfer", "pip install flashinfer-python"
        )

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why it does not run a case."""
        if case.dtype not in ("bf16", "fp16"):
            return "takes bf16 and fp16 queries"
        if case.backward:
            return "has no backward pass"
        if case.op == "flash_attention" and case["batch"] != 1:
            return "its dense prefill takes one sequence"
        if case.op == "decode_attention" and not case["page_size"]:
            return "its batched decode takes a paged cache"
        if case.kv_dtype == "fp8_e4m3":
            return "takes one scale for all heads of an fp8 cache"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Return the call."""
        if case.op == "flash_attention":
            return _prefill(case, inputs)
        return _decode(case, inputs) if case.op == "decode_attention" else _merge(inputs)


def _prefill(case: Case, inputs: Inputs) -> Prepared:
    flashinfer: Any = importlib.import_module(_MODULE)
    q, k, v = (inputs[name][0] for name in ("q", "k", "v"))
    window = -1 if case.window is None else case.window

    def run() -> Tensor:
        out: Tensor = flashinfer.single_prefill_with_kv_cache(
            q, k, v, causal=case.causal, window_left=window
        )
        return out

    return Prepared(run, lambda out: {"out": out.unsqueeze(0)})


def _decode(case: Case, inputs: Inputs) -> Prepared:
    flashinfer: Any = importlib.import_module(_MODULE)
    q, table = inputs["q"][:, 0], inputs["page_table"]
    caches = inputs["k_cache"], inputs["v_cache"]
    batch, pages = table.shape
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=case["q_heads"] // case["kv_heads"] >= 4
    )
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * pages
    last = case.k_len - (pages - 1) * case["page_size"]
    wrapper.plan(
        starts,
        table.flatten(),
        torch.full((batch,), last, dtype=torch.int32, device=q.device),
        case["q_heads"],
        case["kv_heads"],
        case["head_dim"],
        case["page_size"],
        q_data_type=q.dtype,
        kv_data_type=caches[0].dtype,
    )

    def run() -> Tensor:
        out: Tensor = wrapper.run(q, caches)
        return out

    return Prepared(run, lambda out: {"out": out.unsqueeze(1)})


def _merge(inputs: Inputs) -> Prepared:
    flashinfer: Any = importlib.import_module(_MODULE)
    # [parts, batch, seq, heads, dim] to [batch * seq, parts, heads, dim], and logarithms to base 2
    outs = inputs["outs"].movedim(0, 2).flatten(0, 1).contiguous()
    lses = inputs["lses"].movedim(0, 3).transpose(1, 2).flatten(0, 1).transpose(1, 2)
    lses = (lses / math.log(2)).contiguous()
    batch, seq = inputs["outs"].shape[1:3]

    def run() -> tuple[Tensor, Tensor]:
        merged: tuple[Tensor, Tensor] = flashinfer.merge_states(outs, lses)
        return merged

    def outputs(merged: tuple[Tensor, Tensor]) -> Outputs:
        out, lse = merged
        rows = (lse * math.log(2)).view(batch, seq, -1)
        return {"out": out.view(batch, seq, *out.shape[1:]), "lse": rows.transpose(1, 2)}

    return Prepared(run, outputs)
