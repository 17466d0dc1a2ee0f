"""Star Attention: the context mask, the per-host recipe, exact merging over shards."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import longctx
from longctx.reference import star as reference
from longctx.reference.flash import flash_attention, flash_mask, masked_attention


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(q_len, k_len, *, batch=2, q_heads=4, kv_heads=2, dtype=torch.float64):
    return (
        random(batch, q_len, q_heads, 8, seed=1, dtype=dtype),
        random(batch, k_len, kv_heads, 8, seed=2, dtype=dtype),
        random(batch, k_len, kv_heads, 5, seed=3, dtype=dtype),
    )


def shards_of(k, v, lengths):
    return list(zip(k.split(lengths, 1), v.split(lengths, 1), strict=True))


def assert_same(got, wanted, tolerance=1e-11):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_hand_computed_mask():
    mask = reference.star_context_mask(5, 5, block_size=2, anchor_size=1)
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    q = k = torch.zeros(1, 5, 1, 2)
    v = torch.tensor([1.0, 3.0, 5.0, 9.0, 21.0]).view(1, 5, 1, 1)
    out, lse = longctx.star_context_attention_with_lse(q, k, v, block_size=2, anchor_size=1)
    assert out.flatten().tolist() == pytest.approx([1.0, 2.0, 3.0, 5.0, 11.0])
    assert lse.exp().flatten().tolist() == pytest.approx([1.0, 2.0, 2.0, 3.0, 2.0])


@pytest.mark.parametrize(
    ("q_len", "k_len", "block_size"),
    [
        (1, 1, 1),
        (7, 7, 1),
        (7, 7, 3),
        *itertools.product((64, 129), (129,), (16, 64, 65, 300)),
        *itertools.product((1, 63), (257,), (16, 64, 300)),
        (200, 255, 51),
    ],
)
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_context_equals_its_mask(q_len, k_len, block_size, share):
    q, k, v = inputs(q_len, k_len)
    sizes = {"block_size": block_size, "anchor_size": int(block_size * share)}
    got = longctx.star_context_attention_with_lse(q, k, v, **sizes, scale=0.3)
    assert_same(got, reference.star_context_attention(q, k, v, **sizes, scale=0.3))
    assert torch.equal(longctx.star_context_attention(q, k, v, **sizes, scale=0.3), got.out)


@pytest.mark.parametrize("anchor_size", [10, 32])
def test_context_equals_the_recipe_of_the_paper(anchor_size):
    # every host runs plain causal attention over the anchor and its own block, and keeps the block
    q, k, v = inputs(100, 100)
    outs = []
    for start in range(0, 100, 32):
        own = torch.arange(start, min(start + 32, 100))
        tokens = own if start == 0 else torch.cat([torch.arange(anchor_size), own])
        part = (t[:, tokens] for t in (q, k, v))
        out, _ = masked_attention(*part, flash_mask(len(tokens), len(tokens), causal=True))
        outs.append(out[:, -len(own) :])
    got = longctx.star_context_attention(q, k, v, block_size=32, anchor_size=anchor_size)
    torch.testing.assert_close(got, torch.cat(outs, 1))


def test_one_block_is_dense():
    q, k, v = inputs(77, 77)
    got = longctx.star_context_attention_with_lse(q, k, v, block_size=77, anchor_size=77)
    assert_same(got, flash_attention(q, k, v, causal=True))


@pytest.mark.parametrize("cuts", [(1,), (32, 64), (5, 40, 90)])
def test_context_in_chunks_is_one_shot(cuts):
    q, k, v = inputs(100, 100)
    whole = longctx.star_context_attention_with_lse(q, k, v, block_size=32, anchor_size=20)
    parts = [
        longctx.star_context_attention_with_lse(
            q[:, start:stop], k[:, :stop], v[:, :stop], block_size=32, anchor_size=20
        )
        for start, stop in itertools.pairwise((0, *cuts, 100))
    ]
    outs, lses = zip(*parts, strict=True)
    assert_same((torch.cat(outs, 1), torch.cat(lses, 2)), whole)


@pytest.mark.parametrize("q_len", [1, 7])
@pytest.mark.parametrize(
    ("lengths", "owner"),
    [
        ((130,), 0),
        ((65, 65), -1),
        ((65, 65), 0),
        ((0, 120, 0, 10), 3),
        ((1, 1, 64, 1, 63), 2),
        ((100, 0, 30, 0), -2),
    ],
)
def test_query_equals_one_softmax(q_len, lengths, owner):
    q, k, v = inputs(q_len, 130)
    shards = shards_of(k, v, lengths)
    got = longctx.star_query_attention_with_lse(q, shards, query_shard=owner, scale=0.3)
    wanted = reference.star_query_attention(q, shards, query_shard=owner, scale=0.3)
    assert_same(got, wanted)
    out = longctx.star_query_attention(q, shards, query_shard=owner, scale=0.3)
    assert torch.equal(out, got.out)


def test_query_over_any_split_is_dense_attention():
    # the queries' keys are the last ones, so causal attention over all keys is the whole truth
    q, k, v = inputs(6, 130)
    wanted = flash_attention(q, k, v, causal=True)
    for lengths in ((130,), (10, 120), (64, 0, 60, 6), (1,) * 124 + (6,)):
        got = longctx.star_query_attention_with_lse(q, shards_of(k, v, lengths))
        assert_same(got, wanted)


def test_order_of_the_shards_does_not_matter():
    q, k, v = inputs(4, 100)
    shards = shards_of(k, v, (40, 25, 35))
    wanted = longctx.star_query_attention_with_lse(q, shards, query_shard=2)
    for order in itertools.permutations(range(3)):
        moved = [shards[n] for n in order]
        owner = order.index(2)
        assert_same(longctx.star_query_attention_with_lse(q, moved, query_shard=owner), wanted)


def test_remote_shards_are_seen_whole():
    # the published code masks every shard causally, which hides a remote shard's last keys from
    # the first query tokens; a needle at the very end of shard 0 must reach all of them
    q = torch.ones(1, 5, 1, 4)
    k = torch.zeros(1, 40, 1, 4)
    v = torch.zeros(1, 40, 1, 1)
    k[:, 19], v[:, 19] = 100.0, 1.0
    out = longctx.star_query_attention(q, shards_of(k, v, (20, 20)))
    torch.testing.assert_close(out, torch.ones(1, 5, 1, 1))
    # the queries' own shard stays causal: its last key is the last query's alone
    k[:, 39], v[:, 39] = 200.0, 2.0
    out = longctx.star_query_attention(q, shards_of(k, v, (20, 20)))
    assert out.flatten().tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0, 2.0])


@pytest.mark.parametrize("gap", [120.0, 5000.0])
def test_far_apart_shards_merge_exactly(gap):
    # exp(gap) overflows fp32: the unshifted merge of the published code gives inf
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.0, gap, -gap]).view(1, 3, 1, 1)
    v = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    for order in itertools.permutations(range(3)):
        shards = [(k[:, n : n + 1], v[:, n : n + 1]) for n in order]
        out, lse = longctx.star_query_attention_with_lse(q, shards)
        assert out.item() == 2.0
        assert lse.item() == gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    q, k, v = inputs(150, 150, dtype=dtype)
    wide = [t.double() for t in (q, k, v)]
    sizes = {"block_size": 32, "anchor_size": 32}
    shards, wide_shards = shards_of(k, v, [15] * 10), shards_of(*wide[1:], [15] * 10)
    for got, exact in (
        (
            longctx.star_context_attention_with_lse(q, k, v, **sizes),
            reference.star_context_attention(*wide, **sizes),
        ),
        (
            longctx.star_query_attention_with_lse(q[:, :9], shards),
            reference.star_query_attention(wide[0][:, :9], wide_shards),
        ),
    ):
        assert (got.out.dtype, got.lse.dtype) == (dtype, torch.float32)
        # what rounding the exact result costs, and as much again
        rounded = (exact[0].to(dtype).double() - exact[0]).abs().max()
        assert (got.out.double() - exact[0]).abs().max() <= 2 * rounded + 1e-6
        torch.testing.assert_close(got.lse.double(), exact[1], rtol=0, atol=2e-4)


def test_views_of_a_fused_projection():
    fused = torch.randn(2, 100, 6, 16, dtype=torch.float64)
    q, k, v = fused[:, :, :4, :8], fused[:, :, 4:, :8], fused[:, :, 4:, 8:]
    out, lse = longctx.star_context_attention_with_lse(q, k, v, block_size=30, anchor_size=7)
    assert_same(
        (out, lse), reference.star_context_attention(q, k, v, block_size=30, anchor_size=7)
    )
    assert out.is_contiguous()
    assert lse.is_contiguous()
    shards = shards_of(k, v, (64, 36))
    out, lse = longctx.star_query_attention_with_lse(q[:, 90:], shards)
    assert_same((out, lse), reference.star_query_attention(q[:, 90:], shards))
    assert out.is_contiguous()
    assert lse.is_contiguous()


def test_keys_out_of_sight_may_hold_anything():
    q, k, v = inputs(10, 100)
    k[:, 20:64], v[:, 20:64] = math.nan, math.nan
    out, lse = longctx.star_context_attention_with_lse(q, k, v, block_size=64, anchor_size=20)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_pieces_of_a_small_budget_merge_exactly(monkeypatch):
    q, k, v = inputs(7, 130)
    shards = shards_of(k, v, (64, 0, 66))
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", "0.001")
    assert_same(
        longctx.star_query_attention_with_lse(q, shards),
        reference.star_query_attention(q, shards),
    )


def largest_allocation(function):
    """Return the bytes of the largest tensor that one operation allocated."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_memory_is_bounded(monkeypatch):
    q, k, v = (torch.randn(1, 2048, 1, 4) for _ in range(3))
    used = largest_allocation(
        lambda: longctx.star_context_attention(q, k, v, block_size=1024, anchor_size=1024)
    )
    # all pairs of scores would be 16 MiB, all pairs of a block 4 MiB
    assert used < 2**21
    monkeypatch.setenv("LONGCTX_CHUNK_BUDGET_MIB", "1")
    shards = shards_of(k, v, (900, 1148))
    used = largest_allocation(lambda: longctx.star_query_attention(q[:, :1000], shards))
    assert used <= 2**20


