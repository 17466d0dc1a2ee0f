"""Lightning kernels against the fp64 recurrence."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from longctx.reference import lightning as oracle
from longctx.testing.budget import assert_within_budget
from longctx_triton import lightning
from longctx_triton.launch.lightning_segments import Cut, cut_sequence

BF16, FP16 = torch.bfloat16, torch.float16
DECAYS = -torch.tensor([0.0, 5e-5, 0.02, 0.9])


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fill what ``torch.empty`` returns with NaN, and draw the same numbers every time."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[None, (3, 32)], ids=["whole", "segments"])
def cut(request, monkeypatch):
    """Scan sequences whole, and in up to three segments of at least 32 tokens."""
    if request.param:
        monkeypatch.setattr(lightning, "cut_sequence", lambda *_: Cut(*request.param))
    return request.param


def inputs(batch, length, heads, dim, value_dim, dtype=BF16):
    return [torch.randn(batch, length, heads, d).to(dtype) for d in (dim, dim, value_dim)]


def rounded(q, k, v, log_decay, *, scale, initial_state, cu_seqlens=None):
    """Return what tensor cores make of it: operands in q's dtype, sums in fp64.

    The state's copy and the decayed keys are rounded once a token here, once a chunk in kernels.
    """
    assert cu_seqlens is None
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float64)
    if initial_state is not None:
        state = state + initial_state
    decay = log_decay.double().exp().view(-1, 1, 1)
    rows = []
    for t in range(q.shape[1]):
        state = decay * state + k[:, t].double().unsqueeze(-1) * v[:, t].double().unsqueeze(-2)
        row = (q[:, t].double().unsqueeze(-2) @ state.to(q.dtype).double()).squeeze(-2)
        rows.append((scale * row).to(q.dtype))
    out = torch.stack(rows, 1) if rows else torch.zeros_like(v)
    return out, state.float()


def run(device, function, *tensors, **given):
    """Call a primitive on the device; return its results on the CPU, in the order returned."""

    def moved(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    result = function(*map(moved, tensors), **{name: moved(x) for name, x in given.items()})
    return [t.cpu() for t in result]


def relative_rms(got, wanted):
    return ((got.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def check(got, exact, rough):
    out, state = got
    assert out.dtype == rough[0].dtype
    assert state.dtype == torch.float32
    assert out.is_contiguous()
    assert state.is_contiguous()
    for h in range(out.shape[2]):
        assert_within_budget(out[:, :, h], exact[0][:, :, h], rough[0][:, :, h], name=f"head {h}")
    if state.numel():
        assert (state - exact[1]).abs().max() <= 2e-5 * exact[1].abs().max()


def exactly(q, k, v, log_decay, **given):
    return oracle.lightning_attention(q.double(), k.double(), v.double(), log_decay, **given)


@pytest.mark.parametrize("length", [1, 31, 64, 97])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("carried", [False, True])
def test_equals_the_recurrence(device, length, dtype, carried, cut):
    tensors = inputs(2, length, 3, 64, 32, dtype)
    state = torch.randn(2, 3, 64, 32) * 3 if carried else None
    given = {"scale": 0.7, "initial_state": state}
    got = run(device, lightning.lightning_forward, *tensors, DECAYS[1:], cu_seqlens=None, **given)
    check(got, exactly(*tensors, DECAYS[1:], **given), rounded(*tensors, DECAYS[1:], **given))


@pytest.mark.parametrize("sizes", [(128, 128), (64, 128), (128, 64), (80, 48), (256, 40)])
def test_head_sizes(device, sizes, cut):
    tensors = inputs(1, 71, 2, *sizes)
    given = {"scale": 1.0, "initial_state": torch.randn(1, 2, *sizes)}
    got = run(device, lightning.lightning_forward, *tensors, DECAYS[1:3], cu_seqlens=None, **given)
    check(got, exactly(*tensors, DECAYS[1:3], **given), rounded(*tensors, DECAYS[1:3], **given))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_without_decay_states_leave_half_precision(device, dtype, cut):
    q, k, v = inputs(1, 129, 1, 64, 64, dtype)
    given = {"scale": 2.0**-20, "initial_state": torch.randn(1, 1, 64, 64) * 1e6}
    out, state = run(
        device, lightning.lightning_forward, q, k, v, DECAYS[:1], cu_seqlens=None, **given
    )
    exact, exact_state = exactly(q, k, v, DECAYS[:1], **given)
    assert relative_rms(out, exact) < {BF16: 3e-3, FP16: 4e-4}[dtype]
    assert relative_rms(state, exact_state) < 1e-6


def test_fast_decay_neither_overflows_nor_forgets_itself(device, cut):
    q, k, v = inputs(1, 70, 3, 16, 16)
    log_decay = torch.tensor([-90.0, -1e4, -3e38])
    given = {"scale": 1.0, "initial_state": torch.ones(1, 3, 16, 16), "cu_seqlens": None}
    out, state = run(device, lightning.lightning_forward, q, k, v, log_decay, **given)
    alone = (q.double() * k.double()).sum(-1, keepdim=True) * v.double()
    torch.testing.assert_close(out.double(), alone, rtol=1e-2, atol=1e-2)
    last = k[:, -1].double().unsqueeze(-1) * v[:, -1].double().unsqueeze(-2)
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-30)
    grads = run(device, lightning.lightning_backward, out, None, q, k, v, log_decay, **given)
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("layer", [0, 39, 78])
def test_slopes_of_minimax(device, layer):
    slopes = 2 ** (-8 * torch.arange(1, 65) / 64) * (1 - layer / 79 + 1e-5)
    slopes = slopes[::9]
    q, k, v = inputs(1, 70, 8, 16, 16)
    given = {"scale": 1.0, "initial_state": None}
    got = run(device, lightning.lightning_forward, q, k, v, -slopes, cu_seqlens=None, **given)
    check(got, exactly(q, k, v, -slopes, **given), rounded(q, k, v, -slopes, **given))


PACKED = [0, 1, 1, 66, 66, 67, 140, 140]


@pytest.mark.parametrize("carried", [False, True])
def test_packed_sequences_equal_separate_ones(device, carried, cut):
    q, k, v = inputs(1, PACKED[-1], 2, 64, 32)
    state = torch.randn(7, 2, 64, 32) if carried else None
    ends = torch.tensor(PACKED, dtype=torch.int32)
    out, final = run(
        device, lightning.lightning_forward, q, k, v, DECAYS[1:3],
        scale=0.5, initial_state=state, cu_seqlens=ends,
    )  # fmt: skip
    for n, (start, stop) in enumerate(pairwise(PACKED)):
        part = [t[:, start:stop] for t in (q, k, v)]
        given = {"scale": 0.5, "initial_state": None if state is None else state[n : n + 1]}
        if start == stop:
            nothing = torch.zeros(2, 64, 32)
            assert torch.equal(final[n], nothing if state is None else state[n])
            continue
        got = out[:, start:stop].contiguous(), final[n : n + 1]
        check(got, exactly(*part, DECAYS[1:3], **given), rounded(*part, DECAYS[1:3], **given))


def test_prefill_in_chunks_then_decode_is_one_shot(device):
    q, k, v = inputs(2, 75, 3, 64, 64)
    exact = exactly(q, k, v, DECAYS[1:], scale=0.5)
    rough = rounded(q, k, v, DECAYS[1:], scale=0.5, initial_state=None)
    outs, state = [], None
    for start, stop in ((0, 5), (5, 37), (37, 70)):
        part = [t[:, start:stop].to(device) for t in (q, k, v)]
        out, state = lightning.lightning_forward(
            *part, DECAYS[1:].to(device), scale=0.5, initial_state=state, cu_seqlens=None
        )
        outs.append(out)
    for t in range(70, 75):
        token = [x[:, t : t + 1].to(device) for x in (q, k, v)]
        outs.append(
            lightning.lightning_decode_forward(*token, state, DECAYS[1:].to(device), scale=0.5)
        )
    check((torch.cat(outs, 1).cpu(), state.cpu()), exact, rough)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 80), (33, 16)])
def test_decode_writes_into_a_slot_of_a_larger_cache(device, dtype, sizes):
    q, k, v = (t.to(device) for t in inputs(2, 1, 3, *sizes, dtype))
    slots = torch.randn(4, 3, *sizes, device=device)
    before = slots.clone()
    tokens = (t[:, 0].double().cpu() for t in (q, k, v))
    wanted, after = oracle.lightning_decode(
        *tokens, before[1:3].double().cpu(), DECAYS[1:], scale=0.3
    )
    out = lightning.lightning_decode_forward(q, k, v, slots[1:3], DECAYS[1:].to(device), scale=0.3)
    assert out.shape == (2, 1, 3, sizes[1])
    assert out.dtype == dtype
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(out[:, 0].cpu().double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slots[1:3].cpu().double(), after, rtol=1e-6, atol=1e-6)
    assert torch.equal(slots[::3], before[::3])


def test_decode_of_strided_tensors(device):
    fused = torch.randn(2, 1, 3, 96, device=device).to(BF16)
    q, k, v = fused.split(32, -1)
    turned = torch.randn(3, 2, 32, 64, device=device).transpose(0, 1)[..., :32]
    again = turned.contiguous()
    arguments = (DECAYS[1:].to(device),)
    out = lightning.lightning_decode_forward(q, k, v, turned, *arguments, scale=1.0)
    copies = (t.contiguous() for t in (q, k, v))
    assert torch.equal(
        out, lightning.lightning_decode_forward(*copies, again, *arguments, scale=1.0)
    )
    assert torch.equal(turned, again)


def gradients(function, tensors, upstream, log_decay, **given):
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    carried = leaves[3] if len(leaves) > 3 else None
    results = function(*leaves[:3], log_decay, initial_state=carried, **given)
    loss = sum(
        (r * g.double()).sum() for r, g in zip(results, upstream, strict=True) if g is not None
    )
    return torch.autograd.grad(loss, leaves)


def check_gradients(got, exact, dtype):
    for name, actual, wanted in zip(("dq", "dk", "dv", "dstate"), got, exact, strict=False):
        assert actual.dtype == (torch.float32 if name == "dstate" else dtype), name
        assert actual.is_contiguous()
        heads = (1,) if name == "dstate" else (2,)
        for h in range(wanted.shape[heads[0]]):
            mine, right = (t.select(heads[0], h).double() for t in (actual, wanted))
            error = relative_rms(mine, right)
            bound = 1e-5 if name == "dstate" else {BF16: 4e-3, FP16: 6e-4}[dtype]
            assert error < bound, f"{name} of head {h}: {error:.1e}"


@pytest.mark.parametrize("length", [1, 33, 97])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("use", ["out", "both"])
def test_gradients(device, length, dtype, use, cut):
    tensors = [*inputs(2, length, 3, 64, 32, dtype), torch.randn(2, 3, 64, 32)]
    dout = torch.randn(2, length, 3, 32).to(dtype)
    dfinal = torch.randn(2, 3, 64, 32) if use == "both" else None
    exact = gradients(oracle.lightning_attention, tensors, (dout, dfinal), DECAYS[1:], scale=0.7)
    got = run(
        device, lightning.lightning_backward, dout, dfinal, *tensors[:3], DECAYS[1:],
        scale=0.7, initial_state=tensors[3], cu_seqlens=None,
    )  # fmt: skip
    check_gradients(got, exact, dtype)


@pytest.mark.parametrize("sizes", [(128, 128), (40, 80)])
def test_gradients_of_head_sizes(device, sizes):
    tensors = inputs(1, 70, 2, *sizes)
    dout = torch.randn(1, 70, 2, sizes[1]).to(BF16)
    exact = gradients(oracle.lightning_attention, tensors, (dout, None), DECAYS[1:3], scale=1.0)
    got = run(
        device, lightning.lightning_backward, dout, None, *tensors, DECAYS[1:3],
        scale=1.0, initial_state=None, cu_seqlens=None,
    )  # fmt: skip
    check_gradients(got, exact, BF16)
    assert got[3].shape == (1, 2, *sizes)


def test_gradients_of_packed_sequences(device, cut):
    ends = torch.tensor([0, 1, 66, 66, 140], dtype=torch.int32)
    tensors = [*inputs(1, 140, 2, 32, 32), torch.randn(4, 2, 32, 32)]
    dout, dfinal = torch.randn(1, 140, 2, 32).to(BF16), torch.randn(4, 2, 32, 32)
    given = {"scale": 0.5, "cu_seqlens": ends}
    exact = gradients(oracle.lightning_attention, tensors, (dout, dfinal), DECAYS[1:3], **given)
    got = run(
        device, lightning.lightning_backward, dout, dfinal, *tensors[:3], DECAYS[1:3],
        initial_state=tensors[3], **given,
    )  # fmt: skip
    check_gradients(got, exact, BF16)
    assert torch.equal(got[3][2], dfinal[2])  # no tokens: handed through


def test_head_major_views_of_a_fused_projection(device, cut):
    fused = torch.randn(2, 70, 3, 96, device=device).to(BF16)
    views = fused.split(32, -1)
    copies = [t.contiguous() for t in views]
    log_decay = DECAYS[1:].to(device)
    dout = torch.randn(1, 1, 3, 32, device=device).to(BF16).expand(2, 70, 3, 32)
    given = {"scale": 1.0, "initial_state": None, "cu_seqlens": None}
    assert torch.equal(
        lightning.lightning_forward(*views, log_decay, **given)[0],
        lightning.lightning_forward(*copies, log_decay, **given)[0],
    )
    got = lightning.lightning_backward(dout, None, *views, log_decay, **given)
    wanted = lightning.lightning_backward(dout.contiguous(), None, *copies, log_decay, **given)
    assert all(map(torch.equal, got, wanted))
    assert all(t.is_contiguous() for t in got)


def test_empty_inputs(device):
    log_decay = DECAYS[1:].to(device)
    state = torch.randn(2, 3, 16, 16, device=device)
    empty = [t.to(device) for t in inputs(2, 0, 3, 16, 16)]
    out, final = lightning.lightning_forward(
        *empty, log_decay, scale=1.0, initial_state=state, cu_seqlens=None
    )
    assert out.shape == (2, 0, 3, 16)
    assert torch.equal(final, state)
    *_, dstate = lightning.lightning_backward(
        out, state, *empty, log_decay, scale=1.0, initial_state=state, cu_seqlens=None
    )
    assert torch.equal(dstate, state)
    nothing = [t.to(device) for t in inputs(0, 9, 3, 16, 16)]
    out, final = lightning.lightning_forward(
        *nothing, log_decay, scale=1.0, initial_state=None, cu_seqlens=None
    )
    assert (out.shape, final.shape) == ((0, 9, 3, 16), (0, 3, 16, 16))


@pytest.mark.parametrize(
    ("sequences", "packed", "tiles", "tokens", "segments"),
    [
        (8, False, 64, 4096, 1),  # 8 sequences of 32 heads fill an H100
        (1, False, 128, 131_072, 1),
        (1, False, 64, 32_768, 4),
        (1, False, 16, 131_072, 16),
        (1, False, 2, 3000, 1),  # too short
        (1, False, 1, 1 << 20, 32),
        (100, True, 16, 131_072, 5),  # at most 64 programs a multiprocessor
        (5000, True, 16, 131_072, 1),
    ],
)
def test_cuts(sequences, packed, tiles, tokens, segments):
    cut = cut_sequence(sequences, packed, tiles, tokens, 132)
    assert cut.segments == segments
    if segments > 1:
        assert cut.least_chunks * segments >= tokens


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_31_bits(device, axis):
    torch.use_deterministic_algorithms(False)  # which would write to all of the memory
    shape = (3, 40, 1, 16)
    step = 2**31 // (shape[axis] - 1) // 16 * 16 + 16
    strides = (step, 16, 16, 1) if axis == 0 else (16, step, 16, 1)
    memory = torch.empty(step * (shape[axis] - 1) + 640, dtype=BF16, device=device)
    far = memory.as_strided(shape, strides).copy_(torch.randn(shape))
    near = [far.cpu().contiguous() for _ in range(3)]
    given = {"scale": 1.0, "initial_state": None}
    log_decay = DECAYS[2:3]
    got = run(
        device, lightning.lightning_forward, far, far, far, log_decay, cu_seqlens=None, **given
    )
    check(got, exactly(*near, log_decay, **given), rounded(*near, log_decay, **given))
    token = [far[:, -1:]] * 3
    state = torch.zeros(3, 1, 16, 16, device=device)
    out = lightning.lightning_decode_forward(*token, state, log_decay.to(device), scale=1.0)
    alone = near[0][:, -1].double()
    wanted = alone.square().sum(-1, keepdim=True) * alone
    torch.testing.assert_close(out[:, 0].cpu().double(), wanted, rtol=1e-2, atol=1e-2)
