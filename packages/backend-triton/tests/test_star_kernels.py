"""Both phases of Star Attention against the fp64 oracle."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from longctx.reference import star as oracle
from longctx.testing.budget import assert_within_budget
from longctx_triton import star


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(6)


def tensor(device, n, heads, dim, dtype=torch.float16):
    return torch.randn(2, heads, n, dim, device=device).to(dtype).transpose(1, 2)


def agree(actual, function, tensors):
    exact = function(*tensors(torch.float64))
    low = function(*tensors(actual[0].dtype))
    assert_within_budget(actual[0], exact[0], low[0], name="out")
    assert_within_budget(actual[1], exact[1], exact[1].float(), name="lse")


@pytest.mark.parametrize(
    ("q_len", "k_len", "block", "anchor"),
    [
        (200, 200, 64, 64),
        (200, 200, 70, 33),
        (75, 211, 50, 7),
        (1, 130, 32, 32),
        (130, 130, 200, 100),
        (131, 131, 20, 0),
        (130, 130, 70, 31),  # the anchor ends a key before a tile does
        (66, 230, 100, 90),
    ],
)
def test_context_equals_oracle(device, q_len, k_len, block, anchor):
    q, k, v = (
        tensor(device, q_len, 4, 64),
        tensor(device, k_len, 2, 64),
        tensor(device, k_len, 2, 64),
    )
    actual = star.star_context_forward(q, k, v, block_size=block, anchor_size=anchor, scale=0.125)
    agree(
        actual,
        lambda q, k, v: oracle.star_context_attention(
            q, k, v, block_size=block, anchor_size=anchor, scale=0.125
        ),
        lambda dtype: (q.to(dtype), k.to(dtype), v.to(dtype)),
    )


def test_context_in_chunks_equals_the_whole(device):
    q, k, v = (tensor(device, 150, heads, 64) for heads in (4, 2, 2))
    options = {"block_size": 48, "anchor_size": 20, "scale": 0.125}
    whole = star.star_context_forward(q, k, v, **options)
    outs, lses = zip(
        *(
            star.star_context_forward(q[:, i:j], k[:, :j], v[:, :j], **options)
            for i, j in ((0, 61), (61, 62), (62, 150))
        ),
        strict=True,
    )
    torch.testing.assert_close(torch.cat(outs, 1), whole[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(torch.cat(lses, 2), whole[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "value_dim"), [(128, 128), (256, 256), (96, 64)])
def test_context_of_other_head_sizes(device, dim, value_dim):
    q, k, v = (
        tensor(device, 80, 2, dim),
        tensor(device, 80, 1, dim),
        tensor(device, 80, 1, value_dim),
    )
    actual = star.star_context_forward(q, k, v, block_size=40, anchor_size=9, scale=dim**-0.5)
    agree(
        actual,
        lambda q, k, v: oracle.star_context_attention(q, k, v, block_size=40, anchor_size=9),
        lambda dtype: (q.to(dtype), k.to(dtype), v.to(dtype)),
    )


@pytest.mark.parametrize(
    ("q_len", "lengths", "owner", "heads"),
    [
        (5, (70, 0, 131, 40), 3, (4, 2)),
        (1, (300,), 0, (8, 1)),
        (37, (150, 64, 37), 2, (4, 2)),
        (37, (150, 64, 37), 0, (4, 4)),
        (150, (170, 1, 33), 0, (8, 8)),
        (3, (3,), 0, (3, 1)),
    ],
)
def test_query_equals_oracle(device, q_len, lengths, owner, heads):
    q = tensor(device, q_len, heads[0], 64)
    shards = [
        (tensor(device, n, heads[1], 64), 3 * tensor(device, n, heads[1], 64)) for n in lengths
    ]
    actual = star.star_query_forward(
        q, [k for k, _ in shards], [v for _, v in shards], query_shard=owner, scale=0.25
    )
    agree(
        actual,
        lambda q, shards: oracle.star_query_attention(q, shards, query_shard=owner, scale=0.25),
        lambda dtype: (q.to(dtype), [(k.to(dtype), v.to(dtype)) for k, v in shards]),
    )


@pytest.mark.parametrize("heads", [(4, 2), (16, 16)])
def test_any_split_of_the_keys_and_huge_gaps_give_the_same(device, heads):
    q = tensor(device, 4, heads[0], 64)
    k, v = tensor(device, 210, heads[1], 64), tensor(device, 210, heads[1], 64)
    k[:, :100] *= 40  # log-sum-exps that differ by hundreds
    whole = star.star_query_forward(q, [k], [v], query_shard=0, scale=0.5)
    for ends in ((0, 100, 210), (0, 1, 90, 90, 210)):
        pieces = list(pairwise(ends))
        split = star.star_query_forward(
            q, [k[:, i:j] for i, j in pieces], [v[:, i:j] for i, j in pieces],
            query_shard=len(pieces) - 1, scale=0.5,
        )  # fmt: skip
        torch.testing.assert_close(split[0], whole[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(split[1], whole[1], rtol=1e-5, atol=1e-4)


def test_same_bits_every_run(device):
    q, k = tensor(device, 20, 4, 64), tensor(device, 150, 2, 64)
    runs = [
        (
            star.star_context_forward(q, k, k, block_size=40, anchor_size=9, scale=0.1),
            star.star_query_forward(q, [k, k], [k, k], query_shard=1, scale=0.1),
        )
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
