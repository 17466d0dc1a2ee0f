"""Sets of tokens from scores: how many by mass, which ones by rank, ties to the lower token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import longctx
from longctx import TokenSetPlan
from longctx.reference import token_sparse as oracle
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_lightning import capture

__all__ = ["TestSelectTokens"]


def require(subject: Subject, heads: int = 4) -> None:
    """Skip the test if the backend does not declare the request."""
    subject.require(head_dim=1, q_heads=heads, kv_heads=heads)


def run_and_check(
    subject: Subject, scores: Tensor, drop_mass: float, min_tokens: int = 0, recent: int = 9
) -> TokenSetPlan:
    """Select, and compare every index and count with the oracle's; return the plan."""
    options = {"drop_mass": drop_mass, "min_tokens": min_tokens, "recent": recent}
    plan: TokenSetPlan = subject.run(longctx.select_tokens, scores, **options)
    check_plan(scores, plan, drop_mass, min_tokens, recent)
    return plan


def check_plan(
    scores: Tensor, plan: TokenSetPlan, drop_mass: float, min_tokens: int, recent: int
) -> None:
    """Compare a plan with the oracle's."""
    batch, heads, length = scores.shape
    assert plan.indices.shape == (batch, heads, length + recent)
    assert (plan.indices.dtype, plan.counts.dtype) == (torch.int32, torch.int32)
    exact = oracle.select_tokens(scores, drop_mass=drop_mass, min_tokens=min_tokens, recent=recent)
    assert torch.equal(plan.counts, exact.counts), (plan.counts, exact.counts)
    assert torch.equal(plan.indices, exact.indices)


def skewed_scores(subject: Subject, batch: int, heads: int, length: int) -> Tensor:
    """Return scores that are flat in the first batch entry and steep in the others."""
    scores = torch.rand(batch, heads, length, generator=subject.generator)
    power = torch.tensor([1.0, 6.0, 12.0])[:batch].view(-1, 1, 1)
    return (scores**power).to(subject.device, subject.dtype)


def clear_drop_mass(scores: Tensor, about: float) -> float:
    """Return a mass to drop near one that is wanted, far from every sum of smallest scores.

    Next to one of these sums the number of tokens hangs on how a backend rounds.
    """
    share = scores.double().mean(1).cpu()
    tails = (share / share.sum(1, keepdim=True)).sort(1).values.cumsum(1)
    near = tails[(tails - about).abs() < 0.05].sort().values
    near = torch.cat([torch.tensor([about - 0.05, about + 0.05]), near]).clamp(0, 1)
    near = near.sort().values
    widest = int(near.diff().argmax())
    return float((near[widest] + near[widest + 1]) / 2)


PROFILES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda r: r,
    "all-equal": lambda r: torch.full_like(r, 0.75),
    "quarter-of-a-binade": lambda r: 1 + (r * 2**21).floor() * 2.0**-23,
    "last-bits": lambda r: 1 + (r * 2**9).floor() * 2.0**-23,
    "few-values": lambda r: 1 + (r * 5).floor() * 2.0**-23,
    "denormal": lambda r: (r * 120).floor() * 2.0**-149,
    "huge": lambda r: r * 1e30,
    "mostly-zero": lambda r: torch.where(r < 0.95, 0.0, r),
}
"""Rows of scores from uniform random numbers, each one hard for some way of selecting."""


