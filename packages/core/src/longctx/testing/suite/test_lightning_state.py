"""The state of lightning attention: carried in, in chunks, over 131,072 tokens, packed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import lightning as oracle
from longctx.testing.low_precision import CHUNKS, chunked_lightning
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_lightning import (
    MIXED,
    capture,
    check_lightning,
    decays,
    each,
    equal_heads,
    lightning_references,
    minimax_decay,
    run_and_check,
)

__all__ = ["TestLightningPacked", "TestLightningState"]

PACKED = (1, 0, 65, 0, 1, 130, 64, 0)
"""Lengths of packed sequences, empty ones and single tokens among them."""


def carried(subject: Subject, sequences: int, **sizes: int) -> Tensor:
    """Return a random state ``[sequences, 4, 64, 64]``, in fp32 as every state."""
    shape = {"heads": 4, "head_dim": 64, "value_dim": 64} | sizes
    return subject.randn(sequences, *shape.values(), dtype=torch.float32)


def state_by_definition(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Return the state after all tokens in fp64: ``sum_t decay^(T - 1 - t) k_t^T v_t``."""
    age = torch.arange(k.shape[1] - 1, -1, -1, device=k.device).double()
    heads = [
        (k[:, :, h].double() * (rate * age).exp().unsqueeze(-1)).mT @ v[:, :, h].double()
        for h, rate in enumerate(log_decay.double())
    ]
    return torch.stack(heads, 1)


@pytest.mark.longctx_op("lightning_attention")
class TestLightningState:
    """The state that is carried in and handed on."""

    @pytest.mark.parametrize("length", LENGTHS[:-1])
    def test_initial_state(self, subject: Subject, length: int) -> None:
        subject.require("initial-state", q_heads=4, kv_heads=4)
        subject.require_length(length)
        first = carried(subject, 2)
        before = first.clone()
        made = equal_heads(subject, 2, length)
        _, state = run_and_check(subject, made, decays(subject), scale=0.3, initial_state=first)
        assert torch.equal(first, before)
        assert state.data_ptr() != first.data_ptr()

    def test_values_of_another_size(self, subject: Subject) -> None:
        subject.require("initial-state", q_heads=4, kv_heads=4, head_dim=64, value_dim=128)
        subject.require_length(129)
        made = equal_heads(subject, 2, 129, value_dim=128)
        first = carried(subject, 2, value_dim=128)
        run_and_check(subject, made, decays(subject), initial_state=first)

    def test_state_in_slots_of_a_larger_cache(self, subject: Subject) -> None:
        subject.require("initial-state", q_heads=4, kv_heads=4)
        subject.require_length(65)
        slots = carried(subject, 6)
        slots[::2] = torch.nan
        made = equal_heads(subject, 3, 65)
        run_and_check(subject, made, decays(subject), initial_state=slots[1::2])

    def test_no_tokens_hand_the_state_on(self, subject: Subject) -> None:
        subject.require("initial-state", q_heads=4, kv_heads=4)
        first = carried(subject, 2)
        made = equal_heads(subject, 2, 0)
        _, state = subject.run(
            longctx.lightning_attention, *made, decays(subject), initial_state=first
        )
        assert torch.equal(state, first)
        assert state.data_ptr() != first.data_ptr()

    @pytest.mark.parametrize("layer", [0, 39, 78])
    @pytest.mark.parametrize(
        "cuts", [(1,), (64,), (63, 65), (5, 5, 128, 200), (129, 256)], ids=str
    )
    def test_prefill_in_chunks_is_one_prefill(
        self, subject: Subject, cuts: tuple[int, ...], layer: int
    ) -> None:
        subject.require("initial-state", q_heads=4, kv_heads=4)
        subject.require_length(257)
        log_decay = minimax_decay(layer)[::21].to(subject.device)
        q, k, v = equal_heads(subject, 1, 257)
        outs, state = [], None
        for a, b in pairwise((0, *cuts, 257)):
            out, state = subject.run(
                longctx.lightning_attention, q[:, a:b], k[:, a:b], v[:, a:b], log_decay,
                initial_state=state,
            )  # fmt: skip
            outs.append(out)
        assert state is not None
        whole = lightning_references((q, k, v), log_decay)
        check_lightning(subject, (torch.cat(outs, 1), state), *whole)

    def test_no_drift_over_131072_tokens(self, subject: Subject) -> None:
        """The slowest head of MiniMax, whose state forgets half in 14,000 tokens.

        A state that is carried in bf16 loses more at each border of a block than the products of
        bf16 operands do in all of them.
        """
        subject.require(q_heads=1, kv_heads=1)
        subject.require_length(max(LENGTHS))  # the work is linear: what runs this, runs that
        length, tail = 131_072, 127
        log_decay = minimax_decay(78)[-1:].to(subject.device)
        # as in MiniMax, which applies SiLU: means are positive and the state grows
        made = each(
            equal_heads(subject, 1, length, 1), lambda t: torch.nn.functional.silu(t.float())
        )
        made = each(made, lambda t: t.to(subject.dtype))
        out, state = subject.run(longctx.lightning_attention, *made, log_decay)
        _, k, v = each(made, lambda t: t[:, :-tail])
        exact = oracle.lightning_attention(
            *each(made, lambda t: t[:, -tail:].double()),
            log_decay.double(),
            initial_state=state_by_definition(k, v, log_decay),
        )
        # of the two lengths of chunks the one that costs most: borders in fp32, else operands
        chunk = min(CHUNKS) if subject.dtype == torch.float32 else max(CHUNKS)
        low_out, low_state = chunked_lightning(*made, log_decay, chunk=chunk)
        low = low_out[:, -tail:], low_state
        check_lightning(subject, (out[:, -tail:].contiguous(), state), exact, low)

    def test_every_token_by_decode(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4)
        subject.require(q_heads=4, kv_heads=4, op="lightning_decode")
        subject.require_length(129)
        made, log_decay = equal_heads(subject, 2, 129), decays(subject)
        first = each(made, lambda t: t[:, :70])
        out, state = subject.run(longctx.lightning_attention, *first, log_decay)
        outs = [out]
        for t in range(70, 129):
            token = (x[:, t : t + 1] for x in made)
            outs.append(subject.run(longctx.lightning_decode, *token, state, log_decay))
        exact, _ = lightning_references(made, log_decay)
        low_out, low_state = chunked_lightning(*first, log_decay)
        rest = each(made, lambda t: t[:, 70:].float())
        low_rest, low_state = oracle.lightning_attention(*rest, log_decay, initial_state=low_state)
        low = torch.cat([low_out, low_rest.to(low_out.dtype)], 1), low_state
        check_lightning(subject, (torch.cat(outs, 1), state), exact, low)


