"""Lightning attention: the recurrence, its chunks, decode, packing and precision."""

from __future__ import annotations

import math

import pytest
import torch

import longctx
from longctx.reference import lightning as reference
from longctx.torch_backend import lightning as backend

LENGTHS = (1, 7, 63, 64, 65, 127, 129, 255, 257, 1000)


def alibi_slopes(heads):
    """The ALiBi slopes of MiniMax-Text-01, for any number of heads."""

    def of_power(n):
        return [2 ** (-8 * (h + 1) / n) for h in range(n)]

    power = 2 ** int(math.log2(heads))
    return of_power(power) + of_power(2 * power)[::2][: heads - power]


def minimax(heads, layer, layers=80):
    return -torch.tensor(alibi_slopes(heads)) * (1 - layer / (layers - 1) + 1e-5)


def transnormer(heads, layer=0, layers=24):
    return -8 * torch.arange(heads) / heads * (1 - layer / layers)


DECAYS = {
    "minimax-0": lambda heads: minimax(heads, 0),
    "minimax-39": lambda heads: minimax(heads, 39),
    "minimax-78": lambda heads: minimax(heads, 78),
    "transnormer": transnormer,
    "none": torch.zeros,
}


def inputs(batch, length, heads, dim, value_dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, heads, d, generator=generator, dtype=torch.float64).to(dtype)
        for d in (dim, dim, value_dim)
    ]


def state(sequences, heads, dim, value_dim, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, heads, dim, value_dim, generator=generator, dtype=dtype)


def assert_same(result, expected, tolerance=1e-11):
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def relative_rms(got, wanted):
    return ((got.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()


@pytest.mark.parametrize("function", [longctx.lightning_attention, reference.lightning_attention])
def test_hand_computed(function):
    # decay 1/2, one channel: S = 1, 1/2 + 2 = 2.5, 1.25 + 3 = 4.25; out = 2 q S
    k = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    q = torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1, 1)
    v = torch.ones(1, 3, 1, 1)
    out, final = function(q, k, v, torch.tensor([0.5]).log(), scale=2.0)
    assert out.flatten().tolist() == pytest.approx([2.0, 5.0, 17.0])
    assert final.item() == pytest.approx(4.25)


@pytest.mark.parametrize("function", [longctx.lightning_attention, reference.lightning_attention])
def test_hand_computed_matrix_state(function):
    # S0 = [[1, 2], [3, 4]] halves, then gains k^T v = [[0, 0], [10, 20]]
    q = torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)
    k = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    v = torch.tensor([10.0, 20.0]).view(1, 1, 1, 2)
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    out, final = function(q, k, v, torch.tensor([0.5]).log(), initial_state=first)
    assert final.flatten().tolist() == pytest.approx([0.5, 1.0, 11.5, 22.0])
    assert out.flatten().tolist() == pytest.approx([12.0, 23.0])
    assert first.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_recurrence(length):
    q, k, v = inputs(2, length, 3, 8, 5)
    log_decay = torch.tensor([0.0, -0.02, -3.0])
    options = {"scale": 0.7, "initial_state": state(2, 3, 8, 5)}
    result = longctx.lightning_attention(q, k, v, log_decay, **options)
    assert_same(result, reference.lightning_attention(q, k, v, log_decay, **options))


@pytest.mark.parametrize("slopes", DECAYS)
@pytest.mark.parametrize("heads", [64, 6])
def test_slopes_of_real_models(slopes, heads):
    q, k, v = inputs(1, 130, heads, 4, 4)
    log_decay = DECAYS[slopes](heads).float()
    exact = reference.lightning_attention(q, k, v, log_decay)
    assert_same(longctx.lightning_attention(q, k, v, log_decay), exact)
    single = longctx.lightning_attention(q.float(), k.float(), v.float(), log_decay)
    assert single.final_state.dtype == torch.float32
    for got, wanted in zip(single, exact, strict=True):
        assert relative_rms(got, wanted) < 1e-6


