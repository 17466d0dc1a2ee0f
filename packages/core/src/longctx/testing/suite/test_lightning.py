"""Lightning attention: the recurrence at every length, head size, decay and layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import lightning as oracle
from longctx.testing.low_precision import CHUNKS, chunked_lightning
from longctx.testing.subject import LENGTHS, Subject

__all__ = ["TestLightningAttention", "TestLightningRefusals"]

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]

MIXED = (0.0, -0.004, -0.05, -0.7)
"""Log-decays of four heads: one forgets nothing, one little, one in 20 tokens, one in 2."""


def minimax_decay(layer: int) -> Tensor:
    """Return the log-decays of the 64 heads of a layer of MiniMax-Text-01, which has 80."""
    slopes = 2.0 ** (-torch.arange(1, 65) / 8)
    return -slopes * (1 - layer / 79 + 1e-5)


# every ninth of 64 heads: the fastest, the slowest and six between
DECAYS = {
    "minimax-0": minimax_decay(0)[::9],
    "minimax-39": minimax_decay(39)[::9],
    "minimax-78": minimax_decay(78)[::9],
    "transnormer": -8 * torch.arange(64)[::9] / 64,
    "none": torch.zeros(8),
}


def lightning_references(
    made: Triple, log_decay: Tensor, *, initial_state: Tensor | None = None, **options: Any
) -> tuple[Pair, Pair]:
    """Return the oracle's ``(out, final_state)`` in fp64, and those of the precision at test."""
    wide = None if initial_state is None else initial_state.double()
    exact = oracle.lightning_attention(
        *each(made, torch.Tensor.double), log_decay.double(), initial_state=wide, **options
    )
    cuts = [
        chunked_lightning(*made, log_decay, initial_state=initial_state, chunk=chunk, **options)
        for chunk in CHUNKS
    ]
    outs, states = zip(*cuts, strict=True)
    return exact, (farthest(exact[0], outs), farthest(exact[1], states))


