"""Time of `longctx.lightning_attention` from 4K to 64K tokens and the slope of its growth.

The slope is that of log time over log length: 1 is linear, 2 is quadratic. Lengths are timed in
turns, and the best round counts, so that a busy machine disturbs all of them alike. A part of the
output is compared with the fp64 recurrence; a wrong result prints no number.

    python benchmarks/lightning_linear.py --json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable

import torch

import longctx
from longctx.reference import lightning as reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED = 300


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(12, 17)])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default=None)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of text")
    return parser.parse_args()


def call_of(args: argparse.Namespace, length: int) -> Callable[[], torch.Tensor]:
    """Return a call on fresh random inputs, checked against the oracle."""
    shape = (args.batch, length, args.heads, args.dim)
    q, k, v = (
        torch.nn.functional.silu(torch.randn(shape, device=args.device))
        .to(DTYPES[args.dtype])
        .requires_grad_(args.backward)
        for _ in range(3)
    )
    log_decay = -torch.logspace(0, -4, args.heads, device=args.device)

    def call() -> torch.Tensor:
        out = longctx.lightning_attention(q, k, v, log_decay, backend=args.backend).out
        if args.backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        return out.detach()

    first = slice(CHECKED)
    exact, _ = reference.lightning_attention(
        q[:, first].double(), k[:, first].double(), v[:, first].double(), log_decay
    )
    error = (call()[:, first].double() - exact).square().mean() / exact.square().mean()
    if not error.sqrt() < 5e-3:
        sys.exit(f"wrong result at length {length}: relative rms error {error.sqrt():.2e}")
    return call


def seconds(call: Callable[[], torch.Tensor], device: str) -> float:
    """Return the time of one call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fitted_slope(lengths: list[int], times: list[float]) -> float:
    """Return the least-squares slope of log time over log length."""
    x, y = ([math.log(value) for value in values] for values in (lengths, times))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    """Measure and print."""
    args = parsed()
    torch.manual_seed(0)
    calls = [call_of(args, length) for length in args.lengths]
    rounds = [[seconds(call, args.device) for call in calls] for _ in range(args.rounds)]
    times = [min(column) for column in zip(*rounds, strict=True)]
    rows = args.batch * args.heads
    result = {
        "op": "lightning_attention",
        "backend": args.backend or "auto",
        "device": args.device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "batch": args.batch,
        "heads": args.heads,
        "head_dim": args.dim,
        "backward": args.backward,
        "lengths": args.lengths,
        "ms": [round(t * 1e3, 3) for t in times],
        "ns_per_token_head": [
            round(t * 1e9 / (n * rows), 1) for t, n in zip(times, args.lengths, strict=True)
        ],
        "slope": round(fitted_slope(args.lengths, times), 3),
    }
    if args.json:
        print(json.dumps(result))
        return
    for length, ms, ns in zip(
        args.lengths, result["ms"], result["ns_per_token_head"], strict=True
    ):
        print(f"{length:>8} tokens {ms:>10.2f} ms {ns:>8.1f} ns a token and head")
    print(f"slope of log time over log length: {result['slope']:.3f}")


if __name__ == "__main__":
    main()
