"""Merging partial results by their log-sum-exp."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longctx
from longctx.reference import decode as oracle

INF = torch.inf
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2.5e-3,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_merge_by_hand():
    """Weights 1 and 3 over outs 4 and 8; an empty part whose out is NaN adds nothing."""
    outs = torch.tensor([4.0, math.nan, 8.0]).view(3, 1, 1, 1, 1)
    lses = torch.tensor([0.0, -INF, math.log(3)]).view(3, 1, 1, 1)
    for run in (longctx.merge_attention, oracle.merge_attention):
        out, lse = run(outs, lses)
        torch.testing.assert_close(out.item(), 7.0)
        torch.testing.assert_close(lse.item(), math.log(4))


def test_merge_of_nothing_is_nothing():
    outs, lses = torch.full((2, 1, 3, 2, 4), math.nan), torch.full((2, 1, 2, 3), -INF)
    out, lse = longctx.merge_attention(outs, lses)
    assert (out == 0).all()
    assert (lse == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 64), (20, 20, 25), (0, 65)])
def test_merged_parts_are_the_whole(dtype, sizes):
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 65, 2, 16), torch.randn(2, 65, 2, 16)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    parts = [
        longctx.flash_attention_with_lse(q, *pair)
        for pair in zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)
    ]
    out, lse = longctx.merge_attention([p.out for p in parts], [p.lse for p in parts])
    whole = longctx.flash_attention_with_lse(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out, whole.out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, whole.lse, atol=2e-4 if dtype.itemsize == 2 else 1e-5, rtol=0)


LSE = st.one_of(
    st.just(-INF), st.floats(-20, 20), st.floats(-3e4, 3e4), st.sampled_from([-150.0, 0.0, 150.0])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LSE, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_merge_properties(values, random):
    """Order does not matter, empty parts vanish, any gap is exact, and groups merge alike."""
    parts = len(values)
    outs = torch.randn(parts, 1, 1, 1, 3, generator=torch.Generator().manual_seed(parts)).double()
    lses = torch.tensor(values, dtype=torch.float64).view(parts, 1, 1, 1)
    outs = torch.where((lses == -INF).unsqueeze(-1), math.nan, outs)
    out, lse = longctx.merge_attention(outs, lses)
    assert out.isfinite().all()
    truth, truth_lse = oracle.merge_attention(outs, lses)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(lse, truth_lse)
    order = random.sample(range(parts), parts)
    for a, b in zip(longctx.merge_attention(outs[order], lses[order]), (out, lse), strict=True):
        torch.testing.assert_close(a, b)
    cut = random.randint(1, parts)
    left = longctx.merge_attention(outs[:cut], lses[:cut])
    if cut < parts:
        right = longctx.merge_attention(outs[cut:], lses[cut:])
        left = longctx.merge_attention([left.out, right.out], [left.lse, right.lse])
    torch.testing.assert_close(left.out, out)
    torch.testing.assert_close(left.lse, lse)


def test_gaps_over_a_hundred_are_exact():
    """exp(-300) is 0 in fp32: the larger part is returned to the bit, nothing overflows."""
    outs = torch.randn(2, 1, 1, 1, 4)
    for top in (-1000.0, 0.0, 1000.0):
        lses = torch.tensor([top, top - 300]).view(2, 1, 1, 1)
        out, lse = longctx.merge_attention(outs, lses)
        assert torch.equal(out, outs[0])
        assert lse.item() == top


def test_compiled_merge():
    outs, lses = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(longctx.merge_attention, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        compiled(outs.unbind(), lses.unbind()), longctx.merge_attention(outs, lses), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def tensor(shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


OUTS, LSES = tensor((2, 1, 3, 4, 8)), tensor((2, 1, 4, 3))
BAD_PARTS = [
    ([], LSES, ValueError, "outs must hold at least one part"),
    (OUTS[:0], LSES[:0], ValueError, "outs must hold at least one part"),
    (OUTS, [], ValueError, "lses must hold at least one part"),
    (OUTS[0], LSES[0], ValueError, "outs must be (parts, batch, q_len, q_heads, value_dim)"),
    (OUTS, LSES[0], ValueError, "lses must be (parts, batch, q_heads, q_len)"),
    (OUTS, LSES.transpose(2, 3).contiguous(), ValueError, "(parts, batch, q_heads, q_len)"),
    ([OUTS[0], OUTS[1, :, :2]], LSES, ValueError, "outs must share a shape"),
    ([OUTS[0], OUTS[1].half()], LSES, TypeError, "outs must share a dtype"),
    ([OUTS[0], OUTS[1].to("meta")], LSES, ValueError, "must be on one device"),
    (OUTS, LSES.to("meta"), ValueError, "outs and lses must be on one device"),
    (OUTS, LSES.half(), TypeError, "lses must be float32"),
    (OUTS.double(), LSES, TypeError, "lses must be float64"),
]


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"), BAD_PARTS, ids=[row[3] for row in BAD_PARTS]
)
def test_bad_parts_say_what_is_wrong(outs, lses, error, message):
    with pytest.raises(error) as caught:
        longctx.merge_attention(outs, lses)
    assert message in str(caught.value)
