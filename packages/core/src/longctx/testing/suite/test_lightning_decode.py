"""Lightning attention one token at a time: the step, and the state that it leaves in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import lightning as oracle
from longctx.testing.subject import Subject
from longctx.testing.suite.test_lightning import (
    Pair,
    Triple,
    capture,
    check_lightning,
    decays,
    each,
    equal_heads,
    fused_views,
    lightning_references,
    minimax_decay,
)
from longctx.testing.suite.test_lightning_state import carried, state_by_definition

__all__ = ["TestLightningDecode"]


@pytest.mark.longctx_op("lightning_decode")
class TestLightningDecode:
    """One token, and the state in place."""

    @pytest.mark.parametrize("batch", [1, 3, 33])
    @pytest.mark.parametrize(
        ("head_dim", "value_dim"), [(64, 64), (128, 128), (64, 128), (128, 64)]
    )
    def test_one_step(self, subject: Subject, batch: int, head_dim: int, value_dim: int) -> None:
        subject.require(q_heads=4, kv_heads=4, head_dim=head_dim, value_dim=value_dim)
        made = equal_heads(subject, batch, 1, head_dim=head_dim, value_dim=value_dim)
        state = carried(subject, batch, head_dim=head_dim, value_dim=value_dim)
        _step_and_check(subject, made, state, decays(subject), scale=0.4)

    @pytest.mark.parametrize("heads", [1, 3, 64])
    def test_numbers_of_heads(self, subject: Subject, heads: int) -> None:
        subject.require(q_heads=heads, kv_heads=heads)
        log_decay = -torch.rand(heads, generator=subject.generator).to(subject.device)
        made = equal_heads(subject, 2, 1, heads)
        _step_and_check(subject, made, carried(subject, 2, heads=heads), log_decay)

    def test_strong_decay(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4)
        strong = decays(subject, (-20.0, -90.0, -1e4, -1e30))
        made = equal_heads(subject, 2, 1)
        _step_and_check(subject, made, carried(subject, 2), strong)

    def test_slots_of_a_larger_cache(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4)
        slots = carried(subject, 7)
        slots[::2] = torch.nan
        before = slots.clone()
        made = equal_heads(subject, 3, 1)
        _step_and_check(subject, made, slots[1::2], decays(subject))
        assert slots[::2].isnan().all()
        assert (slots[1::2] != before[1::2]).any()

    def test_token_views_of_a_fused_projection(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4)
        token = each(fused_views(subject.randn(3, 5, 4, 192)), lambda t: t[:, 3:4])
        _step_and_check(subject, token, carried(subject, 3), decays(subject))

    def test_1000_steps_do_not_wear_the_state_out(self, subject: Subject) -> None:
        """A state that is rounded to bf16 at every token would be off by percents."""
        subject.require(q_heads=2, kv_heads=2)
        subject.require_length(1000)
        q, k, v = equal_heads(subject, 1, 1000, 2)
        log_decay = minimax_decay(78)[-2:].to(subject.device)
        state = torch.zeros(1, 2, 64, 64, device=subject.device)
        low = state.clone()
        for t in range(1000):
            token = q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1]
            subject.run(longctx.lightning_decode, *token, state, log_decay)
            wide = each(token, lambda x: x[:, 0].float())
            _, low = oracle.lightning_decode(*wide, low, log_decay)
        subject.check(state, state_by_definition(k, v, log_decay), low, "state")

    def test_replayed_graph_advances_the_state(self, subject: Subject) -> None:
        subject.require_cuda()
        subject.require(q_heads=4, kv_heads=4)
        made = equal_heads(subject, 2, 9)
        token = each(made, lambda x: x[:, :1].clone())
        state, log_decay = torch.zeros(2, 4, 64, 64, device=subject.device), decays(subject)
        graph, out = capture(
            lambda: longctx.lightning_decode(*token, state, log_decay, backend=subject.backend)
        )
        state.zero_()
        outs = []
        for t in range(9):
            for held, new in zip(token, made, strict=True):
                held.copy_(new[:, t : t + 1])
            graph.replay()
            outs.append(out.clone())
        exact, _ = lightning_references(made, log_decay)
        low = oracle.lightning_attention(*each(made, torch.Tensor.float), log_decay)
        check_lightning(subject, (torch.cat(outs, 1), state), exact, low)

    def test_bad_input(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4)
        q, k, v = equal_heads(subject, 2, 3)
        token, log_decay = (q[:, :1], k[:, :1], v[:, :1]), decays(subject)
        with pytest.raises(ValueError, match="one token, got seq=3: use lightning_attention"):
            subject.run(longctx.lightning_decode, q, k, v, carried(subject, 2), log_decay)
        with pytest.raises(TypeError, match="state must be float32, got bfloat16"):
            subject.run(
                longctx.lightning_decode, *token, carried(subject, 2).bfloat16(), log_decay
            )
        with pytest.raises(ValueError, match=r"= \(2, 4, 64, 64\), got \(3, 4, 64, 64\)"):
            subject.run(longctx.lightning_decode, *token, carried(subject, 3), log_decay)
        with pytest.raises(ValueError, match="written in place, got an expanded tensor"):
            subject.run(
                longctx.lightning_decode, *token,
                carried(subject, 1).expand(2, -1, -1, -1), log_decay,
            )  # fmt: skip

    def test_a_gradient_is_refused(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4)
        q, k, v = equal_heads(subject, 1, 1)
        with pytest.raises(longctx.UnsupportedError, match="no backward pass"):
            subject.run(
                longctx.lightning_decode, q.requires_grad_(), k, v, carried(subject, 1),
                decays(subject),
            )  # fmt: skip


def _step_and_check(
    subject: Subject, made: Triple, state: Tensor, log_decay: Tensor, scale: float = 1.0
) -> None:
    """Run one step on a state, in place, and check both against the oracle."""

    def oracle_step(precision: torch.dtype) -> Pair:
        token = each(made, lambda t: t[:, 0].to(precision))
        out, after = oracle.lightning_decode(
            *token, state.to(precision), log_decay.to(precision), scale=scale
        )
        return out.unsqueeze(1), after

    # both before the call, which overwrites the state
    exact, low = oracle_step(torch.float64), oracle_step(torch.float32)
    out = subject.run(longctx.lightning_decode, *made, state, log_decay, scale=scale)
    assert out.dtype == subject.dtype
    for h in range(out.shape[2]):
        subject.check(out[:, :, h], exact[0][:, :, h], low[0][:, :, h], f"out of head {h}")
        subject.check(state[:, h], exact[1][:, h], low[1][:, h], f"state of head {h}")
