"""The indexer as a few PyTorch calls: matrix product, relu, weighted sum, ``torch.topk``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.bench.case import Case
from longctx.bench.checking import Outputs
from longctx.bench.prepared import Prepared
from longctx.bench.workloads.workload import Inputs

__all__ = ["Compositions"]

CHUNK_BYTES = 2**30
"""Scores of single heads that are held at a time."""


@dataclass(frozen=True)
class Compositions:
    """What one would write without a kernel, chunked over the queries so that it fits."""

    name: str = "torch-matmul"
    ops: frozenset[str] = frozenset({"index_scores", "index_topk"})

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot run here: nothing."""
        return None

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Return why it does not run a case: nothing of these ops."""
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Return the call; fp8 values, which matrix products do not all take, are widened."""
        q, k, weights, k_scale = (inputs[n] for n in ("q", "k", "weights", "k_scale"))
        wide = torch.bfloat16 if q.is_cuda else torch.float32
        q, k = (t.to(wide) if t.dtype.itemsize == 1 else t for t in (q, k))
        rows = max(1, CHUNK_BYTES // (4 * case["batch"] * case["index_heads"] * case.k_len))
        rows = min(rows, case.q_len)
        chunks = [slice(start, start + rows) for start in range(0, case.q_len, rows)]
        columns = torch.arange(case.k_len, device=q.device)
        first = case.k_len - case.q_len

        def scores_of(part: slice) -> Tensor:
            dots = _products(q[:, part], k)
            scores = torch.einsum("bihj,bih->bij", dots.relu_(), weights[:, part])
            if k_scale is not None:
                scores *= k_scale.unsqueeze(1)
            position = torch.arange(first, case.k_len, device=q.device)[part].unsqueeze(1)
            return scores.masked_fill_(columns > position, -torch.inf)

        if case.op == "index_scores":
            return Prepared(
                lambda: torch.cat([scores_of(part) for part in chunks], 1),
                lambda scores: {"scores": scores},
            )

        def select() -> tuple[Tensor, Tensor]:
            best = [scores_of(part).topk(min(case["top_k"], case.k_len)) for part in chunks]
            return torch.cat([b.values for b in best], 1), torch.cat([b.indices for b in best], 1)

        def outputs(best: tuple[Tensor, Tensor]) -> Outputs:
            values, indices = best
            return {"indices": indices.masked_fill(values == -torch.inf, -1)}

        return Prepared(select, outputs)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Return ``q [B, Sq, H, D] . k [B, Sk, D]`` in fp32, ``[B, Sq, H, Sk]``."""
    flat = q.flatten(1, 2)
    if q.is_cuda and q.dtype != torch.float32:
        products = torch.bmm(flat, k.transpose(1, 2), out_dtype=torch.float32)
    else:
        products = flat.float() @ k.float().transpose(1, 2)
    return products.view(*q.shape[:3], k.shape[1])
