"""The quick look at q, k and v says yes to nothing that the closer one refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.ops import _checks

SIZES = st.sampled_from([0, 1, 2, 4])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
DEVICES = st.sampled_from(["cpu", "meta"])


def looked_at_closely(*tensors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_checks, "_fit", lambda *_: False)
        _checks.check_attention_inputs(*tensors)


@st.composite
def tensors(draw):
    """Return a tensor that fits others of the same sizes more often than not."""
    rank = draw(st.sampled_from([3, 4, 4, 4, 4]))
    shape = [draw(SIZES) for _ in range(rank)]
    tensor = torch.zeros(shape, dtype=draw(DTYPES), device=draw(DEVICES))
    return tensor.transpose(-1, -2) if draw(st.booleans()) else tensor


@given(tensors(), tensors(), tensors())
def test_any_three_tensors(q, k, v):
    if _checks._fit(q, k, v):
        looked_at_closely(q, k, v)


@given(
    st.lists(SIZES, min_size=6, max_size=6), st.integers(0, 8), st.sampled_from(["k", "v"]),
    st.integers(0, 3),
)  # fmt: skip
def test_inputs_that_differ_in_one_thing(sizes, group, changed, axis):
    batch, q_len, k_len, kv_heads, dim, value_dim = sizes
    given = {
        "q": torch.zeros(batch, q_len, kv_heads * group, dim),
        "k": torch.zeros(batch, k_len, kv_heads, dim),
        "v": torch.zeros(batch, k_len, kv_heads, value_dim),
    }
    assert _checks._fit(*given.values()) == (kv_heads > 0)
    shape = list(given[changed].shape)
    shape[axis] += 1
    given[changed] = torch.zeros(shape)
    if _checks._fit(*given.values()):
        looked_at_closely(*given.values())


@pytest.mark.parametrize("wrong", [None, 1.0, torch.zeros(2, 3)])
def test_what_is_no_such_tensor_is_left_to_the_closer_look(wrong):
    right = torch.zeros(1, 2, 2, 8)
    assert _checks._fit(right, right, right)
    assert not _checks._fit(right, wrong, right)
    with pytest.raises((TypeError, ValueError), match="k must be"):
        _checks.check_attention_inputs(right, wrong, right)
