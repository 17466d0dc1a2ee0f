"""Accuracy of a needle model: exact match of whole answers, by task, length and depth.

An answer is right when every byte of it, up to and including the line end, is the most likely
one after the right bytes before it. That is when greedy decoding writes it, so one forward pass
judges a batch.

    python evaluate.py --checkpoint DIR --out results.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from multiprocessing.pool import Pool
from pathlib import Path

import torch
from config import BOS
from export import load
from model import NeedleDecoder

from longctx_models.evaluation.needle import TASKS, held_out_source, make_sample

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_BLOCK = 65536
_LONGEST_FULLY_SAMPLED = 65536

Cell = dict[str, object]


def sample_pool(workers: int) -> Pool:
    """Return processes that make samples. They are forked: call this before CUDA starts."""
    held_out_source()  # Read once here instead of once in every worker.
    return multiprocessing.get_context("fork").Pool(workers)


def evaluate(
    model: NeedleDecoder,
    pool: Pool,
    lengths: Sequence[int],
    tasks: Sequence[str],
    samples: int,
    deadline: float,
    seed: str = "evaluation",
    long_samples: int = 64,
) -> Iterator[Cell]:
    """Evaluate a model cell by cell, short lengths first.

    Parameters
    ----------
    model
        Model with the weights to be judged.
    pool
        See `sample_pool`.
    lengths, tasks
        What to evaluate.
    samples
        Samples of a cell, rounded up to whole batches.
    deadline
        Value of `time.monotonic` at which to stop; cells that are not complete are left out.
    seed
        Seed of the samples.
    long_samples
        Samples of a cell beyond 65536 bytes.

    Yields
    ------
    dict
        Task, length, number of samples, accuracy, accuracy by depth, and the indices of the
        samples that failed: `make_sample` with the seed ``f"{seed}/{index}"`` makes them again.
    """
    for length in lengths:
        wanted = samples if length <= _LONGEST_FULLY_SAMPLED else min(samples, long_samples)
        batch = max(1, model.block // length)
        count = math.ceil(wanted / batch) * batch
        for task in tasks:
            jobs = [(task, length, DEPTHS[i % len(DEPTHS)], f"{seed}/{i}") for i in range(count)]
            made = pool.imap(_make, jobs, chunksize=max(1, min(8, 2**18 // length)))
            right: dict[float, list[bool]] = defaultdict(list)
            failures: list[int] = []
            for first in range(0, count, batch):
                if time.monotonic() > deadline:
                    return
                texts, answer_sizes = zip(*(next(made) for _ in range(batch)), strict=True)
                verdicts = _judge(model, b"".join(texts), answer_sizes, length)
                for i, verdict in enumerate(verdicts, first):
                    right[jobs[i][2]].append(verdict)
                    if not verdict:
                        failures.append(i)
            yield {
                "task": task,
                "length": length,
                "samples": count,
                "accuracy": 1 - len(failures) / count,
                "by_depth": {str(d): sum(found) / len(found) for d, found in right.items()},
                "failures": failures,
            }


def _make(job: tuple[str, int, float, str]) -> tuple[bytes, int]:
    sample = make_sample(*job)
    return sample.prompt + sample.answer, len(sample.answer)


@torch.no_grad()
def _judge(
    model: NeedleDecoder, texts: bytes, answer_sizes: Sequence[int], length: int
) -> list[bool]:
    device = model.embedding.device
    targets = torch.frombuffer(bytearray(texts), dtype=torch.uint8).to(device)
    targets = targets.view(-1, length).long()
    tokens = torch.roll(targets, 1, dims=1)
    tokens[:, 0] = BOS
    rows = torch.cat(
        [
            torch.arange((i + 1) * length - size, (i + 1) * length)
            for i, size in enumerate(answer_sizes)
        ]
    ).to(device)
    guesses = model.logits(model.hidden(tokens)[rows]).argmax(-1)
    wrong = torch.zeros(len(answer_sizes), device=device)
    wrong.index_add_(0, rows // length, (guesses != targets.flatten()[rows]).float())
    return (wrong == 0).tolist()


def table(cells: Sequence[Cell]) -> str:
    """Return the accuracies by task and length as a Markdown table."""
    lengths = sorted({int(str(cell["length"])) for cell in cells})
    found = {(cell["task"], cell["length"]): f"{cell['accuracy']:.3f}" for cell in cells}
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    return _markdown(
        ["task", *(f"{length // 1024}K" for length in lengths)],
        [[task, *(found.get((task, n), "-") for n in lengths)] for task in tasks],
    )


def depth_table(cells: Sequence[Cell]) -> str:
    """Return the accuracies by length and depth over all tasks as a Markdown table."""
    lengths = sorted({int(str(cell["length"])) for cell in cells})
    rows = []
    for length in lengths:
        depths = [c["by_depth"] for c in cells if c["length"] == length]
        means = [sum(d[str(depth)] for d in depths) / len(depths) for depth in DEPTHS]
        rows.append([f"{length // 1024}K", *(f"{mean:.3f}" for mean in means)])
    return _markdown(["length", *(f"{depth:.0%}" for depth in DEPTHS)], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def environment(device: torch.device) -> dict[str, str]:
    """Return what a result depends on besides seeds."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    """Evaluate an exported checkpoint."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to evaluate")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=_numbers, help="comma-separated; default: all")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument("--samples", type=int, default=200, help="samples of a cell")
    parser.add_argument("--long-samples", type=int, default=64, help="the same beyond 64K")
    parser.add_argument("--seconds", type=float, default=600, help="time limit")
    parser.add_argument("--workers", type=int, default=14, help="processes that make samples")
    parser.add_argument("--seed", default="evaluation")
    args = parser.parse_args()
    pool = sample_pool(args.workers)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    model = load(args.checkpoint, _BLOCK, dtype, compiled=cuda).to(device)
    longest = model.config.max_positions
    cells: list[Cell] = []
    for cell in evaluate(
        model,
        pool,
        args.lengths or [length for length in LENGTHS if length <= longest],
        args.tasks,
        args.samples,
        start + args.seconds,
        args.seed,
        args.long_samples,
    ):
        cells.append(cell)
        print(f"[{time.monotonic() - start:6.1f}]", json.dumps(cell), flush=True)
    result = {
        "metric": "exact match of the whole answer with its line end, greedy, one question",
        "seed": args.seed,
        "compute_dtype": str(dtype),
        "environment": environment(device),
        "cells": cells,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(cells), depth_table(cells), sep="\n\n", flush=True)
    pool.terminate()


if __name__ == "__main__":
    main()
