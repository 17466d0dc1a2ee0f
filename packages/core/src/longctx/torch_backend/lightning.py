"""Lightning attention in chunks: linear in the length, the state in fp32.

Inside a chunk the decayed pairs are one masked matrix product; between chunks only the state
``[H, D, Dv]`` travels (arXiv 2401.04658, algorithms 1 and 2). Every decay exponent is at most 0,
so nothing overflows however fast a head forgets. Packed lengths are read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["lightning_backward", "lightning_decode_forward", "lightning_forward"]

# 64 is the fastest of 32..512 on a CPU at head sizes 64 and 128; a GPU pays by the launch instead
CPU_CHUNK = 64
GPU_CHUNK = 256


class _Decays(NamedTuple):
    """Decay factors inside a chunk of ``m`` tokens; row ``i`` counts from 0."""

    pairs: Tensor  # [H, m, m]: decay^(i - j) for i >= j, else 0
    incoming: Tensor  # [H, m, 1]: decay^(i + 1), from the state before the chunk to row i
    outgoing: Tensor  # [H, m, 1]: decay^(m - 1 - i), from row i to the state after the chunk
    whole: Tensor  # [H, 1, 1]: decay^m


class _DecayTable:
    """The decay factors by chunk length: a call meets the full length and a few ragged ones."""

    def __init__(self, log_decay: Tensor, dtype: torch.dtype) -> None:
        self._rate = log_decay.to(dtype).view(-1, 1, 1)
        self._known: dict[int, _Decays] = {}

    def __getitem__(self, length: int) -> _Decays:
        if length not in self._known:
            self._known[length] = self._build(length)
        return self._known[length]

    def _build(self, length: int) -> _Decays:
        rows = torch.arange(length, device=self._rate.device, dtype=self._rate.dtype)
        distance = rows.unsqueeze(1) - rows
        # the select comes before the exponential: above the diagonal it would overflow
        exponent = (self._rate * distance).masked_fill(distance < 0, -torch.inf)
        rows = rows.unsqueeze(1)
        return _Decays(
            torch.exp(exponent),
            torch.exp(self._rate * (rows + 1)),
            torch.exp(self._rate * (length - 1 - rows)),
            torch.exp(self._rate * length),
        )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _sequences(length: int, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, int, int]]:
    """Yield (rows of the state, first token, end) of each run of tokens with one recurrence."""
    if cu_seqlens is None:
        yield slice(None), 0, length
        return
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        yield slice(n, n + 1), start, stop


def _chunks(start: int, stop: int, device: torch.device) -> list[slice]:
    size = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    return [slice(t, min(t + size, stop)) for t in range(start, stop, size)]


def _heads_first(dtype: torch.dtype, tokens: slice, *tensors: Tensor) -> Iterator[Tensor]:
    """Yield ``[B, H, m, D]`` views of one chunk, cast if need be."""
    for tensor in tensors:
        yield tensor[:, tokens].transpose(1, 2).to(dtype)


def _first_state(
    q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if initial_state is not None:
        return initial_state.clone(memory_format=torch.contiguous_format)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros(rows, q.shape[2], q.shape[3], v.shape[3], dtype=_wide(q))


def lightning_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return ``(out, final_state)``: one pass over the chunks."""
    wide = _wide(q)
    decays = _DecayTable(log_decay, wide)
    states = _first_state(q, v, initial_state, cu_seqlens)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for rows, start, stop in _sequences(q.shape[1], cu_seqlens):
        state = states[rows]
        for tokens in _chunks(start, stop, q.device):
            qc, kc, vc = _heads_first(wide, tokens, q, k, v)
            decay = decays[tokens.stop - tokens.start]
            result = ((qc @ kc.mT) * decay.pairs) @ vc
            result += (qc @ state) * decay.incoming
            out[:, tokens] = result.mul_(scale).transpose(1, 2)
            _advance(state, kc, vc, decay)
    return out, states


def _advance(state: Tensor, kc: Tensor, vc: Tensor, decay: _Decays) -> None:
    """Carry the state over one chunk, in place."""
    state.mul_(decay.whole).add_((kc * decay.outgoing).mT @ vc)


def lightning_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dq, dk, dv, dinitial_state)``: a scan of states, a reverse one of gradients.

    The states are recomputed, not stored: ``dq`` needs the state before its chunk, ``dk`` and
    ``dv`` the gradient of the state after it.
    """
    wide = _wide(q)
    decays = _DecayTable(log_decay, wide)
    states = _first_state(q, v, initial_state, cu_seqlens)
    dstates = torch.zeros_like(states) if dfinal_state is None else dfinal_state.to(wide).clone()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    for rows, start, stop in _sequences(q.shape[1], cu_seqlens):
        state, dstate = states[rows], dstates[rows]
        chunks = _chunks(start, stop, q.device)
        for tokens in chunks:
            kc, vc, dc = _heads_first(wide, tokens, k, v, dout)
            decay = decays[tokens.stop - tokens.start]
            gradient = ((dc @ vc.mT) * decay.pairs) @ kc
            gradient += (dc @ state.mT) * decay.incoming
            dq[:, tokens] = gradient.mul_(scale).transpose(1, 2)
            _advance(state, kc, vc, decay)
        for tokens in reversed(chunks):
            qc, kc, vc, dc = _heads_first(wide, tokens, q, k, v, dout)
            qc = qc * scale
            decay = decays[tokens.stop - tokens.start]
            gradient = ((dc @ vc.mT) * decay.pairs).mT @ qc
            gradient += (vc @ dstate.mT) * decay.outgoing
            dk[:, tokens] = gradient.transpose(1, 2)
            gradient = ((qc @ kc.mT) * decay.pairs).mT @ dc
            gradient += (kc @ dstate) * decay.outgoing
            dv[:, tokens] = gradient.transpose(1, 2)
            dstate.mul_(decay.whole).add_((qc * decay.incoming).mT @ dc)
    return dq, dk, dv, dstates


def lightning_decode_forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, *, scale: float
) -> Tensor:
    """Return ``out`` of one token and update ``state`` in place."""
    qt, kt, vt = _heads_first(state.dtype, slice(None), q, k, v)
    decay = torch.exp(log_decay.to(state.dtype)).view(-1, 1, 1)
    state.mul_(decay).addcmul_(kt.mT, vt)
    out = (qt @ state).mul_(scale)
    return out.transpose(1, 2).to(q.dtype).contiguous()
