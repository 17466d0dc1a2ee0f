"""What holds for every op: right, repeatable, blind to strides, capturable, honestly declared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longctx.testing.budget import error_budget
from longctx.testing.cases import Case, Tensors, cast
from longctx.testing.poison import poisoned_allocations
from longctx.testing.subject import Subject

__all__ = ["TestEveryOp", "TestUndeclared"]

_RUNS = 20
_CAPTURE_WARM_UPS = 3


class _WithCase:
    # a fixture of the class, so that it travels with the class into a third party's test file
    @pytest.fixture
    def case(self, subject: Subject) -> Case:
        """Return the ready-made case of the test."""
        assert subject.case is not None
        return subject.case


def _made(subject: Subject, case: Case) -> Tensors:
    subject.require(*case.features)
    return case.inputs(subject.generator)


def _head_major(tensor: Tensor) -> Tensor:
    """Return equal values whose memory is ``[batch, heads, seq, dim]``."""
    if tensor.dim() != 4 or not tensor.is_floating_point():
        return tensor
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _padded(tensor: Tensor) -> Tensor:
    """Return equal values as a view into wider rows that hold NaN outside of it."""
    if tensor.dim() != 4 or not tensor.is_floating_point():
        return tensor
    batch, length, heads, dim = tensor.shape
    wide = tensor.new_full((batch, length + 3, heads + 1, dim + 8), float("nan"))
    view = wide[:, 1 : length + 1, :heads, :dim]
    view.copy_(tensor)
    return view


@pytest.mark.longctx_op("*", cases=True)
class TestEveryOp(_WithCase):
    """Every ready-made case of every op that the backend declares."""

    def test_matches_the_oracle(self, subject: Subject, case: Case) -> None:
        made = _made(subject, case)
        inputs = cast(case, made, subject.device, subject.dtype)
        with poisoned_allocations():
            results = case.call(subject.backend, **inputs)
        exact, low = case.references(made, subject.dtype)
        subject.check_all(results, exact, low, [f"output {i}" for i in range(len(exact))])

    @pytest.mark.parametrize("view", [_head_major, _padded], ids=["head-major", "padded"])
    def test_strides_do_not_matter(
        self, subject: Subject, case: Case, view: Callable[[Tensor], Tensor]
    ) -> None:
        made = _made(subject, case)
        inputs = cast(case, made, subject.device, subject.dtype)
        with poisoned_allocations():
            results = case.call(
                subject.backend, **{name: view(tensor) for name, tensor in inputs.items()}
            )
        exact, low = case.references(made, subject.dtype)
        subject.check_all(results, exact, low, [f"output {i}" for i in range(len(exact))])

    def test_inputs_are_not_written(self, subject: Subject, case: Case) -> None:
        inputs = cast(case, _made(subject, case), subject.device, subject.dtype)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        case.call(subject.backend, **inputs)
        for name, tensor in inputs.items():
            assert torch.equal(_bits(tensor), _bits(before[name])), f"{name} was written to"

    def test_same_inputs_give_the_same_bits(self, subject: Subject, case: Case) -> None:
        if not subject.support.deterministic:
            pytest.skip("not declared: determinism")
        inputs = cast(case, _made(subject, case), subject.device, subject.dtype)
        first = case.call(subject.backend, **inputs)
        runs = _RUNS if subject.device.type == "cuda" else 3
        for run in range(1, runs):
            for one, other in zip(first, case.call(subject.backend, **inputs), strict=True):
                assert torch.equal(_bits(one), _bits(other)), f"run {run} differs from the first"

    def test_can_be_captured_in_a_cuda_graph(self, subject: Subject, case: Case) -> None:
        subject.require_cuda()
        if not case.capturable:
            pytest.skip("the case itself copies from the host")
        made = _made(subject, case)
        inputs = cast(case, made, subject.device, subject.dtype)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_CAPTURE_WARM_UPS):
                case.call(subject.backend, **inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = case.call(subject.backend, **inputs)
        # the graph must compute from what the inputs hold at replay
        fresh = case.inputs(subject.generator)
        for name, tensor in cast(case, fresh, subject.device, subject.dtype).items():
            inputs[name].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        exact, low = case.references(fresh, subject.dtype)
        subject.check_all(captured, exact, low, [f"output {i}" for i in range(len(exact))])


@pytest.mark.longctx_op("*", cases=True, declared=False)
class TestUndeclared(_WithCase):
    """Cases that the backend does not declare: whatever happens is no failure, but is told."""

    def test_undeclared(self, subject: Subject, case: Case) -> None:
        made = case.inputs(subject.generator)
        inputs = cast(case, made, subject.device, subject.dtype)
        if not _runs_right(subject, case, made, inputs):
            pytest.skip("not declared, and does not run")
        pytest.skip(f"runs but is not declared: {case.id} in {subject.dtype}")


def _runs_right(subject: Subject, case: Case, made: Tensors, inputs: Tensors) -> bool:
    from longctx.dispatch import BoundBackend

    try:
        results = case.call(BoundBackend(subject.backend), **inputs)
        exact, low = case.references(made, subject.dtype)
    except Exception:  # undeclared: any refusal will do
        return False
    return all(
        one.shape == right.shape and error_budget(one, right, about.to(one.dtype)).used <= 1
        for one, right, about in zip(results, exact, low, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bits as integers, so that NaN equals NaN and -0 differs from 0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])
