"""What a test of the kit runs against: one backend, one op, one data type, one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.dispatch import arch_of
from longctx.protocols.backend import Backend
from longctx.support import OpRequest, OpSupport, Reason, dtype_name, reasons_against
from longctx.testing.budget import Budget, assert_within_budget
from longctx.testing.cases import Case
from longctx.testing.poison import poisoned_allocations

__all__ = ["LENGTHS", "Subject"]

LENGTHS = (1, 63, 65, 127, 129, 255, 1000, 4099)
"""Sequence lengths around the tile sizes that kernels use, none of them a multiple of one."""


@dataclass
class Subject:
    """A backend under test, with the means to make inputs and to judge results.

    Attributes
    ----------
    backend : str
        Its name; what tests pass as ``backend=``.
    op : str
        Public op name.
    dtype : torch.dtype
        Data type under test; inputs made by `randn` have it.
    device : torch.device
    loaded : Backend
        The loaded backend.
    generator : torch.Generator
        CPU generator of the inputs; its seed is in the report's header.
    max_length : int
        Longest sequence that the run allows.
    note : callable
        Takes the error and the share of the budget of every comparison.
    case : Case or None
        The ready-made case, in tests that run over all of them.
    """

    backend: str
    op: str
    dtype: torch.dtype
    device: torch.device
    loaded: Backend
    generator: torch.Generator
    max_length: int
    note: Callable[[Budget], None] = field(repr=False)
    case: Case | None = None

    @property
    def support(self) -> OpSupport:
        """Return what the backend declares for the op."""
        return self.loaded.support()[self.op]

    def reasons(
        self,
        *features: str,
        dtype: torch.dtype | None = None,
        head_dim: int = 64,
        value_dim: int | None = None,
        q_heads: int = 4,
        kv_heads: int = 2,
        gradient: bool = False,
        op: str | None = None,
    ) -> tuple[Reason, ...]:
        """Return why the backend does not declare a request; empty if it does."""
        name = op or self.op
        request = OpRequest(
            name,
            self.device.type,
            arch_of(self.device),
            dtype or self.dtype,
            head_dim,
            head_dim if value_dim is None else value_dim,
            q_heads,
            kv_heads,
            tuple(sorted(features)),
            gradient,
        )
        support = self.loaded.support().get(name)
        return reasons_against(support, request) or tuple(self.loaded.reasons(request))

    def require(self, *features: str, **request: Any) -> None:
        """Skip the test, with the backend's reasons, if it does not declare what the test needs.

        Parameters
        ----------
        *features : str
            Optional features, from `longctx.protocols.families.FEATURES`.
        **request
            As in `reasons`: ``head_dim``, ``value_dim``, ``q_heads``, ``kv_heads``, ``gradient``,
            ``dtype``, and ``op`` for a test that needs a second op.
        """
        if found := self.reasons(*features, **request):
            pytest.skip("not declared: " + "; ".join(reason.message for reason in found))

    def require_length(self, *lengths: int) -> None:
        """Skip the test if a sequence is longer than the run allows."""
        if max(lengths) > self.max_length:
            pytest.skip(f"length {max(lengths)} is over --longctx-max-length {self.max_length}")

    def require_cuda(self) -> None:
        """Skip a test that only a GPU can run."""
        if self.device.type != "cuda":
            pytest.skip("needs a GPU")

    def randn(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Return normal random numbers on the device, in the data type under test by default."""
        made = torch.randn(*shape, generator=self.generator) * scale
        return made.to(self.device, dtype or self.dtype)

    def randint(
        self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int32
    ) -> Tensor:
        """Return random integers of ``[low, high)`` on the device."""
        made = torch.randint(low, high, tuple(shape), generator=self.generator)
        return made.to(self.device, dtype)

    def qkv(
        self,
        batch: int,
        q_len: int,
        k_len: int,
        *,
        q_heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        value_dim: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return random q, k, v of ``[batch, len, heads, dim]``."""
        return (
            self.randn(batch, q_len, q_heads, head_dim),
            self.randn(batch, k_len, kv_heads, head_dim),
            self.randn(batch, k_len, kv_heads, value_dim or head_dim),
        )

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a public function on the backend, with poisoned allocations."""
        with poisoned_allocations():
            return function(*args, backend=self.backend, **kwargs)

    def check(
        self, actual: Tensor, exact: Tensor, low_precision: Tensor, name: str = "out"
    ) -> Budget:
        """Assert that a result is within its error budget, and note how much of it is used.

        Parameters
        ----------
        actual : Tensor
            The backend's result.
        exact : Tensor
            The oracle's result from the same values in fp64.
        low_precision : Tensor
            The oracle's result in the precision under test; it sets the budget.
        name : str
            What the failure message calls the result.
        """
        # some oracles widen their inputs: the output's own rounding belongs to the budget
        budget = assert_within_budget(actual, exact, low_precision.to(actual.dtype), name=name)
        self.note(budget)
        return budget

    def check_all(
        self,
        actual: Sequence[Tensor],
        exact: Sequence[Tensor],
        low_precision: Sequence[Tensor],
        names: Sequence[str] = ("out", "lse"),
    ) -> None:
        """`check` several results of one call."""
        for one, right, low, name in zip(actual, exact, low_precision, names, strict=True):
            self.check(one, right, low, name)

    def __str__(self) -> str:
        return f"{self.backend}-{dtype_name(self.dtype)}"
