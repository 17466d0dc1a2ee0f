"""Batches made on the fly by worker processes, and the curriculum that they follow."""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import re
import time
from dataclasses import dataclass
from multiprocessing.context import ForkContext

import torch
from config import BOS, Curriculum, Preset
from mixture import GATES, INGREDIENTS, Mixture
from torch import Tensor

from longctx_models.evaluation.needle import training_source
from longctx_models.evaluation.needle.scenes import Layout

_CONTEXT, _PROSE, _ANSWER, _VALUE_START = range(4)
# Where the values of an answer begin: after the space, quote or sign that any value follows.
_VALUE = re.compile(rb"(?:^[ \"]*|= )([^ \"=])")
_QUEUE_SIZE = 48
_QUEUE_SECONDS = 120


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device.

    Attributes
    ----------
    tokens : [batch, length]
        Inputs: the beginning-of-sequence byte, then the text without its last byte.
    targets, weights, answers, starts, tasks : [batch * length]
        See `NeedleDecoder.loss`.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    answers: Tensor
    starts: Tensor
    tasks: Tensor

    @property
    def length(self) -> int:
        """Return the length of each sequence."""
        return self.tokens.shape[1]


def text_and_roles(layout: Layout) -> tuple[bytes, bytes]:
    """Return a sequence and the role of each of its bytes in the loss."""
    text, roles = bytearray(), bytearray()
    for span, is_prose in layout.spans:
        text += span
        roles += bytes((_PROSE if is_prose else _CONTEXT,)) * len(span)
    for question, answer in layout.questions:
        text += question + answer
        marks = bytearray((_ANSWER,)) * len(answer)
        for match in _VALUE.finditer(answer):
            marks[match.start(1)] = _VALUE_START
        roles += bytes(len(question)) + marks
    return bytes(text), bytes(roles)


def to_batch(
    length: int, text: bytes, roles: bytes, tasks: bytes, task_weights: Tensor, prose_weight: float
) -> Batch:
    """Move sequences to the device of the tasks' weights, without waiting for it.

    The losses of answers and of prose are averaged apart, so that a long context does not dilute
    its few answers.
    """
    raw = torch.frombuffer(bytearray(text + roles + tasks), dtype=torch.uint8)
    if task_weights.is_cuda:
        # Only from pinned memory is a copy asynchronous.
        raw = raw.pin_memory().to(task_weights.device, non_blocking=True)
    flat, kinds, indices = raw.split((len(text), len(roles), len(tasks)))
    targets = flat.view(-1, length).long()
    tokens = torch.roll(targets, 1, dims=1)
    tokens[:, 0] = BOS
    indices = indices.long().repeat_interleave(length, output_size=len(text))
    answers, prose = kinds >= _ANSWER, kinds == _PROSE
    answer_weights = task_weights[indices] * answers
    weights = answer_weights / answer_weights.sum().clamp(min=1)
    weights = weights + prose_weight * prose / prose.sum().clamp(min=1)
    return Batch(
        tokens,
        targets.flatten(),
        weights,
        answers,
        kinds == _VALUE_START,
        indices,
    )


class Stages:
    """Where a run is in its curriculum; shared with the workers.

    Parameters
    ----------
    curriculum
        Lengths and rules.
    context
        Multiprocessing context of the workers.
    stage
        Index of the first length.
    """

    def __init__(self, curriculum: Curriculum, context: ForkContext, stage: int = 0) -> None:
        self.curriculum = curriculum
        self._stage = context.Value("i", stage)
        self._entered: float | None = None

    @property
    def index(self) -> int:
        """Return the index of the current length."""
        return self._stage.value

    @property
    def length(self) -> int:
        """Return the current length."""
        return self.curriculum.lengths[self.index]

    def draw(self, rng: random.Random) -> int:
        """Draw the length of a batch."""
        lengths = self.curriculum.lengths[: self.index + 1]
        if lengths[-1] >= self.curriculum.mixed_from:
            return rng.choices(lengths, self.curriculum.weights[: len(lengths)])[0]
        if len(lengths) == 1 or rng.random() < self.curriculum.current_share:
            return lengths[-1]
        return rng.choice(lengths[:-1])

    def advance(self, statistics: Tensor, fraction: float) -> bool:
        """Start the next length if the current one is learned; tell whether that happened.

        Parameters
        ----------
        statistics : [tasks, 5]
            What `NeedleDecoder.loss` counted at the current length of late.
        fraction
            Elapsed part of the schedule.
        """
        c, following = self.curriculum, self.index + 1
        if self._entered is None:
            self._entered = fraction
        if following == len(c.lengths) or fraction < c.earliest[following]:
            return False
        answers, right, starts, right_starts, _ = statistics.sum(0).tolist()
        gates = [
            row for row, part in zip(statistics, INGREDIENTS, strict=True) if part.name in GATES
        ]
        seen = answers > 300 and all(gate[2] > 0 for gate in gates)
        learned = (
            seen
            and min(right / answers, *(float(gate[3] / gate[2]) for gate in gates)) > c.threshold
        )
        # A stage that lingers may only end by time once retrieval exists at all.
        late = fraction - self._entered > c.stage_share and right_starts > 0.4 * max(1, starts)
        if learned or late:
            self._stage.value += 1
            self._entered = fraction
        return learned or late


class Loader:
    """Worker processes and the queue through which their batches come.

    Parameters
    ----------
    preset
        Curriculum and batch size.
    stage
        Index of the first length.
    workers
        Number of processes. They are forked: make the loader before CUDA starts.
    seed
        Worker i draws from the generator seeded with this and i.
    """

    def __init__(self, preset: Preset, stage: int, workers: int, seed: str) -> None:
        context = multiprocessing.get_context("fork")
        self.stages = Stages(preset.curriculum, context, stage)
        self.waited = 0.0
        self._prose_weight = preset.prose_weight
        self._task_weights = torch.tensor([part.weight for part in INGREDIENTS])
        self._queue = context.Queue(maxsize=_QUEUE_SIZE)
        training_source()  # Read once here instead of once in every worker.
        self._processes = [
            context.Process(
                target=_work, args=(f"{seed}/{i}", preset, self.stages, self._queue), daemon=True
            )
            for i in range(workers)
        ]
        for process in self._processes:
            process.start()

    def next(self, device: torch.device) -> Batch:
        """Return the next micro-batch; `waited` sums the seconds that it was not ready."""
        self._task_weights = self._task_weights.to(device)
        start = time.monotonic()
        try:
            sequences = self._queue.get(timeout=_QUEUE_SECONDS)
        except queue.Empty:
            raise RuntimeError(f"no batch came within {_QUEUE_SECONDS} s") from None
        self.waited += time.monotonic() - start
        return to_batch(*sequences, self._task_weights, self._prose_weight)

    def close(self) -> None:
        """End the workers; one that lives on would keep the caller's output open."""
        for process in self._processes:
            process.kill()
            process.join()


def _work(seed: str, preset: Preset, stages: Stages, batches: multiprocessing.Queue) -> None:
    os.nice(5)
    rng = random.Random(seed)
    mixture = Mixture(training_source())
    while True:
        length = stages.draw(rng)
        texts, roles, tasks = [], [], []
        for _ in range(max(1, preset.block // length)):
            task, layout = mixture.draw(rng, length)
            text, role = text_and_roles(layout)
            texts.append(text)
            roles.append(role)
            tasks.append(task)
        batches.put((length, b"".join(texts), b"".join(roles), bytes(tasks)))
