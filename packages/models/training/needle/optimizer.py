"""Muon for the matrices of the layers, AdamW for everything else, one schedule for both."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from config import Preset
from model import NeedleDecoder
from torch import Tensor

# Newton-Schulz coefficients of Keller Jordan's Muon: they do not converge, they bring every
# singular value near 1 fast.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, on stacks of matrices [layers, out, in].

    Parameters
    ----------
    params
        Stacks of matrices.
    lr
        Learning rate; the update of a tall matrix grows by sqrt(out / in).
    momentum
        Nesterov momentum.
    weight_decay
        Decoupled decay.
    steps
        Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        steps: int = 5,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        )

    @torch.no_grad()
    def step(self) -> None:
        """Update every stack."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                scale = max(1.0, p.size(1) / p.size(2)) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalised(update, group["steps"]), alpha=-group["lr"] * scale)


def orthogonalised(stack: Tensor, steps: int) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1."""
    a, b, c = _COEFFICIENTS
    u = stack.to(torch.bfloat16) if stack.is_cuda else stack
    tall = u.size(1) > u.size(2)
    if tall:
        u = u.mT
    u = u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = u @ u.mT
        u = torch.baddbmm(u, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), u, beta=a)
    return (u.mT if tall else u).to(stack.dtype)


class Optimizers:
    """Both optimizers of a model and their schedule.

    Embedding, head and norms are not decayed: the QK-norm weights must grow for attention to be
    sharp over long contexts.
    """

    def __init__(self, model: NeedleDecoder, preset: Preset) -> None:
        self.preset = preset
        self.others = [model.embedding, model.head, model.final_norm, *model.norms.values()]
        self.muon = Muon(model.matrices.values(), preset.matrix_rate)
        self.adam = torch.optim.AdamW(
            self.others,
            preset.other_rate,
            betas=(0.9, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            fused=model.embedding.is_cuda,
        )

    def step(self, step: int, fraction: float) -> None:
        """Update the weights with the learning rates of a point of the schedule."""
        factor = self.factor(step, fraction)
        self.muon.param_groups[0]["lr"] = self.preset.matrix_rate * factor
        self.adam.param_groups[0]["lr"] = self.preset.other_rate * factor
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.adam.step()
        self.muon.step()
        self.adam.zero_grad(set_to_none=True)
        self.muon.zero_grad(set_to_none=True)

    def factor(self, step: int, fraction: float) -> float:
        """Return the schedule: linear warm-up by steps, constant, linear to 0 by time."""
        warm = min(1.0, (step + 1) / self.preset.warmup_steps)
        remaining = (1 - fraction) / (1 - self.preset.decay_from)
        return warm * max(0.0, min(1.0, remaining))

    def state(self) -> dict[str, dict]:
        """Return the state of both optimizers."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load(self, state: dict[str, dict]) -> None:
        """Restore what `state` returned."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
