"""Scores of tokens by the attention that recent queries pay them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import token_sparse as oracle
from longctx.testing.subject import Subject
from longctx.testing.suite.test_flash_offsets import far_apart

__all__ = ["TestTokenScores"]


def run_and_check(subject: Subject, q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """Run token_scores, check it against the oracle, return the scores."""
    scores: Tensor = subject.run(longctx.token_scores, q, k, **options)
    assert scores.dtype == torch.float32
    assert scores.shape == (q.shape[0], q.shape[2], k.shape[1] - q.shape[1])
    exact = oracle.token_scores(q.double(), k.double(), **options)
    low = oracle.token_scores(q, k, **options)
    for h in range(q.shape[2]):
        subject.check(scores[:, h], exact[:, h], low[:, h], f"scores of head {h}")
    return scores


def queries_and_keys(
    subject: Subject, batch: int, window: int, k_len: int, **sizes: int
) -> tuple[Tensor, Tensor]:
    """Return recent queries that prefer some keys by far, and all keys."""
    q, k, _ = subject.qkv(batch, window, k_len, **sizes)
    return 2 * q, k


@pytest.mark.longctx_op("token_scores")
class TestTokenScores:
    """The mean of causal softmax rows over a window of queries, pooled."""

    @pytest.mark.parametrize("pool", [1, 7])
    @pytest.mark.parametrize(
        ("window", "k_len"),
        [(1, 63), (63, 129), (32, 255), (65, 66), (127, 1000), (128, 4099), (129, 255)],
    )
    def test_sizes(self, subject: Subject, window: int, k_len: int, pool: int) -> None:
        subject.require()
        subject.require_length(k_len)
        run_and_check(subject, *queries_and_keys(subject, 1, window, k_len), pool=pool)

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads"), [(1, 1), (4, 4), (4, 1), (8, 2), (8, 1), (16, 1), (6, 2)]
    )
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_grouped_heads(
        self, subject: Subject, head_dim: int, q_heads: int, kv_heads: int
    ) -> None:
        heads = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
        subject.require(**heads)
        subject.require_length(255)
        run_and_check(subject, *queries_and_keys(subject, 2, 33, 255, **heads))

    @pytest.mark.parametrize("pool", [1, 3, 5, 7, 63])
    def test_pools(self, subject: Subject, pool: int) -> None:
        """The last one is wider than what it pools."""
        subject.require()
        subject.require_length(63)
        run_and_check(subject, *queries_and_keys(subject, 2, 16, 63), pool=pool)

    @pytest.mark.parametrize("scale", [1.0, 0.01, -0.2])
    def test_scale(self, subject: Subject, scale: float) -> None:
        subject.require()
        subject.require_length(255)
        run_and_check(subject, *queries_and_keys(subject, 1, 33, 255), scale=scale)

    def test_equal_scores_by_hand(self, subject: Subject) -> None:
        """Three queries that prefer nothing see 5, 6 and 7 keys; zeros beyond the ends count."""
        subject.require(q_heads=1, kv_heads=1)
        q, k = torch.zeros(1, 3, 1, 64), subject.randn(1, 7, 1, 64)
        q = q.to(subject.device, subject.dtype)
        even = (1 / 5 + 1 / 6 + 1 / 7) / 3
        for pool, shares in ((1, [1, 1, 1, 1]), (3, [2 / 3, 1, 1, 2 / 3])):
            scores = subject.run(longctx.token_scores, q, k, pool=pool)
            exact = even * torch.tensor(shares, dtype=torch.float64, device=subject.device)
            subject.check(scores[0, 0], exact, exact.float(), f"scores pooled over {pool}")

    def test_one_key_takes_everything(self, subject: Subject) -> None:
        """Scores of 200 above all others, whose exponentials overflow without a maximum."""
        subject.require()
        subject.require_length(255)
        q, k = queries_and_keys(subject, 1, 33, 255)
        q[..., 0], k[..., 0] = 40, 0
        k[:, 100, :, 0] = 40
        scores = run_and_check(subject, q, k, pool=1)
        exact = torch.zeros(222, dtype=torch.float64, device=subject.device)
        exact[100] = 1
        subject.check(scores[0, 0], exact, exact.float(), "scores")

    @pytest.mark.parametrize("window", [1, 33])
    def test_no_tokens_before_the_window(self, subject: Subject, window: int) -> None:
        subject.require()
        subject.require_length(window)
        q, k = queries_and_keys(subject, 2, window, window)
        assert subject.run(longctx.token_scores, q, k).shape == (2, 4, 0)

    def test_views(self, subject: Subject) -> None:
        """The last queries of a prompt; keys in a longer cache whose free slots hold NaN."""
        subject.require()
        subject.require_length(255)
        q = subject.randn(2, 4, 255, 64).transpose(1, 2)[:, -33:]
        cache = subject.randn(2, 300, 2, 64)
        cache[:, 255:] = torch.nan
        run_and_check(subject, q, cache[:, :255])

    def test_131072_keys(self, subject: Subject) -> None:
        subject.require(q_heads=2, kv_heads=1)
        subject.require_length(4099)  # the work is linear: what runs this, runs that
        made = queries_and_keys(subject, 1, 8, 131_072, q_heads=2, kv_heads=1)
        run_and_check(subject, *made)

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "sequence", "heads"])
    @pytest.mark.parametrize("which", [0, 1], ids=["q", "k"])
    def test_inputs_far_apart(self, subject: Subject, which: int, axis: int) -> None:
        """One input at a time has its last entry along an axis 2**31 elements away."""
        subject.require()
        subject.require_length(129)
        made = list(queries_and_keys(subject, 2, 33, 129))
        made[which] = far_apart(subject, made[which], axis)
        run_and_check(subject, made[0], made[1])

    def test_bad_input(self, subject: Subject) -> None:
        subject.require()
        q, k = queries_and_keys(subject, 1, 5, 9)
        score = longctx.token_scores
        with pytest.raises(ValueError, match="must fit into k_len, got 5 queries and 4 keys"):
            subject.run(score, q, k[:, :4])
        with pytest.raises(ValueError, match="window of q_recent must be at least 1"):
            subject.run(score, q[:, :0], k)
        with pytest.raises(ValueError, match="pool must be odd and at least 1, got 4"):
            subject.run(score, q, k, pool=4)
        with pytest.raises(ValueError, match="multiple of kv_heads"):
            subject.run(score, q[:, :, :3], k)
        with pytest.raises(TypeError, match="must share a dtype"):
            subject.run(score, q, k.double())
        with pytest.raises(longctx.UnsupportedError, match="no backward pass"):
            subject.run(score, q.requires_grad_(), k)
