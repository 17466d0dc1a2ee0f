"""flash-linear-attention: ``simple_gla`` with one decay a head is lightning attention."""

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

__all__ = ["Fla"]

_MODULE = "fla.ops.simple_gla"


@dataclass(frozen=True)
class Fla:
    """``chunk_simple_gla(g_gamma)``, and ``fused_recurrent_simple_gla`` for one token."""

    name: str = "fla"
    ops: frozenset[str] = frozenset({"lightning_attention", "lightning_decode"})

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run here."""
        return only_cuda(device) or missing_module(
            _MODULE, "fla", "pip install flash-linear-attention"
        )

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why it does not run a case: nothing of these ops."""
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Return the call, which has longctx's own layout."""
        simple_gla: Any = importlib.import_module(_MODULE)
        q, k, v, log_decay = (inputs[name] for name in ("q", "k", "v", "log_decay"))
        if case.op == "lightning_decode":
            state = inputs["state"]

            def step() -> tuple[Tensor, Tensor]:
                result: tuple[Tensor, Tensor] = simple_gla.fused_recurrent_simple_gla(
                    q,
                    k,
                    v,
                    g_gamma=log_decay,
                    scale=1.0,
                    initial_state=state,
                    output_final_state=True,
                )
                return result

            return forward_call(step, ("out", "state"))

        def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = simple_gla.chunk_simple_gla(
                *tensors, g_gamma=log_decay, scale=1.0, output_final_state=not case.backward
            )
            return result

        if case.backward:
            return backward_call(lambda *t: attend(*t)[0], (q, k, v), inputs["dout"])
        return forward_call(lambda: attend(q, k, v), ("out", "final_state"))