@pytest.mark.longctx_op("lightning_attention")
class TestLightningPacked:
    """Packed sequences of any lengths, none and one among them."""

    def test_equal_separate_ones(self, subject: Subject) -> None:
        subject.require("varlen", q_heads=4, kv_heads=4)
        subject.require_length(sum(PACKED))
        made = equal_heads(subject, 1, sum(PACKED))
        _, state = run_and_check(subject, made, decays(subject), cu_seqlens=_ends(subject))
        assert (state[[1, 3, 7]] == 0).all()

    def test_with_a_state_each(self, subject: Subject) -> None:
        subject.require("varlen", "initial-state", q_heads=4, kv_heads=4)
        subject.require_length(sum(PACKED))
        first = carried(subject, len(PACKED))
        made = equal_heads(subject, 1, sum(PACKED))
        _, state = run_and_check(
            subject, made, decays(subject), cu_seqlens=_ends(subject), initial_state=first
        )
        assert torch.equal(state[[1, 3, 7]], first[[1, 3, 7]])

    def test_long_sequences(self, subject: Subject) -> None:
        subject.require("varlen", q_heads=2, kv_heads=2)
        subject.require_length(1000)
        ends = torch.tensor([0, 1000, 1255, 2250], dtype=torch.int32, device=subject.device)
        made = equal_heads(subject, 1, 2250, 2)
        run_and_check(subject, made, decays(subject, MIXED[1:3]), cu_seqlens=ends)

    def test_a_sequence_of_nan_harms_no_other(self, subject: Subject) -> None:
        """A state that is cleared by a factor of 0 would still be NaN."""
        subject.require("varlen", q_heads=4, kv_heads=4)
        subject.require_length(sum(PACKED))
        ends, made = _ends(subject), equal_heads(subject, 1, sum(PACKED))
        exact, low = lightning_references(made, decays(subject), cu_seqlens=ends)
        for tensor in made:
            tensor[:, 1:66] = torch.nan  # the third sequence
        out, state = subject.run(
            longctx.lightning_attention, *made, decays(subject), cu_seqlens=ends
        )
        assert out[:, 1:66].isnan().all()
        for rows, sequences in ((slice(0, 1), slice(0, 2)), (slice(66, None), slice(3, None))):
            got = out[:, rows].contiguous(), state[sequences].contiguous()
            check_lightning(subject, got, *[(o[:, rows], s[sequences]) for o, s in (exact, low)])

    def test_only_empty_sequences(self, subject: Subject) -> None:
        subject.require("varlen", "initial-state", q_heads=4, kv_heads=4)
        ends = torch.zeros(4, dtype=torch.int32, device=subject.device)
        first = carried(subject, 3)
        out, state = subject.run(
            longctx.lightning_attention, *equal_heads(subject, 1, 0), decays(subject),
            cu_seqlens=ends, initial_state=first,
        )  # fmt: skip
        assert out.shape == (1, 0, 4, 64)
        assert torch.equal(state, first)

    def test_captured_lengths_may_change(self, subject: Subject) -> None:
        """A CUDA graph reads the lengths that the device holds at replay."""
        subject.require_cuda()
        subject.require("varlen", q_heads=4, kv_heads=4)
        if subject.backend == "torch":
            pytest.skip("the torch backend says that it reads packed lengths on the host")
        ends, made = _ends(subject), equal_heads(subject, 1, sum(PACKED))
        log_decay = decays(subject)
        graph, got = capture(
            lambda: longctx.lightning_attention(
                *made, log_decay, cu_seqlens=ends, backend=subject.backend
            )
        )
        for lengths in (PACKED[::-1], (0, 0, 0, 0, 0, 0, 0, sum(PACKED))):
            ends.copy_(torch.tensor((0, *lengths)).cumsum(0))
            graph.replay()
            exact, low = lightning_references(made, log_decay, cu_seqlens=ends)
            check_lightning(subject, got, exact, low)


def _ends(subject: Subject) -> Tensor:
    return torch.tensor((0, *PACKED), device=subject.device).cumsum(0).to(torch.int32)
