"""Exact attention: lengths, heads, windows, empty rows, log-sum-exp and chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import flash as oracle
from longctx.testing.subject import LENGTHS, Subject

__all__ = ["TestFlashAttention"]

Pair = tuple[Tensor, Tensor]

_BAND_EDGES = (16, 128, 1024)
_CODE = 8.0  # entries of coded keys: exact in every dtype, as are all their products


def check_rows(
    subject: Subject, got: Sequence[Tensor], exact: Pair, low: Pair, *, least: int = 1
) -> None:
    """Check ``out [B, Sq, H, D]`` and ``lse [B, H, Sq]`` in bands of rows, each with its budget.

    The first rows of a causal result average few values and are large: alone, they would set a
    budget in which an error of the later rows, which are small, goes unseen. A last band of fewer
    than ``least`` rows joins the one before.
    """
    out, lse = got
    assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    rows = out.shape[1]
    edges = (edge for edge in _BAND_EDGES if edge + least <= rows)
    for start, stop in pairwise((0, *edges, rows)):
        band = slice(start, stop)
        subject.check(out[:, band], exact[0][:, band], low[0][:, band], f"out of rows {band}")
        subject.check(
            lse[..., band], exact[1][..., band], low[1][..., band], f"lse of rows {band}"
        )


def coarse(tensor: Tensor) -> Tensor:
    """Return an input of a low-precision reference: fp32 cut to 20 bits, others as they are.

    Fast exponentials are good to 2**-20 (vectorised, on CPUs) or 2**-22 (ex2.approx of GPUs), so
    that the oracle's own error in fp32, whose exponential is exact to the last bit, is no measure.
    """
    if tensor.dtype != torch.float32:
        return tensor
    return (tensor.contiguous().view(torch.int32) & ~7).view(torch.float32)


def coarse_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three inputs, each `coarse`."""
    return coarse(q), coarse(k), coarse(v)


def coded_keys(subject: Subject, *shape: int) -> Tensor:
    """Return keys of random signs: a query equal to one of them sees it and nothing else.

    Two keys of 64 entries or more differ so much that, with ``scale=1``, the other weights
    underflow to 0: the output is the key's value and ``lse`` the score (`check_found`).
    """
    signs = subject.randint(0, 2, shape, torch.float32)
    return ((2 * signs - 1) * _CODE).to(subject.dtype)


def check_found(
    subject: Subject, got: Sequence[Tensor], value: Tensor, score: Tensor | float
) -> None:
    """Check rows whose weight is all on one key: its value, and its score as ``lse``."""
    out, lse = got
    exact, exact_lse = value.double(), torch.zeros_like(lse, dtype=torch.float64) + score
    # fp32 knows a score to one step of its own: so much may the weight be off before it is 1
    step = torch.finfo(torch.float32).eps
    low = exact * (1 + step * float(exact_lse.abs().max()))
    subject.check(out, exact, low.to(out.dtype))
    subject.check(lse, exact_lse, exact_lse * (1 + step), "lse")