def test_nothing_to_attend_at_all():
    q, k, v = inputs(0, 0)
    out, lse = longctx.star_query_attention_with_lse(q, [(k, v), (k, v)])
    assert (out.shape, lse.shape) == ((2, 0, 4, 5), (2, 4, 0))
    out, lse = longctx.star_context_attention_with_lse(q, k, v, block_size=4, anchor_size=2)
    assert (out.shape, lse.shape) == ((2, 0, 4, 5), (2, 4, 0))


def test_registered_operators():
    q, k, v = inputs(9, 40, dtype=torch.float32)
    ops = torch.ops.longctx
    torch.library.opcheck(ops.star_context_forward.default, (q, k, v, 16, 8, 0.3, "torch"))
    keys, values = zip(*shards_of(k, v, (10, 0, 30)), strict=True)
    torch.library.opcheck(
        ops.star_query_forward.default, (q, list(keys), list(values), 2, 0.3, "torch")
    )


def test_traces_without_a_break():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def traced(q, k, v, shards):
        return (
            *longctx.star_context_attention_with_lse(q, k, v, block_size=16, anchor_size=8),
            *longctx.star_query_attention_with_lse(q, shards),
        )

    q, k, v = inputs(9, 40, dtype=torch.float32)
    shards = shards_of(k, v, (10, 30))
    wanted = (
        *longctx.star_context_attention_with_lse(q, k, v, block_size=16, anchor_size=8),
        *longctx.star_query_attention_with_lse(q, shards),
    )
    assert_same(traced(q, k, v, shards), wanted, 1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"anchor_size": -1}, ValueError, "anchor_size must be at least 0, got -1"),
        ({"anchor_size": 5}, ValueError, "anchor_size must be at most block_size"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"q": torch.zeros(1, 9, 4, 8)}, ValueError, "q_len=9, k_len=8"),
        (
            {"q": torch.zeros(8, 4, 8)},
            ValueError,
            r"q must be \(batch, q_len, q_heads, head_dim\)",
        ),
        ({"k": None}, TypeError, "k must be a Tensor"),
        ({"q": torch.zeros(1, 8, 3, 8)}, ValueError, "q_heads must be a multiple of kv_heads"),
        ({"v": torch.zeros(1, 8, 2, 5).half()}, TypeError, "share a dtype"),
        ({"k": torch.zeros(1, 8, 2, 8, device="meta")}, ValueError, "must be on one device"),
    ],
)
def test_bad_context_input(change, error, message):
    q, k, v = inputs(8, 8, batch=1, dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "block_size": 4, "anchor_size": 4}
    with pytest.raises(error, match=message) as caught:
        longctx.star_context_attention(**(arguments | change))
    assert "\n" not in str(caught.value)


