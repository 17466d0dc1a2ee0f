"""A call that is ready to be timed: everything that may be done beforehand is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.bench.checking import Outputs

__all__ = ["Prepared", "backward_call", "forward_call"]


@dataclass(frozen=True)
class Prepared:
    """A contestant's call on given inputs; calling it makes one call in its setting.

    Attributes
    ----------
    run : callable
        What is timed: nothing but the call.
    outputs : callable
        Brings what ``run`` returned into longctx's layout, outside of the timing.
    setting : callable
        Returns a context that ``run`` needs around it, such as one that chooses a kernel: a
        program enters it once, so that it is no part of what a call costs the host.
    """

    run: Callable[[], Any]
    outputs: Callable[[Any], Outputs]
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self) -> Any:
        """Return the result of one call."""
        with self.setting():
            return self.run()


def forward_call(
    run: Callable[[], Any],
    names: Sequence[str],
    *,
    heads_first: bool = False,
    setting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Prepared:
    """Return a call whose result is a tensor, or several, named in order.

    ``heads_first`` results are ``[batch, heads, seq, dim]`` and are turned; ``setting`` as in
    `Prepared`.
    """

    def outputs(result: Any) -> Outputs:
        parts = (result,) if isinstance(result, Tensor) else tuple(result)
        turned = [p.transpose(1, 2) if heads_first else p for p in parts]
        return dict(zip(names, turned, strict=False))

    return Prepared(run, outputs, setting)


def backward_call(
    forward: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    dout: Tensor,
    *,
    heads_first: bool = False,
) -> Prepared:
    """Return the backward pass of a forward pass that is run once, here.

    Parameters
    ----------
    forward : callable
        Maps ``q, k, v`` to the output.
    leaves : sequence of Tensor
        ``q, k, v`` in the contestant's layout.
    dout : Tensor
        Gradient of the output, in the same layout.
    """
    tracked = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        out = forward(*tracked)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, tracked, dout, retain_graph=True)

    return forward_call(run, ("dq", "dk", "dv"), heads_first=heads_first)