def farthest(exact: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return, element by element, what is farthest from the exact result: any may be right."""
    result = others[0]
    for other in others[1:]:
        nearer = (other - exact).abs() < (result - exact).abs()
        result = torch.where(nearer, result, other)
    return result


def check_lightning(subject: Subject, got: Pair, exact: Pair, low: Pair) -> None:
    """Check outputs head by head, since heads that forget nothing dwarf the others; and states."""
    out, state = got
    assert out.dtype == subject.dtype
    assert state.dtype == torch.float32
    assert out.is_contiguous()
    assert state.is_contiguous()
    for h in range(out.shape[2]):
        subject.check(out[:, :, h], exact[0][:, :, h], low[0][:, :, h], f"out of head {h}")
    subject.check(state, exact[1], low[1], "final_state")


def run_and_check(subject: Subject, made: Triple, log_decay: Tensor, **options: Any) -> Pair:
    """Run lightning_attention on q, k, v, check it against the oracle, return its result."""
    got: Pair = subject.run(longctx.lightning_attention, *made, log_decay, **options)
    check_lightning(subject, got, *lightning_references(made, log_decay, **options))
    return got


def equal_heads(subject: Subject, batch: int, length: int, heads: int = 4, **dims: int) -> Triple:
    """Return random q, k, v with as many key as query heads."""
    return subject.qkv(batch, length, length, q_heads=heads, kv_heads=heads, **dims)


def each(made: Triple, function: Callable[[Tensor], Tensor]) -> Triple:
    """Return a function of each of q, k and v."""
    q, k, v = made
    return function(q), function(k), function(v)


def fused_views(fused: Tensor) -> Triple:
    """Return q, k, v of MiniMax's projection ``[q | k | v]`` a head: row strides of 3 D."""
    dim = fused.shape[3] // 3
    return fused[..., :dim], fused[..., dim : 2 * dim], fused[..., 2 * dim :]


def decays(subject: Subject, values: tuple[float, ...] = MIXED) -> Tensor:
    """Return log-decays on the device."""
    return torch.tensor(values, device=subject.device)


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call in a CUDA graph; return the graph and the tensors that it writes."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.longctx_op("lightning_attention")
class TestLightningAttention:
    """One call over whole sequences, from a state of zeros."""

    @pytest.mark.parametrize("length", LENGTHS)
    def test_every_length(self, subject: Subject, length: int) -> None:
        heads, batch = (4, 2) if length <= 255 else (2, 1)
        subject.require(q_heads=heads, kv_heads=heads)
        subject.require_length(length)
        made = equal_heads(subject, batch, length, heads)
        run_and_check(subject, made, decays(subject, MIXED[:heads]), scale=0.7)

    @pytest.mark.parametrize(
        ("head_dim", "value_dim"), [(64, 64), (128, 128), (64, 128), (128, 64)]
    )
    def test_head_dims(self, subject: Subject, head_dim: int, value_dim: int) -> None:
        subject.require(q_heads=4, kv_heads=4, head_dim=head_dim, value_dim=value_dim)
        subject.require_length(129)
        made = equal_heads(subject, 2, 129, head_dim=head_dim, value_dim=value_dim)
        run_and_check(subject, made, decays(subject))

    @pytest.mark.parametrize("heads", [1, 3, 6, 64])
    def test_numbers_of_heads(self, subject: Subject, heads: int) -> None:
        subject.require(q_heads=heads, kv_heads=heads)
        subject.require_length(129)
        log_decay = -torch.rand(heads, generator=subject.generator).to(subject.device)
        run_and_check(subject, equal_heads(subject, 1, 129, heads), log_decay)

    @pytest.mark.parametrize("model", DECAYS)
    def test_decays_of_real_models(self, subject: Subject, model: str) -> None:
        subject.require(q_heads=8, kv_heads=8)
        subject.require_length(255)
        made = equal_heads(subject, 1, 255, 8)
        run_and_check(subject, made, DECAYS[model].to(subject.device))

    def test_strong_decay_neither_overflows_nor_forgets_the_token_itself(
        self, subject: Subject
    ) -> None:
        subject.require(q_heads=4, kv_heads=4)
        subject.require_length(255)
        q, k, v = equal_heads(subject, 1, 255)
        strong = decays(subject, (-20.0, -90.0, -1e4, -1e30))
        _, state = run_and_check(subject, (q, k, v), strong)
        last = k[:, -1].float().unsqueeze(-1) * v[:, -1].float().unsqueeze(-2)
        subject.check(state[:, 1:], last[:, 1:].double(), last[:, 1:], "state of the last token")

    @pytest.mark.parametrize("scale", [1.0, 64**-0.5, -3.0])
    def test_scale_is_of_the_output_alone(self, subject: Subject, scale: float) -> None:
        subject.require(q_heads=4, kv_heads=4)
        subject.require_length(127)
        run_and_check(subject, equal_heads(subject, 1, 127), decays(subject), scale=scale)

    def test_views_of_a_fused_projection(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4)
        subject.require_length(129)
        fused = subject.randn(2, 129, 4, 192)
        run_and_check(subject, fused_views(fused), decays(subject))

    def test_views_of_head_major_memory(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4, value_dim=128)
        subject.require_length(129)
        wide = (subject.randn(2, 4, 200, dim) for dim in (64, 64, 128))
        q, k, v = (t[:, :, 3:132].transpose(1, 2) for t in wide)
        run_and_check(subject, (q, k, v), decays(subject))

    def test_heads_and_batch_entries_keep_apart(self, subject: Subject) -> None:
        """NaN in one head of one batch entry stays there."""
        subject.require(q_heads=4, kv_heads=4)
        subject.require_length(129)
        made = equal_heads(subject, 2, 129)
        exact, low = lightning_references(made, decays(subject), scale=0.5)
        for tensor in made:
            tensor[1, :, 2] = torch.nan
        out, state = subject.run(longctx.lightning_attention, *made, decays(subject), scale=0.5)
        assert out[1, :, 2].isnan().all()
        assert state[1, 2].isnan().all()
        for b, heads in ((0, [0, 1, 2, 3]), (1, [0, 1, 3])):
            got = out[b : b + 1, :, heads].contiguous(), state[b : b + 1, heads].contiguous()
            pairs = [(o[b : b + 1, :, heads], s[b : b + 1, heads]) for o, s in (exact, low)]
            check_lightning(subject, got, *pairs)

    def test_no_tokens_and_no_sequences(self, subject: Subject) -> None:
        subject.require(q_heads=4, kv_heads=4)
        for batch, length in ((2, 0), (0, 9)):
            out, state = subject.run(
                longctx.lightning_attention, *equal_heads(subject, batch, length), decays(subject)
            )
            assert out.shape == (batch, length, 4, 64)
            assert state.shape == (batch, 4, 64, 64)
            assert (state == 0).all()


_REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "rank": (lambda a: {"q": a["q"][0]}, ValueError, r"q must be \(batch, seq, heads, head_dim\)"),
    "length": (lambda a: {"v": a["v"][:, :2]}, ValueError, "q and v must agree in seq"),
    "heads": (lambda a: {"k": a["k"][:, :, :2]}, ValueError, "q and k must agree in heads"),
    "stride": (lambda a: {"q": a["q"].mT.contiguous().mT}, ValueError, "unit stride"),
    "decays": (lambda a: {"log_decay": a["log_decay"][:3]}, ValueError, "must agree in heads"),
    "growth": (lambda a: {"log_decay": -a["log_decay"] + 1}, ValueError, "at most 0"),
    "state": (
        lambda a: {"initial_state": a["q"].new_zeros(1, 4, 64, 64, dtype=torch.float32)},
        ValueError,
        r"\(sequences, heads, head_dim, value_dim\) = \(2, 4, 64, 64\), got \(1, 4, 64, 64\)",
    ),
    "half state": (
        lambda a: {"initial_state": a["q"].new_zeros(2, 4, 64, 64, dtype=torch.bfloat16)},
        TypeError,
        "initial_state must be float32, got bfloat16",
    ),
    "packed batch": (
        lambda a: {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32, device=a["q"].device)},
        ValueError,
        "need batch 1",
    ),
}


@pytest.mark.longctx_op("lightning_attention")
class TestLightningRefusals:
    """Bad input is named in one sentence; what is not declared is refused with its reason."""

    @pytest.mark.parametrize("name", _REFUSALS)
    def test_bad_input(self, subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        subject.require(q_heads=4, kv_heads=4)
        monkeypatch.setenv("LONGCTX_CHECK_VALUES", "1")
        change, error, words = _REFUSALS[name]
        q, k, v = equal_heads(subject, 2, 5)
        given = {"q": q, "k": k, "v": v, "log_decay": decays(subject)}
        with pytest.raises(error, match=words) as caught:
            subject.run(longctx.lightning_attention, **(given | change(given)))
        assert "\n" not in str(caught.value)

    def test_undeclared_requests_are_refused_with_their_reasons(self, subject: Subject) -> None:
        fp8 = torch.float8_e4m3fn
        reasons = subject.reasons(dtype=fp8, q_heads=4, kv_heads=4)
        if not reasons:
            pytest.skip("fp8 is declared")
        made = each(equal_heads(subject, 1, 5), lambda t: t.to(fp8))
        with pytest.raises(longctx.UnsupportedError) as caught:
            subject.run(longctx.lightning_attention, *made, decays(subject))
        assert all(reason.message in str(caught.value) for reason in reasons)