def uniform_attention(v: Tensor, begin: Tensor, end: Tensor, q_heads: int) -> Pair:
    """Return ``(out, count)`` in v's precision: all scores equal, row ``i`` sees ``[begin, end)``.

    Memory is linear in the length: a mean is a difference of cumulative sums.
    """
    sums = torch.nn.functional.pad(v.cumsum(1), (0, 0, 0, 0, 1, 0))
    begin, end = begin.clamp(0, v.shape[1]), end.clamp(0, v.shape[1])
    count = (end - begin).clamp(min=0).to(v.dtype)
    total = torch.where((count > 0).view(-1, 1, 1), sums[:, end] - sums[:, begin], 0.0)
    out = total / count.clamp(min=1).view(-1, 1, 1)
    return out.repeat_interleave(q_heads // v.shape[2], 2), count


def check_uniform(
    subject: Subject, got: Sequence[Tensor], v: Tensor, begin: Tensor, end: Tensor
) -> None:
    """Check a result whose scores are all 0: the mean of the values and their exact number."""
    out, lse = got
    exact, count = uniform_attention(v.double(), begin, end, out.shape[2])
    assert torch.equal(lse.double().exp().round(), count.expand_as(lse)), "pairs were miscounted"
    # 16 bits round more coarsely than any order of summation; the oracle's tests judge 32 bits
    if subject.dtype.itemsize == 2:
        subject.check(out, exact, exact.to(subject.dtype))


def check_flash(
    subject: Subject, q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Run flash_attention and check it against the oracle; return its result."""
    out, lse = subject.run(longctx.flash_attention_with_lse, q, k, v, **options)
    assert out.dtype == subject.dtype
    exact = oracle.flash_attention(q.double(), k.double(), v.double(), **options)
    low = oracle.flash_attention(*coarse_qkv(q, k, v), **options)
    check_rows(subject, (out, lse), exact, low)
    return out, lse


WINDOWS = [(16, 0), (0, 0), (127, None), (None, 7), (20, 3), (5, 64), (500, 500)]


@pytest.mark.longctx_op("flash_attention")
class TestFlashAttention:
    """Dense, causal and windowed attention with what may be added to the softmax."""

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_every_length(self, subject: Subject, length: int, causal: bool) -> None:
        subject.require()
        subject.require_length(length)
        if length > 1000 and not causal:
            pytest.skip("few queries cover full attention over many keys")
        heads = 4 if length <= 1000 else 1
        made = subject.qkv(1, length, length, q_heads=heads, kv_heads=max(1, heads // 2))
        check_flash(subject, *made, causal=causal)

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize(
        ("q_len", "k_len"), [(1, 255), (1, 4099), (63, 129), (129, 1000), (65, 4099), (127, 63)]
    )
    def test_queries_stand_at_the_end_of_the_keys(
        self, subject: Subject, q_len: int, k_len: int, causal: bool
    ) -> None:
        subject.require()
        subject.require_length(q_len, k_len)
        check_flash(subject, *subject.qkv(2, q_len, k_len), causal=causal)

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads"), [(1, 1), (3, 3), (4, 1), (8, 2), (8, 1), (16, 1), (32, 2), (6, 2)]
    )
    def test_grouped_heads(self, subject: Subject, q_heads: int, kv_heads: int) -> None:
        subject.require(q_heads=q_heads, kv_heads=kv_heads)
        subject.require_length(129)
        made = subject.qkv(2, 65, 129, q_heads=q_heads, kv_heads=kv_heads)
        check_flash(subject, *made, causal=True)

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize(
        ("head_dim", "value_dim"), [(64, 64), (128, 128), (256, 256), (192, 128), (96, 96)]
    )
    def test_head_dims(
        self, subject: Subject, head_dim: int, value_dim: int, causal: bool
    ) -> None:
        subject.require(head_dim=head_dim, value_dim=value_dim)
        subject.require_length(255)
        made = subject.qkv(2, 129, 255, head_dim=head_dim, value_dim=value_dim)
        check_flash(subject, *made, causal=causal)

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize(("q_len", "k_len"), [(255, 255), (33, 500), (129, 65)])
    @pytest.mark.parametrize("window", WINDOWS, ids=str)
    def test_windows(
        self,
        subject: Subject,
        window: tuple[int | None, int | None],
        q_len: int,
        k_len: int,
        causal: bool,
    ) -> None:
        subject.require("window")
        subject.require_length(q_len, k_len)
        made = subject.qkv(1, q_len, k_len)
        check_flash(subject, *made, window=window, causal=causal)

    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.5}], ids=str)
    @pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
    def test_softcap(self, subject: Subject, softcap: float, options: dict[str, Any]) -> None:
        subject.require("softcap")
        subject.require_length(129)
        q, k, v = subject.qkv(2, 65, 129)
        # scores of up to about 40: far beyond the two smaller caps
        check_flash(subject, 10 * q, k, v, softcap=softcap, **options)

    @pytest.mark.parametrize("spread", [2.0, 30.0])
    def test_sinks(self, subject: Subject, spread: float) -> None:
        subject.require("sinks", q_heads=8)
        subject.require_length(129)
        q, k, v = subject.qkv(2, 65, 129, q_heads=8)
        sinks = subject.randn(8, dtype=torch.float32, scale=spread)
        check_flash(subject, q, k, v, causal=True, sinks=sinks)

    def test_everything_at_once(self, subject: Subject) -> None:
        subject.require("window", "softcap", "sinks", q_heads=8)
        subject.require_length(1000)
        q, k, v = subject.qkv(2, 129, 1000, q_heads=8)
        check_flash(
            subject, q, k, v, causal=True, window=(130, None), softcap=3.0, scale=0.4,
            sinks=subject.randn(8, dtype=torch.float32),
        )  # fmt: skip

    @pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.2])
    def test_scale(self, subject: Subject, scale: float) -> None:
        subject.require()
        subject.require_length(129)
        check_flash(subject, *subject.qkv(1, 65, 129), causal=True, scale=scale)

    @pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
    @pytest.mark.parametrize("length", LENGTHS[3:])
    def test_lse_of_equal_scores_is_the_log_of_their_number(
        self, subject: Subject, length: int, causal: bool
    ) -> None:
        subject.require()
        subject.require_length(length)
        q, k, v = subject.qkv(1, length, length, q_heads=2, kv_heads=1)
        rows = torch.arange(length, device=subject.device)
        end = rows + 1 if causal else torch.full_like(rows, length)
        got = subject.run(
            longctx.flash_attention_with_lse, q, torch.zeros_like(k), v, causal=causal
        )
        check_uniform(subject, got, v, torch.zeros_like(rows), end)

    @pytest.mark.parametrize("window", [(300, 0), (63, 64), (None, 1), (1, None)], ids=str)
    def test_windows_hold_exactly_as_many_keys_as_they_say(
        self, subject: Subject, window: tuple[int | None, int | None]
    ) -> None:
        subject.require("window")
        subject.require_length(4099)
        q_len, k_len = 2050, 4099
        q, k, v = subject.qkv(1, q_len, k_len, q_heads=1, kv_heads=1)
        rows = torch.arange(k_len - q_len, k_len, device=subject.device)
        left, right = (k_len if side is None else side for side in window)
        got = subject.run(
            longctx.flash_attention_with_lse, torch.zeros_like(q), k, v, window=window
        )
        check_uniform(subject, got, v, rows - left, rows + right + 1)

    @pytest.mark.parametrize(("q_len", "k_len"), [(63, 63), (129, 255), (1000, 1000), (257, 4099)])
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_every_query_finds_its_own_key(
        self, subject: Subject, q_len: int, k_len: int, head_dim: int
    ) -> None:
        """Another key for every batch entry, head and row, up to the last one that it may see."""
        subject.require(q_heads=4, kv_heads=2, head_dim=head_dim)
        subject.require_length(k_len)
        k = coded_keys(subject, 2, k_len, 2, head_dim)
        v = subject.randn(2, k_len, 2, head_dim)
        last = torch.arange(k_len - q_len, k_len, device=subject.device).view(1, -1, 1)
        back = subject.randint(0, k_len, (2, q_len, 4), torch.int64)
        back[:, ::2] %= 2  # the diagonal and its neighbour in every other row
        wanted = (last - back).clamp(min=0).unsqueeze(3).expand(-1, -1, -1, head_dim)
        q = k.repeat_interleave(2, 2).gather(1, wanted)
        got = subject.run(longctx.flash_attention_with_lse, q, k, v, causal=True, scale=1.0)
        value = v.repeat_interleave(2, 2).gather(1, wanted)
        check_found(subject, got, value, head_dim * _CODE**2)

    @pytest.mark.parametrize("level", [2000.0, -2000.0])
    def test_only_differences_of_scores_matter(self, subject: Subject, level: float) -> None:
        """All scores are ``level``, whose exponential overflows or vanishes in fp32."""
        subject.require()
        subject.require_length(129)
        q, k, v = subject.qkv(1, 65, 129)
        q, k = torch.full_like(q, 5.0), torch.full_like(k, level / 320)
        got = subject.run(longctx.flash_attention_with_lse, q, k, v, causal=True, scale=1.0)
        out, lse = oracle.flash_attention(
            q.double(), k.double(), v.double(), causal=True, scale=1.0
        )
        # fp32 knows an lse of this size to one step of its own: so much may every weight be off
        step = torch.finfo(torch.float32).eps
        low = out * (1 + step * abs(level)), lse * (1 + step)
        check_rows(subject, got, (out, lse), low)

    @pytest.mark.parametrize(
        ("q_len", "k_len", "options", "empty"),
        [
            (129, 65, {"causal": True}, 64),
            (1000, 1, {"causal": True}, 999),
            (129, 65, {"window": (None, 3)}, 61),
            (255, 63, {"causal": True, "window": (4, 0)}, 192),
            (65, 0, {}, 65),
            (65, 0, {"causal": True}, 65),
        ],
        ids=str,
    )
    def test_rows_that_see_nothing_are_zero(
        self, subject: Subject, q_len: int, k_len: int, options: dict[str, Any], empty: int
    ) -> None:
        subject.require(*(("window",) if "window" in options else ()))
        subject.require_length(q_len)
        q, k, v = subject.qkv(2, q_len, k_len)
        out, lse = check_flash(subject, q, k, v, **options)
        assert (out[:, :empty] == 0).all()
        assert (lse[..., :empty] == -torch.inf).all()
        assert lse[..., empty:].isfinite().all()

    def test_rows_that_see_a_sink_alone(self, subject: Subject) -> None:
        subject.require("sinks")
        subject.require_length(129)
        sinks = subject.randn(4, dtype=torch.float32)
        q, k, v = subject.qkv(1, 129, 65)
        out, lse = check_flash(subject, q, k, v, causal=True, sinks=sinks)
        assert (out[:, :64] == 0).all()
        assert lse.isfinite().all()

    @pytest.mark.parametrize("window", [None, (30, 0)])
    def test_a_sink_of_minus_infinity_is_none(
        self, subject: Subject, window: tuple[int, int] | None
    ) -> None:
        subject.require("sinks", *(("window",) if window else ()))
        subject.require_length(129)
        sinks = subject.randn(4, dtype=torch.float32)
        sinks[1::2] = -torch.inf
        q, k, v = subject.qkv(1, 129, 65)
        out, lse = check_flash(subject, q, k, v, causal=True, window=window, sinks=sinks)
        assert (out[:, :64] == 0).all()
        assert (lse[:, 1::2, :64] == -torch.inf).all()

    @pytest.mark.parametrize(("batch", "q_len"), [(0, 5), (2, 0)])
    def test_no_queries(self, subject: Subject, batch: int, q_len: int) -> None:
        subject.require()
        out, lse = subject.run(
            longctx.flash_attention_with_lse, *subject.qkv(batch, q_len, 9), causal=True
        )
        assert out.shape == (batch, q_len, 4, 64)
        assert lse.shape == (batch, 4, q_len)

    @pytest.mark.parametrize("window", [None, (30, 0)], ids=["causal", "window"])
    @pytest.mark.parametrize(
        "cuts", [(65,), (1, 64, 128, 200), (254,), tuple(range(1, 33))], ids=len
    )
    def test_prefill_in_chunks_is_one_prefill(
        self, subject: Subject, cuts: tuple[int, ...], window: tuple[int, int] | None
    ) -> None:
        """Chunks of any size, the first tokens one by one too, make the whole."""
        subject.require(*(("window",) if window else ()))
        subject.require_length(255)
        q, k, v = subject.qkv(1, 255, 255)
        options: dict[str, Any] = {"causal": True, "window": window}
        parts = [
            subject.run(longctx.flash_attention_with_lse, q[:, a:b], k[:, :b], v[:, :b], **options)
            for a, b in pairwise((0, *cuts, 255))
        ]
        exact = oracle.flash_attention(q.double(), k.double(), v.double(), **options)
        outs, lses = zip(*parts, strict=True)
        joined = torch.cat(outs, 1), torch.cat(lses, 2)
        low = oracle.flash_attention(*coarse_qkv(q, k, v), **options)
        check_rows(subject, joined, exact, low)

    def test_same_inputs_give_the_same_bits(self, subject: Subject) -> None:
        """Few queries and many keys, where a backend may split the keys."""
        subject.require()
        subject.require_length(4099)
        if not subject.support.deterministic:
            pytest.skip("not declared: determinism")
        q, k, v = subject.qkv(1, 3, 4099)
        first = subject.run(longctx.flash_attention_with_lse, q, k, v, causal=True)
        for _ in range(20 if subject.device.type == "cuda" else 2):
            again = subject.run(longctx.flash_attention_with_lse, q, k, v, causal=True)
            assert torch.equal(first.out, again.out)
            assert torch.equal(first.lse, again.lse)