GOOD = (torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 5))


@pytest.mark.parametrize(
    ("shards", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one"),
        ([GOOD], {"query_shard": 1}, ValueError, "between -1 and 0 for 1 shards, got 1"),
        ([GOOD], {"query_shard": -2}, ValueError, "between -1 and 0 for 1 shards, got -2"),
        ([GOOD], {"scale": math.inf}, ValueError, "scale must be finite"),
        ([GOOD, GOOD[0]], {}, ValueError, "shard 1 of 2 does not fit"),
        ([GOOD, (GOOD[0], GOOD[1][:, :5])], {}, ValueError, "shard 1 .* agree in k_len"),
        ([GOOD, (GOOD[0][..., :4], GOOD[1])], {}, ValueError, "shard 1 .* agree in head_dim"),
        (
            [GOOD, (GOOD[0], GOOD[1][..., :4])],
            {},
            ValueError,
            "shard 1 .*value_dim must be those of shard 0",
        ),
        ([GOOD, tuple(t[:, :, :1] for t in GOOD)], {}, ValueError, "shard 1 .* those of shard 0"),
        ([tuple(t.half() for t in GOOD)], {}, TypeError, "shard 0 of 1 .* share a dtype"),
        ([tuple(t.to("meta") for t in GOOD)], {}, ValueError, "shard 0 .* on one device"),
        (
            [GOOD, tuple(t[:, :3] for t in GOOD)],
            {},
            ValueError,
            "query_shard 1 must hold the 4 queries' own keys, it holds 3",
        ),
    ],
)
def test_bad_query_input(shards, options, error, message):
    with pytest.raises(error, match=message) as caught:
        longctx.star_query_attention(torch.zeros(1, 4, 4, 8), shards, **options)
    assert "\n" not in str(caught.value)


def test_a_gradient_is_refused():
    q, k, v = inputs(8, 8)
    q.requires_grad_()
    with pytest.raises(longctx.UnsupportedError, match="no backward pass"):
        longctx.star_context_attention(q, k, v, block_size=4, anchor_size=4)
    with pytest.raises(longctx.UnsupportedError, match="no backward pass"):
        longctx.star_query_attention(q, [(k, v)])