def test_fast_decay_neither_overflows_nor_forgets_itself():
    q, k, v = inputs(1, 300, 3, 4, 4, torch.float32)
    log_decay = torch.tensor([-90.0, -1e4, -3e38])
    out, final = longctx.lightning_attention(q, k, v, log_decay)
    alone = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(out, alone)
    torch.testing.assert_close(final, k[:, -1].unsqueeze(-1) * v[:, -1].unsqueeze(-2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v = inputs(1, 513, 4, 16, 8, dtype)
    log_decay = minimax(4, 78).float()
    out, final = longctx.lightning_attention(q, k, v, log_decay)
    exact = reference.lightning_attention(q.double(), k.double(), v.double(), log_decay)
    assert (out.dtype, final.dtype) == (dtype, torch.float32)
    assert relative_rms(out, exact[0]) < 3e-3
    assert relative_rms(final, exact[1]) < 1e-6


def test_no_drift_over_131072_tokens():
    # the slowest head of MiniMax forgets half in 14,000 tokens; a bf16 state would be 45 % off
    generator = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.nn.functional.silu(torch.randn(1, 131072, 1, 32, generator=generator)).bfloat16()
        for _ in range(3)
    )
    log_decay = torch.tensor([-5e-5])
    out, final = longctx.lightning_attention(q, k, v, log_decay)
    exact = longctx.lightning_attention(q.double(), k.double(), v.double(), log_decay)
    assert relative_rms(out[:, -4096:], exact.out[:, -4096:]) < 3e-3
    assert relative_rms(final, exact.final_state) < 1e-5


@pytest.mark.parametrize("cuts", [(1,), (64,), (63, 65), (5, 5, 128, 200)])
def test_split_prefill_is_one_shot(cuts):
    q, k, v = inputs(2, 257, 3, 8, 5)
    log_decay = torch.tensor([0.0, -0.02, -3.0])
    whole = longctx.lightning_attention(q, k, v, log_decay)
    outs, carried = [], None
    for start, stop in zip((0, *cuts), (*cuts, 257), strict=True):
        part = (t[:, start:stop] for t in (q, k, v))
        out, carried = longctx.lightning_attention(*part, log_decay, initial_state=carried)
        outs.append(out)
    assert_same((torch.cat(outs, 1), carried), whole)


def test_decode_continues_a_prefill():
    q, k, v = inputs(2, 75, 3, 8, 5)
    log_decay = torch.tensor([0.0, -0.02, -3.0])
    whole = longctx.lightning_attention(q, k, v, log_decay, scale=0.5)
    start = (t[:, :70] for t in (q, k, v))
    out, carried = longctx.lightning_attention(*start, log_decay, scale=0.5)
    outs = [out]
    for t in range(70, 75):
        token = (x[:, t : t + 1] for x in (q, k, v))
        outs.append(longctx.lightning_decode(*token, carried, log_decay, scale=0.5))
    assert_same((torch.cat(outs, 1), carried), whole)


def test_decode_writes_into_a_slot_of_a_larger_cache():
    q, k, v = inputs(2, 1, 3, 8, 5, torch.float32)
    log_decay = -torch.rand(3)
    slots = state(4, 3, 8, 5, torch.float32)
    before = slots.clone()
    wanted, after = reference.lightning_decode(q[:, 0], k[:, 0], v[:, 0], before[1:3], log_decay)
    out = longctx.lightning_decode(q, k, v, slots[1:3], log_decay)
    assert out.is_contiguous()
    torch.testing.assert_close(out[:, 0], wanted)
    torch.testing.assert_close(slots[1:3], after)
    assert torch.equal(slots[::3], before[::3])


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_equal_separate_ones(with_state):
    lengths = (1, 0, 65, 0, 1, 130, 64, 0)
    ends = torch.tensor((0, *lengths)).cumsum(0).int()
    q, k, v = inputs(1, int(ends[-1]), 3, 8, 5)
    log_decay = torch.tensor([0.0, -0.02, -3.0])
    first = state(len(lengths), 3, 8, 5) if with_state else None
    out, final = longctx.lightning_attention(
        q, k, v, log_decay, initial_state=first, cu_seqlens=ends
    )
    for n, (start, stop) in enumerate(zip(ends.tolist(), ends.tolist()[1:], strict=False)):
        part = (t[:, start:stop] for t in (q, k, v))
        own = None if first is None else first[n : n + 1]
        alone = longctx.lightning_attention(*part, log_decay, initial_state=own)
        assert_same((out[:, start:stop], final[n : n + 1]), alone)
        if start == stop:
            assert torch.equal(final[n], torch.zeros(3, 8, 5) if own is None else own[0])


def test_head_major_views_of_a_fused_projection():
    # MiniMax: one projection, [q | k | v] a head
    fused = torch.randn(2, 130, 3, 24, dtype=torch.float64)
    q, k, v = fused.split(8, -1)
    result = longctx.lightning_attention(q, k, v, torch.tensor([0.0, -0.1, -1.0]))
    copies = (t.contiguous() for t in (q, k, v))
    assert_same(result, longctx.lightning_attention(*copies, torch.tensor([0.0, -0.1, -1.0])))
    assert result.out.is_contiguous()
    assert result.final_state.is_contiguous()


def largest_allocation(function):
    """Return the result and the bytes of the largest tensor that one operation allocated."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    return result, max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_but_the_results_grows_with_the_length(packed):
    q, k, v = torch.randn(1, 2000, 2, 72).split(24, -1)
    ends = torch.tensor([0, 700, 2000], dtype=torch.int32) if packed else None
    options = {"scale": 1.0, "initial_state": None, "cu_seqlens": ends}
    (out, _), forward = largest_allocation(
        lambda: backend.lightning_forward(q, k, v, -torch.ones(2), **options)
    )
    _, backward = largest_allocation(
        lambda: backend.lightning_backward(out, None, q, k, v, -torch.ones(2), **options)
    )
    assert forward == backward == out.nbytes


def test_empty_inputs():
    log_decay = -torch.ones(3)
    first = state(2, 3, 8, 5, torch.float32)
    out, final = longctx.lightning_attention(
        *inputs(2, 0, 3, 8, 5, torch.float32), log_decay, initial_state=first
    )
    assert out.shape == (2, 0, 3, 5)
    assert torch.equal(final, first)
    assert final.data_ptr() != first.data_ptr()
    out, final = longctx.lightning_attention(*inputs(0, 9, 3, 8, 5, torch.float32), log_decay)
    assert (out.shape, final.shape) == ((0, 9, 3, 5), (0, 3, 8, 5))
