"""Peak extra memory and time of `longctx.index_topk` at long lengths, against its budget.

Extra memory is what the call adds at its peak besides its inputs and its result: allocator peaks
on a GPU, resident pages of the process on a CPU (so all counts, whoever allocates it). A few rows
are compared with the fp64 oracle; a wrong row prints no number.

    python benchmarks/index_topk_memory.py --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import longctx
from longctx.reference import dsa as reference
from longctx.settings import budget_bytes

MIB = 2**20


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--q-len", type=int, default=65536)
    parser.add_argument("--k-len", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("-k", type=int, default=2048)
    parser.add_argument("--dtype", choices=("fp8", "bf16", "fp32"), default="fp8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default=None)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    return parser.parse_args()


def inputs(
    args: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return fresh random q, k, k_scale and weights (of both signs)."""
    q = torch.randn(1, args.q_len, args.heads, args.dim, device=args.device)
    k = torch.randn(1, args.k_len, args.dim, device=args.device)
    weights = torch.randn(1, args.q_len, args.heads, device=args.device)
    if args.dtype == "fp8":
        q8, q_scale = longctx.quantize_fp8(q, scale_format="ue8m0")
        k8, k_scale = longctx.quantize_fp8(k, scale_format="ue8m0")
        return q8, k8, k_scale, weights * q_scale
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    return q.to(dtype), k.to(dtype), None, weights


def reset_peak(device: str) -> int:
    """Start a new measurement of the peak and return what is held now, in bytes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: str) -> int:
    """Return the peak since `reset_peak`, in bytes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: run on Linux")


def wrong_rows(
    plan: longctx.TopKPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor | None,
    weights: torch.Tensor,
) -> list[int]:
    """Return those of eight rows whose chosen scores are not the best ones of the fp64 oracle."""
    q_len, k_len, top_k = q.shape[1], k.shape[1], plan.indices.shape[3]
    wrong = []
    for row in torch.linspace(0, q_len - 1, 8).long().tolist():
        seen = max(0, row + 1 + k_len - q_len)
        scores = reference.index_scores(
            q[:, row : row + 1],
            k[:, :seen],
            weights[:, row : row + 1].double(),
            k_scale=None if k_scale is None else k_scale[:, :seen],
            causal=False,
        )[0, 0]
        chosen = plan.indices[0, row, 0]
        chosen = chosen[chosen >= 0].long()
        best = scores.topk(min(top_k, seen)).values
        same = len(chosen) == len(best) == len(chosen.unique())
        if not same or not torch.allclose(scores[chosen].sort(descending=True).values, best):
            wrong.append(row)
    return wrong


def main() -> int:
    """Measure, check and print."""
    args = parsed()
    q, k, k_scale, weights = inputs(args)
    # libraries and threads get ready outside the measurement
    longctx.index_topk(q[:, :64], k[:, :64], None if k_scale is None else k_scale[:, :64],
                       weights[:, :64], 8, backend=args.backend)  # fmt: skip
    before = reset_peak(args.device)
    start = time.perf_counter()
    plan = longctx.index_topk(q, k, k_scale, weights, args.k, backend=args.backend)
    highest = peak(args.device)
    seconds = time.perf_counter() - start
    wrong = wrong_rows(plan, q, k, k_scale, weights)
    if wrong:
        print(f"index_topk chose wrong keys for rows {wrong}: no figures", file=sys.stderr)
        return 1
    result = plan.indices.numel() * plan.indices.element_size()
    figures = {
        "op": "index_topk",
        "q_len": args.q_len,
        "k_len": args.k_len,
        "heads": args.heads,
        "dim": args.dim,
        "k": args.k,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": round(seconds, 2),
        "extra_peak_mib": round((highest - before - result) / MIB, 1),
        "result_mib": round(result / MIB, 1),
        "budget_mib": budget_bytes("LONGCTX_INDEX_BUDGET_MIB") / MIB,
    }
    if args.json:
        print(json.dumps(figures))
    else:
        print(
            "index_topk {q_len} x {k_len}, {heads} heads of {dim}, k {k}, {dtype}: {seconds} s, "
            "extra peak {extra_peak_mib} MiB of {budget_mib:g} MiB".format(**figures)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
