"""Lightning attention on tensors whose elements lie more than 2**31 apart."""

from __future__ import annotations

import pytest
import torch

import longctx
from longctx.testing.subject import Subject
from longctx.testing.suite.test_flash_offsets import far_apart, require_memory
from longctx.testing.suite.test_lightning import (
    check_lightning,
    decays,
    each,
    equal_heads,
    lightning_references,
    run_and_check,
)
from longctx.testing.suite.test_lightning_gradients import run_and_check as check_backward
from longctx.testing.suite.test_lightning_gradients import upstream_of

__all__ = ["TestLightningOffsets"]


@pytest.mark.longctx_op("lightning_attention")
class TestLightningOffsets:
    """64-bit addresses of the inputs, of their gradients' inputs and of the output."""

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "sequence", "heads"])
    @pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
    def test_inputs(self, subject: Subject, which: int, axis: int) -> None:
        """One input at a time has its last entry along an axis 2**31 elements away."""
        subject.require(q_heads=4, kv_heads=4)
        subject.require_length(129)
        made = list(equal_heads(subject, 2, 129))
        made[which] = far_apart(subject, made[which], axis)
        run_and_check(subject, (made[0], made[1], made[2]), decays(subject))

    @pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "dout"])
    def test_gradients(self, subject: Subject, which: int) -> None:
        """The same along the sequence, for the backward pass."""
        subject.require(q_heads=4, kv_heads=4, gradient=True)
        subject.require_length(129)
        made = equal_heads(subject, 1, 129)
        dout, dfinal = upstream_of(subject, made[2], 1)
        assert dout is not None
        tensors = [*made, dout]
        tensors[which] = far_apart(subject, tensors[which], 1)
        check_backward(subject, tensors[:3], decays(subject), (tensors[3], dfinal))

    def test_outputs(self, subject: Subject) -> None:
        """128 heads, equal but for their decay, and one token more than 2**31 outputs hold."""
        subject.require_cuda()
        subject.require(q_heads=128, kv_heads=128)
        length, tail = 2**18 + 1, 127
        require_memory(subject, length * 128 * 64, subject.dtype)
        one_head = equal_heads(subject, 1, length, 1)
        made = each(one_head, lambda t: t.expand(-1, -1, 128, -1))
        # decays of at least 0.3 forget in 127 tokens whatever rounding would not
        log_decay = -torch.rand(128, generator=subject.generator).to(subject.device) - 0.3
        out, state = subject.run(longctx.lightning_attention, *made, log_decay)
        exact, low = lightning_references(each(made, lambda t: t[:, -2 * tail :]), log_decay)
        got = out[:, -tail:].contiguous(), state
        check_lightning(subject, got, *[(o[:, -tail:], s) for o, s in (exact, low)])
