"""Uninitialised memory that shows: what `torch.empty` returns is NaN, or absurd integers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["poisoned_allocations"]

_INTEGER = -(2**30) - 7
"""Out of range as an index, a count or a length."""


def _fill(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point:
        if tensor.element_size() == 1:
            tensor.view(torch.uint8).fill_(0x7F)  # NaN in e4m3 and e5m2
        else:
            tensor.fill_(float("nan"))
    elif tensor.dtype in (torch.int32, torch.int64):
        tensor.fill_(_INTEGER)
    elif tensor.dtype in (torch.int8, torch.uint8, torch.int16):
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return _fill(allocate(*args, **kwargs))

    return wrapper


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill what PyTorch's uninitialised allocations return while the block runs.

    Floating tensors are filled with NaN, integer ones with a value that is no valid index, so
    that a kernel that reads what it never wrote gives a wrong result every time. Covers
    ``torch.empty``, ``empty_like``, ``empty_strided``, ``Tensor.new_empty`` and
    ``Tensor.new_empty_strided`` called from Python.

    Examples
    --------
    >>> import torch
    >>> from longctx.testing.poison import poisoned_allocations
    >>> with poisoned_allocations():
    ...     bool(torch.empty(3).isnan().all())
    True
    """
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            stack.enter_context(mock.patch.object(owner, name, _poisoned(getattr(owner, name))))
        yield
