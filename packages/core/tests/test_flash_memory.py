"""Exact attention holds no matrix of queries by keys, and does no work that a window hides."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.torch_backend import _sdpa
from longctx.torch_backend import flash as backend


def inputs(shape, dtype=torch.float32):
    """Return q, k, v of ``(batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim)``."""
    batch, q_len, k_len, q_heads, kv_heads, head_dim, value_dim = shape
    return (
        torch.randn(batch, q_len, q_heads, head_dim).to(dtype),
        torch.randn(batch, k_len, kv_heads, head_dim).to(dtype),
        torch.randn(batch, k_len, kv_heads, value_dim).to(dtype),
    )


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


class Largest(TorchDispatchMode):
    """Note the elements of the largest tensor that any operation returns in memory of its own."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return result


ARGUMENTS = {
    "causal": False,
    "window_left": None,
    "window_right": None,
    "softcap": 0.0,
    "sinks": None,
    "scale": 0.25,
    "cu_seqlens_q": None,
    "cu_seqlens_k": None,
}
NO_DESCALES = {"q_descale": None, "k_descale": None, "v_descale": None}
LONG = 2048


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "k_len": 3 * LONG},
        {"window_left": 100, "window_right": 0},
        {"window_left": 100},
        {"window_right": 50},
        {"causal": True, "softcap": 2.0},
        {"causal": True, "cu_seqlens_q": cumulative([LONG // 2, LONG // 4, LONG // 4])},
    ],
    ids=str,
)
@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_no_tensor_is_queries_by_keys(options, pass_):
    options = dict(options)
    k_len = options.pop("k_len", LONG)
    options = ARGUMENTS | options
    options["cu_seqlens_k"] = options["cu_seqlens_q"]
    heads, head_dim = 2, 16
    q, k, v = inputs((1, LONG, k_len, heads, 1, head_dim, head_dim))
    with Largest() as seen:
        out, lse = backend.flash_forward(q, k, v, **options, **NO_DESCALES)
        if pass_ == "backward":
            backend.flash_backward(out, lse, q, k, v, out, lse, **options)
    # a window's masks are of one block; nothing else is larger than a tile
    assert seen.numel <= LONG * k_len // 4


def test_windows_cost_what_they_see():
    """Work grows with the window, not with the length: count the scores of every kernel call."""
    scored = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal scored
            if "flash_attention_for_cpu" in str(func):
                scored += args[0].shape[2] * args[1].shape[2]
            return func(*args, **(kwargs or {}))

    q, k, v = inputs((1, LONG, LONG, 1, 1, 8, 8))
    with Count():
        options = ARGUMENTS | {"window_left": 127, "window_right": 0}
        backend.flash_forward(q, k, v, **options, **NO_DESCALES)
    assert LONG * 128 <= scored <= 2 * LONG * 128


def test_groups_are_not_repeated():
    """A group's KV head is read where it lies, whatever the group's size."""
    q, k, v = inputs((1, 64, 512, 16, 1, 16, 16))
    for shares in (True, False):
        with pytest.MonkeyPatch.context() as patch, Largest() as seen:
            patch.setattr(_sdpa, "_CPU_SHARES_HEADS", shares)
            backend.flash_forward(q, k, v, **ARGUMENTS, **NO_DESCALES)
        assert seen.numel <= q.numel()
