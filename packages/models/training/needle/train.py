"""Train a needle model within a time limit, export it and evaluate it.

    python train.py --preset needle --seconds 600 --out DIR

A second call with the same `--state` goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from config import PRESETS, Preset
from data import Batch, Loader
from evaluate import LENGTHS, environment, evaluate, sample_pool, table
from export import export, load, load_state, save_state
from mixture import INGREDIENTS
from model import NeedleDecoder
from optimizer import Optimizers
from torch import Tensor

from longctx_models.evaluation.needle import TASKS

_ADVANCE_SECONDS = 2.0
_REPORT_SECONDS = 10.0


class Run:
    """A training run and its log.

    Parameters
    ----------
    preset
        What is trained and how.
    model, optimizers, loader
        Its parts.
    device
        Where the model is.
    """

    def __init__(
        self,
        preset: Preset,
        model: NeedleDecoder,
        optimizers: Optimizers,
        loader: Loader,
        device: torch.device,
    ) -> None:
        self.preset, self.model, self.optimizers = preset, model, optimizers
        self.loader, self.device = loader, device
        self.step = self.tokens = 0
        self.elapsed = 0.0
        self.records: list[dict[str, object]] = []
        self.stages: list[dict[str, object]] = []

    def progress(self) -> dict[str, object]:
        """Return what resuming needs besides tensors."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "elapsed": self.elapsed,
            "stage": self.loader.stages.index,
            "records": self.records,
            "stages": self.stages,
        }

    def resume(self, progress: dict) -> None:
        """Go on from what `progress` returned."""
        self.step, self.tokens = progress["step"], progress["tokens"]
        self.elapsed = progress["elapsed"]
        self.records, self.stages = progress["records"], progress["stages"]

    def warm_up(self) -> None:
        """Compile, and run every length once, before the clock starts."""
        for length in self.preset.curriculum.lengths:
            tokens = torch.randint(256, (max(1, self.preset.block // length), length))
            tokens = tokens.to(self.device)
            flat = tokens.flatten()
            weights = torch.ones_like(flat, dtype=torch.float32)
            answers, starts = flat > 127, flat > 191
            self._backward(
                Batch(tokens, flat, weights, answers, starts, flat % len(INGREDIENTS)), 1
            )
            self.model.zero_grad(set_to_none=True)

    def train(self, deadline: float, schedule_seconds: float) -> None:
        """Train until the schedule or the time ends.

        Parameters
        ----------
        deadline
            Value of `time.monotonic` at which to stop.
        schedule_seconds
            Time that the whole schedule takes, over all calls.
        """
        start = time.monotonic() - self.elapsed
        recent = self._zeros()
        reported = self._zeros()
        advanced_at = reported_at = time.monotonic()
        losses: list[Tensor] = []
        tokens_before, self.loader.waited = self.tokens, 0.0
        while True:
            now = time.monotonic()
            self.elapsed = now - start
            fraction = self.elapsed / schedule_seconds
            if fraction >= 1 or now >= deadline:
                return
            batches = [self.loader.next(self.device)]
            if batches[0].length >= self.preset.accumulate_from:
                batches.append(self.loader.next(self.device))
            for batch in batches:
                loss, statistics = self._backward(batch, len(batches))
                losses.append(loss)
                reported += statistics
                if batch.length == self.loader.stages.length:
                    recent += statistics
                self.tokens += batch.tokens.numel()
            self.optimizers.step(self.step, fraction)
            self.step += 1
            if now - advanced_at > _ADVANCE_SECONDS:
                advanced_at = now
                length = self.loader.stages.length
                if self.loader.stages.advance(recent, fraction):
                    self.stages.append(
                        {
                            "length": length,
                            "seconds": round(self.elapsed, 1),
                            "step": self.step,
                        }
                    )
                    print("learned", self.stages[-1], flush=True)
                recent.zero_()
            if now - reported_at > _REPORT_SECONDS:
                mean_loss = torch.stack(losses).mean().item()
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(f"the loss is {mean_loss} at step {self.step}")
                seconds = now - reported_at
                rate = (self.tokens - tokens_before) / seconds
                self._report(mean_loss, reported, rate, self.loader.waited / seconds)
                losses, tokens_before, reported_at = [], self.tokens, now
                self.loader.waited = 0.0
                reported.zero_()

    def _zeros(self) -> Tensor:
        return torch.zeros(len(INGREDIENTS), 5, device=self.device)

    def _backward(self, batch: Batch, batches: int) -> tuple[Tensor, Tensor]:
        loss, statistics = self.model.loss(
            batch.tokens,
            batch.targets,
            batch.weights,
            batch.answers,
            batch.starts,
            batch.tasks,
            len(INGREDIENTS),
        )
        (loss / batches).backward()
        return loss.detach(), statistics

    def _report(self, loss: float, statistics: Tensor, rate: float, waited: float) -> None:
        q_norm, k_norm = self.model.norms["q_norm"], self.model.norms["k_norm"]
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.elapsed, 1),
            "length": self.loader.stages.length,
            "loss": round(loss, 4),
            "tokens_per_second": round(rate),
            "waiting_for_data": round(waited, 3),
            "largest_qk_weight": round((q_norm * k_norm).abs().max().item(), 2),
            # Byte accuracy and first-byte accuracy of the answers.
            "accuracy": {
                part.name: [round(row[1] / max(1, row[0]), 4), round(row[3] / max(1, row[2]), 4)]
                for part, row in zip(INGREDIENTS, statistics.tolist(), strict=True)
            },
        }
        self.records.append(record)
        print(json.dumps(record), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="needle")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--state", type=Path, help="folder for what a later call resumes from")
    parser.add_argument(
        "--start-from", type=Path, help="checkpoint whose weights a new run starts from"
    )
    parser.add_argument("--log", type=Path, help="JSON log of the run; default: in --out")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of this call")
    parser.add_argument(
        "--evaluation-seconds", type=float, default=60, help="part of it kept for evaluation"
    )
    parser.add_argument(
        "--schedule-seconds",
        type=float,
        help="training time over all calls; default: what this call has",
    )
    parser.add_argument("--longest", type=int, help="leave out longer sequences")
    parser.add_argument("--samples", type=int, default=64, help="evaluation samples of a cell")
    parser.add_argument("--workers", type=int, default=13, help="processes that make batches")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, export, evaluate."""
    begin = time.monotonic()
    args = _arguments()
    preset = PRESETS[args.preset]
    if args.longest:
        preset = replace(preset, curriculum=preset.curriculum.until(args.longest))
    state = args.state or args.out / "state"
    done = state / "progress.json"
    # A trained model has been through the curriculum: all its lengths are there from the start.
    stage = len(preset.curriculum.lengths) - 1 if args.start_from else 0
    earlier = json.loads(done.read_text()) if done.exists() else {"stage": stage, "step": 0}
    # Each call seeds its workers anew: a resumed run must not see its first batches again.
    loader = Loader(preset, earlier["stage"], args.workers, f"{args.seed}/{earlier['step']}")
    pool = sample_pool(min(args.workers, 14))
    try:
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        device = torch.device(args.device)
        cuda = device.type == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        if args.start_from:
            model = load(args.start_from, preset.block, dtype, compiled=cuda).to(device)
            if model.config != preset.model:
                raise SystemExit(f"{args.start_from} has another shape than {args.preset}")
        else:
            model = NeedleDecoder(preset.model, preset.block, dtype, compiled=cuda).to(device)
        optimizers = Optimizers(model, preset)
        run = Run(preset, model, optimizers, loader, device)
        if progress := load_state(state, model, optimizers):
            run.resume(progress)
        run.warm_up()
        print(f"training starts after {time.monotonic() - begin:.1f} s", flush=True)
        deadline = begin + args.seconds - args.evaluation_seconds
        run.train(deadline, args.schedule_seconds or run.elapsed + deadline - time.monotonic())
        loader.close()
        save_state(state, model, optimizers, run.progress())
        export(model, args.out)
        # The exported weights are judged, not the fp32 ones.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        lengths = [n for n in LENGTHS if n <= preset.curriculum.lengths[-1]]
        end = begin + args.seconds
        cells = list(evaluate(model, pool, lengths, list(TASKS), args.samples, end))
        log = {
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "preset": asdict(preset),
            "parameters": sum(p.numel() for p in model.parameters()),
            "environment": environment(device),
            **run.progress(),
            "evaluation": cells,
        }
        (args.log or args.out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
        print(table(cells), flush=True)
        print(f"{run.step} steps, {run.tokens / 1e6:.0f} M tokens, {run.elapsed:.0f} s")
    finally:
        loader.close()
        pool.terminate()


if __name__ == "__main__":
    main()
