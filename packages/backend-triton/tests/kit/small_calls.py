"""Small calls of every kernel of the backend on a GPU, for tools that watch memory and races.

    python small_calls.py                  # all of them
    python small_calls.py "flash 128"      # those of these names

Under a tool: ``compute-sanitizer --tool memcheck python small_calls.py --alone``, which leaves
out the comparison with the torch backend; under Triton's own, see ``test_concurrency.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import longctx
from longctx.plans import BlockPlan, StripePlan, TokenSetPlan, TopKPlan, WindowPlan
from longctx.support import OpRequest, reasons_against
from longctx.testing.cases import CASES, Case, cast

Call = Callable[[str], tuple[Tensor, ...]]
"""Takes the name of a backend."""

TOLERANCE = 0.02
"""Largest difference between backends in bf16, of the norm."""
TOKENS, HEADS, KV_HEADS = 300, 4, 2
DEVICE = torch.device("cuda")


def bf16(*shape: int) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)


def int32(values: object) -> Tensor:
    """Return integers on the GPU."""
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def attention_calls(head_dim: int) -> Iterator[tuple[str, Call]]:
    """Yield what runs on flash-like kernels, of tiles that sequences of 300 tokens do not fill."""
    q, dout = (bf16(1, TOKENS, HEADS, head_dim) for _ in range(2))
    k, v = (bf16(1, TOKENS, KV_HEADS, head_dim) for _ in range(2))
    lists = -(-TOKENS // 128)
    blocks = BlockPlan(
        int32([lists]).expand(1, HEADS, lists).contiguous(),
        int32(range(lists)).expand(1, HEADS, lists, lists).contiguous(),
        128,
        128,
        "query",
    )
    columns, diagonals = int32([[[0, 7, 150], [3, 140, 299]]]), int32([[[0, 1, 131], [0, 5, 200]]])
    stripes = StripePlan(columns, int32([[3, 2]]), diagonals, int32([[3, 3]]), "kv")
    kept = torch.arange(0, TOKENS, 2, device=DEVICE)
    tokens = TokenSetPlan(
        kept.int().expand(1, HEADS, len(kept)).contiguous(),
        int32([[len(kept) - 9 * i for i in range(HEADS)]]),
        "query",
    )

    def gradients(backend: str) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        longctx.flash_attention(*leaves, causal=True, backend=backend).backward(dout)
        return tuple(leaf.grad for leaf in leaves)

    def call(op: Callable[..., object], *args: object, **options: object) -> Call:
        def run(backend: str) -> tuple[Tensor, ...]:
            found = op(*args, **options, backend=backend)
            return found if isinstance(found, tuple) else (found,)

        return run

    flash, sparse = longctx.flash_attention, longctx.block_sparse_attention
    yield f"flash {head_dim}", call(flash, q, k, v, causal=True)
    yield f"full {head_dim}", call(flash, q, k, v)
    yield f"window {head_dim}", call(flash, q, k, v, causal=True, window=(100, 0))
    yield f"backward {head_dim}", gradients
    yield f"window plan {head_dim}", call(sparse, q, k, v, WindowPlan(100, 16))
    yield f"lists {head_dim}", call(sparse, q, k, v, blocks)
    yield f"stripes {head_dim}", call(sparse, q, k, v, stripes)
    yield (
        f"star {head_dim}",
        call(longctx.star_context_attention, q, k, v, block_size=128, anchor_size=128),
    )
    yield f"token sets {head_dim}", call(longctx.token_sparse_attention, q, k, v, tokens)
    cache, lengths = (bf16(1, 700, KV_HEADS, head_dim) for _ in range(2)), int32([699])
    yield (
        f"decode {head_dim}",
        call(longctx.decode_attention, bf16(1, 5, HEADS, head_dim), *cache, cache_seqlens=lengths),
    )


def latent_calls() -> Iterator[tuple[str, Call]]:
    """Yield absorbed MLA, and flash on fp8."""
    latent = bf16(1, 400, 1, 576)
    chosen = torch.stack([torch.randperm(400, device=DEVICE)[:150] for _ in range(5)]).int()
    plan = TopKPlan(chosen[None, :, None].contiguous(), "shared")
    for heads in (16, 128):
        q = bf16(1, 5, heads, 576)
        yield (
            f"latent {heads}",
            lambda backend, q=q: (
                longctx.topk_attention(q, latent, latent[..., :512], plan, backend=backend),
            ),
        )
    fp8 = [bf16(1, TOKENS, 2, 128).to(torch.float8_e4m3fn) for _ in range(3)]
    yield "fp8", lambda backend: (longctx.flash_attention(*fp8, causal=True, backend=backend),)


def ready_made() -> Iterator[tuple[str, Call]]:
    """Yield the conformance kit's cases that the backend takes in bf16."""
    loaded = longctx.registry().load_backend("triton")
    capability = torch.cuda.get_device_capability()
    for case in CASES:
        request = OpRequest(
            case.op, "cuda", capability, torch.bfloat16, 64, 64, 4, 2, case.features
        )
        if reasons_against(loaded.support().get(case.op), request) or loaded.reasons(request):
            continue
        made = cast(case, case.inputs(torch.Generator().manual_seed(7)), DEVICE, torch.bfloat16)

        def run(backend: str, case: Case = case, made: dict[str, object] = made) -> object:
            fresh = {k: v.clone() if isinstance(v, Tensor) else v for k, v in made.items()}
            return case.call(backend, **fresh)

        yield case.id, run


def all_calls() -> dict[str, Call]:
    """Return every call by name."""
    torch.manual_seed(0)
    calls = dict(latent_calls())
    for head_dim in (64, 128):
        calls.update(attention_calls(head_dim))
    return {**calls, **dict(ready_made())}


def difference(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """Return the largest relative difference of norms; infinities have to match."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if not torch.equal(a.isinf(), b.isinf()):
            return float("inf")
        a, b = (t.double().masked_fill(t.isinf(), 0) for t in (a, b))
        worst = max(worst, ((a - b).norm() / b.norm().clamp(min=1e-6)).item())
    return worst


def main() -> int:
    """Run the calls; return 1 if one was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of calls; all without any")
    parser.add_argument("--alone", action="store_true", help="compare with nothing")
    parser.add_argument("--times", type=int, default=1, help="runs of each call")
    options = parser.parse_args()
    begin, wrong = time.perf_counter(), 0
    calls = all_calls()
    for name in options.names or calls:
        for _ in range(options.times):
            found = calls[name]("triton")
            torch.cuda.synchronize()
        said = "ran"
        if not options.alone:
            error = difference(found, calls[name]("torch"))
            right = error < TOLERANCE
            wrong += not right
            said = f"{'right' if right else 'WRONG'}, relative difference {error:.1e}"
        print(f"[{time.perf_counter() - begin:6.1f} s] {name}: {said}", flush=True)
    print(f"{len(options.names or calls)} calls, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