@pytest.mark.longctx_op("select_tokens", dtypes=("fp32", "fp64"))
class TestSelectTokens:
    """One length a batch entry, one set a head, exactly."""

    @pytest.mark.parametrize("heads", [1, 4, 32])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_sizes(self, subject: Subject, length: int, heads: int) -> None:
        require(subject, heads)
        subject.require_length(length)
        scores = skewed_scores(subject, 3, heads, length)
        plan = run_and_check(subject, scores, clear_drop_mass(scores, 0.3))
        assert (plan.counts == plan.counts[:, :1]).all()
        if length > 100:
            assert plan.counts[0, 0] > plan.counts[1, 0] > plan.counts[2, 0] > 9

    @pytest.mark.parametrize("about", [0.0, 0.005, 0.3, 0.7, 0.99, 1.0])
    @pytest.mark.parametrize("min_tokens", [0, 20, 97, 500])
    def test_budgets(self, subject: Subject, min_tokens: int, about: float) -> None:
        require(subject)
        scores = skewed_scores(subject, 2, 4, 97)
        drop_mass = about if about in (0.0, 1.0) else clear_drop_mass(scores, about)
        plan = run_and_check(subject, scores, drop_mass, min_tokens)
        least = 97 if drop_mass == 0 else min(min_tokens, 97)
        assert (plan.counts >= least + 9).all()
        if drop_mass == 1:
            assert (plan.counts == least + 9).all()

    @pytest.mark.parametrize(
        ("drop_mass", "sets"),
        [
            (0.0, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
            (0.05, [[0, 1, 2, 4], [0, 2, 3, 4]]),
            (0.15, [[0, 2, 4], [0, 3, 4]]),
            (0.35, [[0, 4], [3, 4]]),
            (0.95, [[4], [4]]),
            (1.0, [[4], [4]]),
        ],
    )
    def test_by_hand(self, subject: Subject, drop_mass: float, sets: list[list[int]]) -> None:
        """Head means of 0.4, 0.1, 0.2 and 0.3; both heads have a tie."""
        require(subject, 2)
        scores = torch.tensor([[[0.6, 0.1, 0.2, 0.1], [0.2, 0.1, 0.2, 0.5]]])
        plan = run_and_check(
            subject, scores.to(subject.device, subject.dtype), drop_mass, recent=1
        )
        padded = [row + [-1] * (5 - len(row)) for row in sets]
        assert plan.indices[0].tolist() == padded

    @pytest.mark.parametrize(
        ("drop_mass", "dropped"), [(0.25, 16), (0.5, 32), (0.4999, 32), (0.5001, 33), (1.0, 64)]
    )
    def test_a_mass_that_a_sum_meets_exactly(
        self, subject: Subject, drop_mass: float, dropped: int
    ) -> None:
        """64 equal scores: all sums are exact, and what goes holds at least the mass."""
        require(subject)
        scores = torch.full((1, 4, 64), 0.5, device=subject.device, dtype=subject.dtype)
        plan = run_and_check(subject, scores, drop_mass, recent=3)
        assert plan.counts.tolist() == [[64 - dropped + 3] * 4]
        kept = [*range(64 - dropped), 64, 65, 66]
        assert plan.indices[0, 0, : len(kept)].tolist() == kept

    @pytest.mark.parametrize("name", PROFILES)
    @pytest.mark.parametrize("min_tokens", [1, 33, 999, 1000])
    def test_ranks(self, subject: Subject, name: str, min_tokens: int) -> None:
        """All mass may go, so that the floor alone says how many stay."""
        require(subject)
        subject.require_length(1000)
        scores = _profile(subject, name, 2, 4, 1000)
        run_and_check(subject, scores, 1.0, min_tokens)

    @pytest.mark.parametrize("name", ["quarter-of-a-binade", "last-bits", "all-equal", "random"])
    def test_long_rows_in_one_bin(self, subject: Subject, name: str) -> None:
        """70,001 candidates: more than any buffer of candidates in shared memory holds."""
        require(subject, 2)
        subject.require_length(4099)  # the work is linear: what runs this, runs that
        run_and_check(subject, _profile(subject, name, 1, 2, 70_001), 1.0, 2048)

    @pytest.mark.parametrize("others", [0.0, 1e-9])
    def test_one_token_holds_all_the_mass(self, subject: Subject, others: float) -> None:
        require(subject)
        scores = torch.full((1, 4, 255), others, device=subject.device, dtype=subject.dtype)
        scores[:, :, 77] = 1
        plan = run_and_check(subject, scores, 0.005, min_tokens=1, recent=2)
        assert plan.indices[0, :, :3].tolist() == [[77, 255, 256]] * 4

    def test_scores_of_zero_leave_the_floor(self, subject: Subject) -> None:
        require(subject)
        scores = torch.zeros(1, 4, 33, device=subject.device, dtype=subject.dtype)
        plan = run_and_check(subject, scores, 0.1, min_tokens=4, recent=1)
        assert plan.indices[0, 0, :5].tolist() == [0, 1, 2, 3, 33]

    def test_zeros_of_both_signs_tie(self, subject: Subject) -> None:
        require(subject)
        scores = torch.zeros(1, 4, 33, device=subject.device, dtype=subject.dtype)
        scores[..., ::2] = -0.0
        scores[..., 30] = 1
        plan = run_and_check(subject, scores, 1.0, min_tokens=6, recent=0)
        assert plan.indices[0, 0, :6].tolist() == [0, 1, 2, 3, 4, 30]

    @pytest.mark.parametrize(("length", "recent"), [(0, 5), (0, 0), (5, 0), (1, 128)])
    def test_short_prefixes(self, subject: Subject, length: int, recent: int) -> None:
        require(subject)
        run_and_check(subject, skewed_scores(subject, 2, 4, length), 0.5, recent=recent)

    @pytest.mark.parametrize("head_axis", ["query", "kv", "shared"])
    def test_heads_are_what_the_caller_says(self, subject: Subject, head_axis: str) -> None:
        heads = 1 if head_axis == "shared" else 4
        require(subject, heads)
        scores = skewed_scores(subject, 2, heads, 129)
        options = {"drop_mass": clear_drop_mass(scores, 0.3), "min_tokens": 0, "recent": 5}
        plan = subject.run(longctx.select_tokens, scores, head_axis=head_axis, **options)
        assert (plan.head_axis, plan.scope) == (head_axis, "qkv")
        assert torch.equal(plan.indices, oracle.select_tokens(scores, **options).indices)  # type: ignore[arg-type]

    def test_views(self, subject: Subject) -> None:
        require(subject)
        wide = skewed_scores(subject, 2, 8, 200)
        wide[..., 129:] = torch.nan
        wide[:, 1::2] = torch.nan
        scores = wide[:, ::2, :129]
        run_and_check(subject, scores, clear_drop_mass(scores, 0.3))

    def test_same_inputs_give_the_same_bits(self, subject: Subject) -> None:
        """Tails that a sum in any order would round otherwise each time."""
        require(subject, 32)
        subject.require_length(4099)
        scores = skewed_scores(subject, 2, 32, 4099)
        options = {"drop_mass": 0.3, "min_tokens": 0, "recent": 5}
        first = subject.run(longctx.select_tokens, scores, **options)
        for _ in range(20 if subject.device.type == "cuda" else 2):
            again = subject.run(longctx.select_tokens, scores, **options)
            assert torch.equal(first.indices, again.indices)
            assert torch.equal(first.counts, again.counts)

    def test_nothing_is_read_on_the_host(self, subject: Subject) -> None:
        subject.require_cuda()
        require(subject)
        scores = skewed_scores(subject, 2, 4, 1000)
        options = {"drop_mass": clear_drop_mass(scores, 0.3), "min_tokens": 0, "recent": 5}
        subject.run(longctx.select_tokens, scores, **options)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan = longctx.select_tokens(scores, **options, backend=subject.backend)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode(before)
        check_plan(scores, plan, *options.values())  # type: ignore[arg-type]

    def test_captured_scores_may_change(self, subject: Subject) -> None:
        subject.require_cuda()
        require(subject)
        scores = skewed_scores(subject, 2, 4, 1000)
        graph, plan = capture(
            lambda: longctx.select_tokens(
                scores, drop_mass=0.2501, min_tokens=0, recent=5, backend=subject.backend
            )
        )
        for count in (500, 100):
            scores.zero_()
            # powers of two: 64 equal scores of 1/64 in one place or another
            scores[:, :, count : count + 64] = 1
            graph.replay()
            check_plan(scores, plan, 0.2501, 0, 5)

    def test_bad_input(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        require(subject)
        monkeypatch.setenv("LONGCTX_CHECK_VALUES", "1")
        scores = skewed_scores(subject, 1, 4, 16)
        select = longctx.select_tokens
        for drop_mass in (1.5, -0.1, float("nan")):
            with pytest.raises(ValueError, match="drop_mass must lie between 0 and 1, got"):
                subject.run(select, scores, drop_mass=drop_mass)
        for bad in (-scores, scores.log() + torch.inf):
            with pytest.raises(ValueError, match="finite and at least 0, got values from"):
                subject.run(select, bad, drop_mass=0.1)
        with pytest.raises(ValueError, match=r"scores must be \(batch, heads, prefix_len\)"):
            subject.run(select, scores[0], drop_mass=0.1)
        with pytest.raises(TypeError, match="scores must be float32"):
            subject.run(select, scores.half(), drop_mass=0.1)
        with pytest.raises(ValueError, match="recent must be at least 0, got -1"):
            subject.run(select, scores, drop_mass=0.1, recent=-1)
        with pytest.raises(ValueError, match="no head axis is called 'keys'"):
            subject.run(select, scores, drop_mass=0.1, head_axis="keys")


def _profile(subject: Subject, name: str, batch: int, heads: int, length: int) -> Tensor:
    uniform = torch.rand(batch, heads, length, generator=subject.generator)
    return PROFILES[name](uniform).float().to(subject.device, subject.dtype)
