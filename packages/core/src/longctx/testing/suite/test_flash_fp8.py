"""Exact attention of fp8 e4m3 inputs with a factor a batch entry and KV head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import flash as oracle
from longctx.testing.subject import Subject
from longctx.testing.suite.test_flash import check_found, check_rows, coded_keys

__all__ = ["TestFlashFP8"]

FP8 = torch.float8_e4m3fn
_LEAST_ROWS = 16  # how scores happen to round in bf16 makes a budget of fewer rows one of chance


def _widened(tensor: Tensor, descale: Tensor | None) -> Tensor:
    """Return the values ``[B, S, H, D]`` that fp8 numbers and factors ``[B, Hkv]`` stand for."""
    wide = tensor.double()
    if descale is None:
        return wide
    return (
        wide
        * descale.double().repeat_interleave(tensor.shape[2] // descale.shape[1], 1)[
            :, None, :, None
        ]
    )


def _low_precision(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the oracle's result with weights in e4m3, as tensor cores take them, and bf16 lse."""
    mask = oracle.flash_mask(q.shape[1], k.shape[1], device=q.device, **options)
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5
    scores = scores.bfloat16().double().masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0))
    total = weights.sum(-1, keepdim=True)
    share = weights.to(FP8).double() / total.clamp(min=1)
    return torch.einsum("bhij,bjhd->bihd", share, v), (top + total.log()).squeeze(-1)


@pytest.mark.longctx_op("flash_attention", dtypes=("fp8_e4m3",))
class TestFlashFP8:
    """fp8 queries, keys and values; the result is bf16."""

    def _check(
        self, subject: Subject, tensors: tuple[Tensor, ...], descaled: str = "qkv", **options: Any
    ) -> None:
        batch, _, kv_heads, _ = tensors[1].shape
        factors = {
            f"{name}_descale": 0.1 + 3 * torch.rand(batch, kv_heads, generator=subject.generator)
            for name in descaled
        }
        factors = {name: factor.to(subject.device) for name, factor in factors.items()}
        got = subject.run(longctx.flash_attention_with_lse, *tensors, **factors, **options)
        assert got.out.dtype == torch.bfloat16
        wide = [
            _widened(tensor, factors.get(f"{name}_descale"))
            for name, tensor in zip("qkv", tensors, strict=True)
        ]
        exact = oracle.flash_attention(*wide, **options)
        low = _low_precision(*wide, **options)
        check_rows(subject, got, exact, low, least=_LEAST_ROWS)

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize(
        ("q_len", "k_len"), [(1, 1), (63, 63), (129, 129), (65, 255), (129, 1000), (129, 65)]
    )
    def test_lengths(self, subject: Subject, q_len: int, k_len: int, causal: bool) -> None:
        subject.require("fp8")
        subject.require_length(q_len, k_len)
        self._check(subject, subject.qkv(2, q_len, k_len), causal=causal)

    @pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_heads(self, subject: Subject, q_heads: int, kv_heads: int, head_dim: int) -> None:
        subject.require("fp8", q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        subject.require_length(255)
        made = subject.qkv(2, 127, 255, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        self._check(subject, made, causal=True)

    @pytest.mark.parametrize("descaled", ["", "q", "k", "v", "kv"])
    def test_any_factor_may_be_left_out(self, subject: Subject, descaled: str) -> None:
        subject.require("fp8")
        subject.require_length(129)
        self._check(subject, subject.qkv(2, 65, 129), descaled, causal=True)

    @pytest.mark.parametrize("window", [(30, 0), (3, 64)])
    def test_windows(self, subject: Subject, window: tuple[int, int]) -> None:
        subject.require("fp8", "window")
        subject.require_length(255)
        self._check(subject, subject.qkv(1, 129, 255), window=window)

    @pytest.mark.parametrize("k_len", [65, 255])
    def test_factors_belong_to_batch_entries_and_kv_heads(
        self, subject: Subject, k_len: int
    ) -> None:
        """Powers of two and coded keys: every output is a value times its own factor."""
        subject.require("fp8", q_heads=6, kv_heads=3)
        subject.require_length(k_len)
        k, v = coded_keys(subject, 2, k_len, 3, 64), subject.randn(2, k_len, 3, 64)
        wanted = subject.randint(0, k_len, (2, 65, 6, 1), torch.int64).expand(-1, -1, -1, 64)
        every_k, every_v = (t.float().repeat_interleave(2, 2) for t in (k, v))
        q = every_k.gather(1, wanted).to(FP8)
        factors = {
            f"{name}_descale": 2.0 ** subject.randint(0, 3, (2, 3), torch.float32)
            for name in "qkv"
        }
        # no two of the value factors are equal, so that none may stand for another
        factors["v_descale"] = 2.0 ** torch.arange(-3.0, 3.0, device=subject.device).view(2, 3)
        out, lse = subject.run(longctx.flash_attention_with_lse, q, k, v, scale=1.0, **factors)
        spread = {name: factor.repeat_interleave(2, 1) for name, factor in factors.items()}
        found = (out.float() / spread["v_descale"][:, None, :, None]).to(out.dtype)
        score = 64 * 64 * spread["q_descale"] * spread["k_descale"]
        check_found(subject, (found, lse), every_v.gather(1, wanted), score.unsqueeze(2))

    def test_packed_sequences(self, subject: Subject) -> None:
        subject.require("fp8", "varlen")
        subject.require_length(199)
        made = subject.qkv(1, 199, 199)
        ends = torch.tensor([0, 63, 64, 64, 199], dtype=torch.int32, device=subject.device)
        out, lse = subject.run(
            longctx.flash_attention_with_lse, *made, causal=True, cu_seqlens_q=ends
        )
        for start, stop in ((0, 63), (63, 64), (64, 199)):
            wide = [tensor[:, start:stop].double() for tensor in made]
            got = out[:, start:stop].contiguous(), lse[..., start:stop].contiguous()
            exact = oracle.flash_attention(*wide, causal=True)
            check_rows(subject, got, exact, _low_precision(*wide, causal=True))

    def test_gradients_are_refused(self, subject: Subject) -> None:
        subject.require("fp8", "sinks")
        sinks = torch.zeros(4, device=subject.device, requires_grad=True)
        with pytest.raises(longctx.UnsupportedError, match="no gradient for fp8 inputs"):
            subject.run(longctx.flash_attention, *subject.qkv(1, 5, 5), sinks=sinks)
