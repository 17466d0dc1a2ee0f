"""Exact attention on tensors whose elements lie more than 2**31 apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import flash as oracle
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_flash import check_flash, check_rows, coarse_qkv

__all__ = ["TestFlashOffsets"]

_SPAN = 2**31
_ALIGNED = 128  # elements: every alignment that a kernel may hope for


def require_memory(subject: Subject, elements: int, dtype: torch.dtype) -> None:
    """Skip where twice the memory is not free on a GPU, or an interpreter would copy it."""
    if subject.device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier tests left in PyTorch's cache is free too
        if torch.cuda.mem_get_info(subject.device)[0] < 2 * elements * dtype.itemsize:
            pytest.skip(f"needs {2 * elements * dtype.itemsize / 2**30:.0f} GiB of free memory")
    else:
        # on a CPU memory that nobody touches is free, but interpreters copy whole storages
        subject.require_length(LENGTHS[-2])


def far_apart(subject: Subject, tensor: Tensor, axis: int) -> Tensor:
    """Return equal values that lie up to 2**31 elements and more apart along an axis.

    A view, so that the work stays small: only addresses need 64 bits. An offset in 32 bits reads
    other values, or memory that is not ours.
    """
    steps, rest = tensor.shape[axis] - 1, tensor.numel() // tensor.shape[axis]
    # of many entries a third lies behind the bound: one alone might weigh too little to be missed
    span = _SPAN if steps == 1 else _SPAN + _SPAN // 2
    stride = max(-(-span // steps), rest)
    stride = -(-stride // _ALIGNED) * _ALIGNED
    require_memory(subject, steps * stride + rest, tensor.dtype)
    strides: list[int] = []
    inner = 1
    for n in reversed(range(tensor.dim())):
        strides.insert(0, stride if n == axis else inner)
        inner *= 1 if n == axis else tensor.shape[n]
    try:
        storage = torch.empty(steps * stride + rest, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError:
        pytest.skip("cannot allocate more than 2**31 elements")
    view = storage.as_strided(tensor.shape, strides)
    view.copy_(tensor)
    assert sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) >= _SPAN
    return view


@pytest.mark.longctx_op("flash_attention")
class TestFlashOffsets:
    """64-bit addresses of every input and of the output."""

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "sequence", "heads"])
    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_inputs(self, subject: Subject, name: str, axis: int) -> None:
        subject.require()
        tensors = dict(zip("qkv", subject.qkv(2, 129, 255), strict=True))
        tensors[name] = far_apart(subject, tensors[name], axis)
        check_flash(subject, tensors["q"], tensors["k"], tensors["v"], causal=True)

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_packed_sequences(self, subject: Subject, name: str) -> None:
        subject.require("varlen")
        tensors = dict(zip("qkv", subject.qkv(1, 129, 129), strict=True))
        tensors[name] = far_apart(subject, tensors[name], 1)
        ends = torch.tensor([0, 60, 61, 129], dtype=torch.int32, device=subject.device)
        check_flash(
            subject, tensors["q"], tensors["k"], tensors["v"],
            causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends,
        )  # fmt: skip

    @pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "sequence", "heads"])
    @pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
    def test_gradients(self, subject: Subject, name: str, axis: int) -> None:
        subject.require(gradient=True)
        q, k, v = subject.qkv(2, 129, 129)
        tensors = {"q": q, "k": k, "v": v, "dout": subject.randn(2, 129, 4, 64)}
        tensors[name] = far_apart(subject, tensors[name], axis)
        leaves = [tensors[n].detach().requires_grad_() for n in "qkv"]
        out = subject.run(longctx.flash_attention, *leaves, causal=True)
        got = torch.autograd.grad(out, leaves, tensors["dout"])
        for dtype in (torch.float64, subject.dtype):
            inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
            out, _ = oracle.flash_attention(*inputs, causal=True)
            grads = torch.autograd.grad(out, inputs, tensors["dout"].to(dtype))
            if dtype == torch.float64:
                exact = grads
        subject.check_all(got, exact, grads, ("dq", "dk", "dv"))

    def test_outputs(self, subject: Subject) -> None:
        """An output of more than 2**31 elements; on a GPU, where writing it takes no time."""
        subject.require_cuda()
        subject.require(q_heads=8, head_dim=128)
        rows, repeats, k_len = 4099, 512, 65
        elements = rows * repeats * 8 * 128
        assert elements > _SPAN
        require_memory(subject, 2 * elements, subject.dtype)
        q, k, v = subject.qkv(1, rows, k_len, q_heads=8, kv_heads=2, head_dim=128)
        out, lse = subject.run(longctx.flash_attention_with_lse, q.repeat(1, repeats, 1, 1), k, v)
        exact = oracle.flash_attention(q.double(), k.double(), v.double())
        low = oracle.flash_attention(*coarse_qkv(q, k, v))
        for n in (0, repeats // 2, repeats - 1):
            part = slice(n * rows, (n + 1) * rows)
            got = out[:, part].contiguous(), lse[..., part].contiguous()
            check_rows(subject, got, exact, low)
