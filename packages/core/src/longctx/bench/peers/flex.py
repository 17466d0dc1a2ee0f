"""PyTorch's FlexAttention, compiled, under block masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.peers.peer import only_cuda
from longctx.bench.prepared import Prepared, backward_call, forward_call
from longctx.bench.workloads.workload import Inputs
from longctx.plans import BlockPlan

__all__ = ["FlexAttention"]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FlexAttention:
    """``torch.compile(flex_attention)``."""

    name: str = "flex"
    ops: frozenset[str] = frozenset(
        {"flash_attention", "block_sparse_attention", "star_context_attention"}
    )

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run here."""
        return only_cuda(device)

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why it does not run a case."""
        if case.plan == "stripe":
            return "a block mask of single diagonals keeps nearly every block"
        return "takes no fp8" if case.dtype == "fp8_e4m3" else None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Return the call on contiguous tensors with heads first."""
        q, k, v = (inputs[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))
        mask = _block_mask(case, inputs)
        options: dict[str, Any] = {"block_mask": mask, "enable_gqa": q.shape[1] != k.shape[1]}
        attend = functools.partial(_compiled(), **options)
        if case.backward:
            dout = inputs["dout"].transpose(1, 2).contiguous()
            return backward_call(attend, (q, k, v), dout, heads_first=True)
        return forward_call(lambda: attend(q, k, v), ("out",), heads_first=True)


def _compiled() -> Callable[..., Any]:
    """Compile for one shape: kept graphs of other shapes would end at Dynamo's recompile limit."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _causal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _block_mask(case: Case, inputs: Inputs) -> Any:
    """Return the block mask of a case; None where everything is seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    if case.plan == "block":
        return _plan_mask(inputs["plan"], case)
    mod: MaskMod
    if case.op == "star_context_attention":
        block, anchor = case["block_size"], case["anchor_size"]

        def mod(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & ((i // block == j // block) | (j < anchor))

    elif case.window is not None:
        window, sinks = case.window, case.get("sink_tokens", 0)

        def mod(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & ((i - j <= window) | (j < sinks))

    elif case.causal:
        mod = _causal
    else:
        return None
    # compiled, the square of a long sequence is never held
    return create_block_mask(
        mod, None, None, case.q_len, case.k_len, inputs["q"].device, _compile=True
    )


def _plan_mask(plan: BlockPlan, case: Case) -> Any:
    """Return a block plan as a block mask: earlier blocks whole, each row's own one causal."""
    from torch.nn.attention.flex_attention import BlockMask

    group = case["q_heads"] // plan.counts.shape[1]
    counts = plan.counts.repeat_interleave(group, 1)
    indices = plan.indices.repeat_interleave(group, 1)
    blocks = torch.arange(counts.shape[2], dtype=torch.int32, device=counts.device)
    own = blocks.expand(counts.shape)
    columns = torch.zeros(*counts.shape, len(blocks), dtype=torch.int32, device=counts.device)
    full = columns.clone()
    # a row's own block comes last in its ascending list, so the entries before it are whole
    full[..., : indices.shape[-1]] = indices.clamp(min=0)
    columns[..., 0] = own
    return BlockMask.from_kv_blocks(
        torch.ones_like(counts),
        columns,
        counts - 1,
        full,
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        mask_mod=_causal,
        seq_lengths=(case.q_len, case.k_len),
    )
