"""Checks that are not repeated for inputs like those that passed before.

A model calls an op again and again with the same shapes, and its checks take longer than the rest
of the call. What a check can see without reading values is the key of what passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any

from torch import Tensor

from longctx.settings import switched_on

__all__ = ["check_once"]

MOST_PASSED = 4096
"""Keys that are remembered; lengths that grow from call to call must not fill the memory."""

_passed: set[tuple[object, ...]] = set()
_SEQUENCE = object()
_PLAIN = frozenset({int, float, bool, str, NoneType})


def check_once(check: Callable[..., None], *args: Any) -> None:
    """Call ``check(*args)``, which raises, unless arguments like these have passed it.

    Where a check may read values (see `longctx.ops._checks.values_readable`), it is called.

    Parameters
    ----------
    check : callable
        A function of a module that looks at its arguments and at nothing else.
    *args
        The first is a tensor on the device of the others. Tensors count by what is known without
        reading them, plans by their fields.
    """
    try:
        if args[0].is_cpu:
            key = None
        else:
            found: list[object] = [check]
            _add_known(found, args)
            key = tuple(found)
            if key in _passed and not switched_on("LONGCTX_CHECK_VALUES"):
                return
    except (AttributeError, TypeError):  # not a tensor, or of symbolic shape: never remembered
        key = None
    check(*args)
    if key is not None:
        if len(_passed) >= MOST_PASSED:
            _passed.clear()
        _passed.add(key)


def _add_known(found: list[object], values: Iterable[Any]) -> None:
    """Add what a check can know of values without reading tensors.

    All in a row, which is hashed sooner than a tree: sequences begin with a mark and their length,
    plans with their type, and dtypes tell where tensors stand.
    """
    for v in values:
        kind = type(v)
        if kind in _PLAIN:  # first: isinstance() of a class with a metaclass takes longer
            found.append(v)
        elif kind is Tensor or isinstance(v, Tensor):
            found += (v.shape, v.stride(), v.dtype, v.device, v.requires_grad)
        elif kind is tuple or kind is list:
            found += (_SEQUENCE, len(v))
            _add_known(found, v)
        # a plan: a dataclass of tensors and plain values; other things have no such fields
        elif hasattr(kind, "__dataclass_fields__"):
            found.append(kind)
            _add_known(found, vars(v).values())
        elif isinstance(v, list | tuple):
            found += (_SEQUENCE, len(v))
            _add_known(found, v)
        else:
            raise TypeError(f"a {kind.__name__} is not remembered")
