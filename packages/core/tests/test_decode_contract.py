"""The public functions of decode around the backends: tracing, registration and refusals."""

from __future__ import annotations

import math

import pytest
import torch

import longctx

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    k, v = torch.randn(2, 16, 4, 2, 8)
    table = torch.randperm(16).view(2, 8).int()

    def run(q, lengths):
        return longctx.decode_attention_with_lse(
            q, k, v, cache_seqlens=lengths, page_table=table, window=(9, 0)
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for q_len in (2, 3):
        q = torch.randn(2, q_len, 4, 8)
        for ours, theirs in zip(compiled(q, int32(30, 17)), run(q, int32(30, 17)), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    q = torch.randn(2, 3, 4, 8).to(dtype)
    k, v = torch.randn(2, 6, 4, 2, 8).to(dtype)
    table = int32(5, 1, 0, 2).view(2, 2)
    torch.library.opcheck(
        torch.ops.longctx.decode_forward.default,
        (q, k, v, int32(8, 4), table, torch.randn(4), None, None, 5, 2.0, 0.3, "torch"),
    )
    torch.library.opcheck(
        torch.ops.longctx.merge_forward.default,
        (torch.randn(3, 2, 5, 4, 8).to(dtype), torch.randn(3, 2, 4, 5), "torch"),
    )


def test_gradients_are_refused():
    q, cache = torch.randn(1, 1, 2, 8, requires_grad=True), torch.randn(1, 4, 2, 8)
    with pytest.raises(longctx.UnsupportedError, match="gradient wanted"):
        longctx.decode_attention(q, cache, cache, cache_seqlens=int32(4))
    with pytest.raises(longctx.UnsupportedError, match="gradient wanted"):
        longctx.merge_attention([q, q], [torch.zeros(1, 2, 1)] * 2)
    with torch.no_grad():
        longctx.decode_attention(q, cache, cache, cache_seqlens=int32(4))


def tensor(shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = {
    "q": tensor((2, 2, 4, 8)),
    "k_cache": tensor((2, 7, 2, 8)),
    "v_cache": tensor((2, 7, 2, 8)),
    "cache_seqlens": int32(5, 7),
}
PAGED = GOOD | {
    "k_cache": tensor((6, 4, 2, 8)),
    "v_cache": tensor((6, 4, 2, 8)),
    "page_table": int32(5, 0, 1, 2).view(2, 2),
}
FP8_CACHE = {name: tensor((2, 7, 2, 8), FP8) for name in ("k_cache", "v_cache")}
BAD = [
    (GOOD, {"q": 3}, TypeError, "q must be a Tensor"),
    (GOOD, {"q": tensor((2, 4, 8))}, ValueError, "q must be (batch, q_len, q_heads, head_dim)"),
    (GOOD, {"k_cache": tensor((2, 7, 8))}, ValueError, "k_cache must be (batch, capacity, kv_"),
    (PAGED, {"v_cache": tensor((6, 4, 8))}, ValueError, "v_cache must be (pages, page_size, kv_"),
    (GOOD, {"v_cache": tensor((2, 8, 2, 8))}, ValueError, "agree in batch, capacity, got (2, 7)"),
    (GOOD, {"v_cache": tensor((2, 7, 4, 8))}, ValueError, "must agree in kv_heads, got 2 and 4"),
    (GOOD, {"q": tensor((2, 2, 4, 16))}, ValueError, "must agree in head_dim, got 16 and 8"),
    (GOOD, {"q": tensor((2, 2, 3, 8))}, ValueError, "q_heads must be a multiple of kv_heads"),
    (GOOD, {"q": tensor((2, 0, 4, 8))}, ValueError, "q_len must be 1 to 16 in decode, got 0"),
    (GOOD, {"q": tensor((2, 17, 4, 8))}, ValueError, "q_len must be 1 to 16 in decode, got 17"),
    (GOOD, {"q": tensor((3, 2, 4, 8))}, ValueError, "q and cache_seqlens must agree in batch"),
    (
        GOOD,
        {"q": tensor((3, 2, 4, 8)), "cache_seqlens": int32(2, 2, 2)},
        ValueError,
        "q and k_cache must agree in batch, got 3 and 2",
    ),
    (
        GOOD,
        {"k_cache": tensor((2, 7, 2, 8), torch.half)},
        TypeError,
        "k_cache must be fp8 e4m3",
    ),
    (GOOD, {"v_cache": tensor((2, 7, 2, 8), torch.half)}, TypeError, "v_cache must be float32"),
    (GOOD | FP8_CACHE, {"q": tensor((2, 2, 4, 8), FP8)}, TypeError, "q must not be fp8"),
    (GOOD, {"v_cache": tensor((2, 7, 2, 8), device="meta")}, ValueError, "must be on one device"),
    (
        GOOD,
        {"cache_seqlens": int32(5, 7).to("meta")},
        ValueError,
        "cache_seqlens must be on one",
    ),
    (GOOD, {"cache_seqlens": torch.tensor([5, 7])}, TypeError, "cache_seqlens must be int32"),
    (GOOD, {"cache_seqlens": int32(5, 7).view(2, 1)}, ValueError, "cache_seqlens must be (batch)"),
    (GOOD, {"cache_seqlens": int32(5, 8)}, ValueError, "must fit the cache's 7 slots a sequence"),
    (GOOD, {"cache_seqlens": int32(1, 7)}, ValueError, "must count the 2 query tokens too, got 1"),
    (
        GOOD,
        {"cache_seqlens": int32(-1, 7)},
        ValueError,
        "the 2 query tokens too, got -1",
    ),
    (PAGED, {"cache_seqlens": int32(5, 9)}, ValueError, "must fit the cache's 8 slots a sequence"),
    (PAGED, {"page_table": int32(0, 1)}, ValueError, "page_table must be (batch, max_pages)"),
    (PAGED, {"page_table": torch.zeros(2, 2)}, TypeError, "page_table must be int32"),
    (PAGED, {"page_table": int32(0, 1).view(1, 2)}, ValueError, "q and page_table must agree in"),
    (PAGED, {"page_table": int32(0, 6, 1, 2).view(2, 2)}, ValueError, "must name pages 0 to 5"),
    (PAGED, {"page_table": int32(0, -1, 1, 2).view(2, 2)}, ValueError, "must name pages 0 to 5"),
    (GOOD, {"window": (3, 1)}, ValueError, "window right must be None or 0 in decode"),
    (GOOD, {"window": (-1, 0)}, ValueError, "window left must be at least 0"),
    (GOOD, {"softcap": -2.0}, ValueError, "softcap must be finite and at least 0"),
    (GOOD, {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    (GOOD, {"sinks": tensor((2,))}, ValueError, "q and sinks must agree in q_heads"),
    (GOOD, {"k_scale": tensor((2, 2))}, TypeError, "k_scale is for an fp8 e4m3 cache"),
    (GOOD | FP8_CACHE, {"v_scale": tensor((2, 4))}, ValueError, "v_scale and (batch, kv_heads)"),
    (GOOD | FP8_CACHE, {"k_scale": tensor((2,))}, ValueError, "k_scale must be (batch, kv_heads)"),
    (
        GOOD | FP8_CACHE,
        {"k_scale": tensor((2, 2), torch.half)},
        TypeError,
        "k_scale must be float",
    ),
]


@pytest.mark.parametrize(("base", "change", "error", "message"), BAD, ids=[row[3] for row in BAD])
def test_bad_inputs_say_what_is_wrong(base, change, error, message):
    with pytest.raises(error) as caught:
        longctx.decode_attention(**(base | change))
    assert message in str(caught.value)


def test_page_numbers_past_the_length_are_not_read():
    table = int32(5, 99, 1, -3).view(2, 2)
    longctx.decode_attention(**(PAGED | {"page_table": table, "cache_seqlens": int32(4, 3)}))
