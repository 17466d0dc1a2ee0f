"""Checks that are not repeated: what they tell apart, and when they are repeated all the same."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longctx import TopKPlan
from longctx.ops import _once
from longctx.ops._once import check_once


@pytest.fixture
def calls(monkeypatch):
    """Return the arguments of every check."""
    monkeypatch.setattr(_once, "_passed", set())
    return []


def shaped(*shape, dtype=torch.float16, device="meta"):
    return torch.empty(shape, dtype=dtype, device=device)


def test_what_passed_is_not_checked_again(calls):
    check = calls.append
    for _ in range(3):
        check_once(check, shaped(2, 3))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [
        (shaped(2, 4), 1.0),
        (shaped(3, 2).t(), 1.0),
        (shaped(2, 3, dtype=torch.float32), 1.0),
        (shaped(2, 3).requires_grad_(), 1.0),
        (shaped(2, 3), 0.5),
        (shaped(2, 3), None),
    ],
)
def test_what_a_check_can_see_is_told_apart(calls, other):
    def check(*args):
        calls.append(args)

    check_once(check, shaped(2, 3), 1.0)
    check_once(check, *other)
    assert len(calls) == 2


def test_plans_and_lists_count_by_what_they_hold(calls):
    def check(*args):
        calls.append(args)

    def plan(k, **options):
        return TopKPlan(shaped(1, 2, 1, k, dtype=torch.int32), **options)

    for _ in range(2):
        check_once(check, shaped(2), plan(3))
        check_once(check, shaped(2), plan(4))
        check_once(check, shaped(2), plan(3, page_size=2))
        check_once(check, shaped(2), [(shaped(1), shaped(2))])
        check_once(check, shaped(2), [(shaped(1), shaped(3))])
    assert len(calls) == 5


def test_a_failure_is_not_remembered(calls):
    def check(tensor):
        calls.append(tensor)
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            check_once(check, shaped(2))
    assert len(calls) == 2


@pytest.mark.parametrize("first", [shaped(2, device="cpu"), "no tensor", None])
def test_values_that_can_be_read_and_strangers_are_always_checked(calls, first):
    check_once(calls.append, first)
    check_once(calls.append, first)
    assert len(calls) == 2


def test_values_are_read_where_they_are_asked_for(calls, monkeypatch):
    check_once(calls.append, shaped(2))
    monkeypatch.setenv("LONGCTX_CHECK_VALUES", "1")
    check_once(calls.append, shaped(2))
    assert len(calls) == 2


def test_things_without_a_key_are_always_checked(calls):
    def check(*args):
        calls.append(args)

    for _ in range(2):
        check_once(check, shaped(2), object())
        check_once(check, shaped(2), {1: 2})
    assert len(calls) == 4


def test_symbolic_shapes_are_always_checked(calls):
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fake = mode.from_tensor(torch.empty(5, 3), static_shapes=False).to("meta")
    check_once(calls.append, fake)
    check_once(calls.append, fake)
    assert len(calls) == 2


def test_memory_is_bounded(calls, monkeypatch):
    monkeypatch.setattr(_once, "MOST_PASSED", 4)
    for n in range(20):
        check_once(calls.append, shaped(n + 1))
    assert len(_once._passed) <= 4
