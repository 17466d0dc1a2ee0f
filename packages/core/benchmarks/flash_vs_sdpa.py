"""Time `longctx.flash_attention` on the torch backend against ``F.scaled_dot_product_attention``.

Both run the same dense work, in turns on the same random data, so that a busy machine slows both;
the median ratio of a round is what counts. Results are compared first: a wrong one stops the run.

    python packages/core/benchmarks/flash_vs_sdpa.py --lengths 1024 4096 --json ratios.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import longctx

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def seconds(run: Callable[[], object], device: str) -> float:
    """Return the wall time of one call, the device drained before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(
    ours: Callable[[], torch.Tensor],
    theirs: Callable[[], torch.Tensor],
    device: str,
    budget: float,
) -> tuple[float, float, float]:
    """Return both medians in seconds and the median of the rounds' ratios."""
    ours(), theirs()
    pairs: list[tuple[float, float]] = []
    spent = 0.0
    while len(pairs) < 7 or (spent < budget and len(pairs) < 200):
        first, second = (ours, theirs) if len(pairs) % 2 else (theirs, ours)
        pair = seconds(first, device), seconds(second, device)
        pairs.append(pair if first is ours else pair[::-1])
        spent += sum(pair)
    mine, sdpa = (statistics.median(times) for times in zip(*pairs, strict=True))
    return mine, sdpa, statistics.median(a / b for a, b in pairs)


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every shape and yield one record each."""
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for q_heads, kv_heads in ((args.heads, args.heads), (args.heads, max(1, args.heads // 4))):
            for length in args.lengths:
                shape = (args.batch, length)
                q, k, v = (
                    torch.randn(*shape, heads, args.head_dim, device=args.device).to(dtype)
                    for heads in (q_heads, kv_heads, kv_heads)
                )
                for causal in (False, True):

                    def ours(q=q, k=k, v=v, causal=causal) -> torch.Tensor:
                        return longctx.flash_attention(q, k, v, causal=causal, backend="torch")

                    def theirs(q=q, k=k, v=v, causal=causal) -> torch.Tensor:
                        out = F.scaled_dot_product_attention(
                            *(t.transpose(1, 2) for t in (q, k, v)),
                            is_causal=causal,
                            enable_gqa=q.shape[2] != k.shape[2],
                        )
                        return out.transpose(1, 2)

                    error = (ours().float() - theirs().float()).abs().max().item()
                    if error > TOLERANCE[dtype]:
                        raise SystemExit(
                            f"wrong result: {error:.1e} off for {tuple(q.shape)} {name}"
                        )
                    mine, sdpa, ratio = compare(ours, theirs, args.device, args.seconds)
                    yield {
                        "dtype": name,
                        "q_heads": q_heads,
                        "kv_heads": kv_heads,
                        "head_dim": args.head_dim,
                        "batch": args.batch,
                        "length": length,
                        "causal": causal,
                        "longctx_ms": round(mine * 1e3, 3),
                        "sdpa_ms": round(sdpa * 1e3, 3),
                        "ratio": round(ratio, 3),
                        "torch": torch.__version__,
                        "device": args.device,
                        "threads": torch.get_num_threads(),
                    }


def main() -> None:
    """Print the table of ratios; append JSON lines where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4, help="query heads; GQA takes a quarter")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each shape")
    parser.add_argument("--json", type=Path, help="append one JSON line a shape to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    print("dtype       heads  length mask      longctx        SDPA  ratio")
    with torch.no_grad():
        for row in rows(args):
            heads = f"{row['q_heads']}/{row['kv_heads']}"
            mask = "causal" if row["causal"] else "full"
            print(
                f"{row['dtype']:<9} {heads:>7} {row['length']:>7} {mask:<6} "
                f"{row['longctx_ms']:>7} ms {row['sdpa_ms']:>7} ms {row['ratio']:>6.2f}",
                flush=True,
            )
            if args.json:
                with args.json.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
