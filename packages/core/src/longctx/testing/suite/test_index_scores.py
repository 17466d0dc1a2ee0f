"""The lightning indexer's scores as a matrix: bounds, scales, fp8, and what trains it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.reference import dsa as oracle
from longctx.testing.subject import LENGTHS, Subject

__all__ = ["TestIndexScores", "TestIndexScoresFp8", "TestIndexScoresGradients"]

Triple = tuple[Tensor, Tensor, Tensor]
FP8 = torch.float8_e4m3fn
SIZES = [(1, 255), (63, 65), (65, 63), (127, 127), (129, 1000), (255, 4099)]


MOST_DIFFERENT = 5e-6
"""What DeepGEMM allows its fp8 indexer: Hopper's tensor cores sum fp8 products in 14 bits."""


def indexer_inputs(
    subject: Subject,
    batch: int,
    q_len: int,
    k_len: int,
    heads: int = 4,
    dim: int = 64,
    dtype: torch.dtype | None = None,
) -> Triple:
    """Return q, k and weights of both signs."""
    return (
        subject.randn(batch, q_len, heads, dim, dtype=dtype),
        subject.randn(batch, k_len, dim, dtype=dtype),
        subject.randn(batch, q_len, heads, dtype=torch.float32),
    )


def relative_difference(x: Tensor, y: Tensor) -> float:
    """Return ``1 - 2 x.y / (x.x + y.y)``, DeepGEMM's measure; about the squared relative error."""
    x, y = x.double().flatten(), y.double().flatten()
    return float(1 - 2 * (x @ y) / (x @ x + y @ y))


def whole_numbers(
    subject: Subject, batch: int, q_len: int, k_len: int, heads: int = 4, dim: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, k_scale and weights whose scores are exact in any order, with many ties."""
    wide = torch.float32
    return (
        subject.randint(-3, 4, (batch, q_len, heads, dim), wide).to(subject.dtype),
        subject.randint(-3, 4, (batch, k_len, dim), wide).to(subject.dtype),
        2 ** subject.randint(-2, 3, (batch, k_len), wide),
        subject.randint(-2, 3, (batch, q_len, heads), wide),
    )


def key_ranges(subject: Subject, batch: int, q_len: int, k_len: int) -> dict[str, Tensor]:
    """Return random bounds of the keys a query; the first and the last query see nothing."""
    middle = k_len // 2
    low = subject.randint(0, middle + 1, (batch, q_len))
    high = subject.randint(middle, k_len + 1, (batch, q_len))
    high[:, 0] = low[:, 0]
    high[:, -1] = low[:, -1] = k_len
    return {"key_start": low, "key_end": high.maximum(low)}


def check_scores(
    subject: Subject, q: Tensor, k: Tensor, weights: Tensor, **options: Any
) -> Tensor:
    """Run index_scores and check it against the oracle; return the scores."""
    scores: Tensor = subject.run(longctx.index_scores, q, k, weights, **options)
    assert scores.dtype == torch.float32
    exact = oracle.index_scores(q, k, weights.double(), **options)
    subject.check(scores, exact, oracle.index_scores(q, k, weights, **options), "scores")
    return scores


@pytest.mark.longctx_op("index_scores")
class TestIndexScores:
    """bf16, fp16 and fp32 inputs, summed in fp32."""

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize(("q_len", "k_len"), SIZES)
    def test_sizes(self, subject: Subject, q_len: int, k_len: int, causal: bool) -> None:
        subject.require(kv_heads=1)
        subject.require_length(q_len, k_len)
        made = indexer_inputs(subject, 2, q_len, k_len)
        scores = check_scores(subject, *made, causal=causal)
        seen = scores.isfinite().sum(-1)[0]
        last = torch.arange(k_len - q_len + 1, k_len + 1, device=subject.device)
        assert torch.equal(seen, last.clamp(min=0) if causal else torch.full_like(last, k_len))

    @pytest.mark.parametrize(("heads", "dim"), [(1, 64), (4, 128), (16, 128), (32, 64), (64, 128)])
    def test_heads_and_dims(self, subject: Subject, heads: int, dim: int) -> None:
        subject.require(q_heads=heads, kv_heads=1, head_dim=dim)
        subject.require_length(129)
        check_scores(subject, *indexer_inputs(subject, 1, 65, 129, heads, dim))

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize(("q_len", "k_len"), [(65, 129), (129, 63), (1, 1000)])
    def test_key_ranges(self, subject: Subject, q_len: int, k_len: int, causal: bool) -> None:
        subject.require("key-range", kv_heads=1)
        subject.require_length(q_len, k_len)
        made = indexer_inputs(subject, 2, q_len, k_len)
        bounds = key_ranges(subject, 2, q_len, k_len)
        check_scores(subject, *made, causal=causal, **bounds)
        for name, bound in bounds.items():
            check_scores(subject, *made, causal=causal, **{name: bound})

    def test_scales_of_the_keys(self, subject: Subject) -> None:
        """A scale a token and batch entry, over four decades."""
        subject.require(kv_heads=1)
        subject.require_length(255)
        made = indexer_inputs(subject, 3, 65, 255)
        k_scale = (2 * subject.randn(3, 255, dtype=torch.float32)).exp()
        check_scores(subject, *made, k_scale=k_scale)

    def test_relu_comes_before_the_weights(self, subject: Subject) -> None:
        """By hand: heads of products 2 and -3 with weights -1 and 5 score -2."""
        subject.require(q_heads=2, kv_heads=1)
        q = torch.zeros(1, 1, 2, 64)
        q[0, 0, 0, 3], q[0, 0, 1, 3] = 2, -3
        k = torch.zeros(1, 5, 64)
        k[0, :, 3] = torch.tensor([1.0, -1.0, 0.0, 2.0, -2.0])
        weights = torch.tensor([[[-1.0, 5.0]]])
        made = (q.to(subject.dtype), k.to(subject.dtype), weights)
        scores = subject.run(longctx.index_scores, *(t.to(subject.device) for t in made))
        assert scores.flatten().tolist() == [-2.0, 15.0, 0.0, -4.0, 30.0]

    def test_views(self, subject: Subject) -> None:
        """Head-major queries, keys and scales in a longer cache, every other row of weights."""
        subject.require(kv_heads=1)
        subject.require_length(129)
        q = subject.randn(2, 4, 65, 64).transpose(1, 2)
        cache = subject.randn(2, 200, 64)
        cache[:, 129:] = torch.nan
        scales = subject.randn(2, 200, dtype=torch.float32).abs()
        scales[:, 129:] = torch.nan
        weights = subject.randn(2, 130, 4, dtype=torch.float32)[:, ::2]
        check_scores(subject, q, cache[:, :129], weights, k_scale=scales[:, :129])

    @pytest.mark.parametrize(("q_len", "k_len"), [(3, 0), (0, 9), (1, 1)])
    def test_nothing_to_score(self, subject: Subject, q_len: int, k_len: int) -> None:
        subject.require(kv_heads=1)
        check_scores(subject, *indexer_inputs(subject, 2, q_len, k_len))

    def test_a_key_of_nan_harms_no_other(self, subject: Subject) -> None:
        subject.require(kv_heads=1)
        subject.require_length(129)
        q, k, weights = indexer_inputs(subject, 1, 65, 129)
        exact = oracle.index_scores(q, k, weights.double())
        low = oracle.index_scores(q, k, weights)
        k[:, 100] = torch.nan
        scores = subject.run(longctx.index_scores, q, k, weights)
        hidden = exact[:, :, 100] == -torch.inf
        assert (scores[:, :, 100][hidden] == -torch.inf).all()
        others = [c for c in range(129) if c != 100]
        subject.check(scores[..., others], exact[..., others], low[..., others], "scores")

    def test_bad_input(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        subject.require("key-range", kv_heads=1)
        monkeypatch.setenv("LONGCTX_CHECK_VALUES", "1")
        q, k, weights = indexer_inputs(subject, 1, 6, 9)
        beyond = torch.full((1, 6), 10, dtype=torch.int32, device=subject.device)
        changes: list[tuple[dict[str, Tensor], type[Exception], str]] = [
            ({"k": k.unsqueeze(2)}, ValueError, r"k must be \(batch, k_len, index_dim\)"),
            ({"k": k[..., :32]}, ValueError, "unit stride|must agree in index_dim"),
            ({"weights": weights[..., :3]}, ValueError, r"\(batch, q_len, index_heads\)"),
            ({"weights": weights.half()}, TypeError, "weights must be float32"),
            ({"key_end": beyond}, ValueError, "between 0 and k_len = 9"),
            ({"key_start": beyond.long()}, TypeError, "key_start must be int32"),
        ]
        for change, error, words in changes:
            with pytest.raises(error, match=words) as caught:
                subject.run(
                    longctx.index_scores, **({"q": q, "k": k, "weights": weights} | change)
                )
            assert "\n" not in str(caught.value)


@pytest.mark.longctx_op("index_scores", dtypes=("fp8_e4m3",))
class TestIndexScoresFp8:
    """Quantised queries and keys; the queries' scales are in the weights."""

    @pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
    @pytest.mark.parametrize(("q_len", "k_len"), [(63, 65), (129, 1000), (1, 4099)])
    @pytest.mark.parametrize(("heads", "dim"), [(4, 64), (64, 128)])
    def test_equals_the_dequantised_ones(
        self, subject: Subject, heads: int, dim: int, q_len: int, k_len: int, scale_format: str
    ) -> None:
        subject.require("fp8", q_heads=heads, kv_heads=1, head_dim=dim)
        subject.require_length(q_len, k_len)
        q, k, weights = indexer_inputs(subject, 2, q_len, k_len, heads, dim, torch.float32)
        # magnitudes of their own: a scale that is read in another token's place shows
        q = q * (2 * subject.randn(2, q_len, heads, 1, dtype=torch.float32)).exp()
        k = k * (2 * subject.randn(2, k_len, 1, dtype=torch.float32)).exp()
        q8, q_scale = oracle.quantize_fp8(q, scale_format=scale_format)
        k8, k_scale = oracle.quantize_fp8(k, scale_format=scale_format)
        scores = subject.run(longctx.index_scores, q8, k8, weights * q_scale, k_scale=k_scale)
        exact = oracle.index_scores(
            q8.double() * q_scale.double().unsqueeze(-1),
            k8.double() * k_scale.double().unsqueeze(-1),
            weights.double(),
        )
        seen = exact.isfinite()
        assert torch.equal(scores == -torch.inf, ~seen)
        assert torch.equal(scores.isfinite(), seen)
        difference = relative_difference(scores[seen], exact[seen])
        assert difference < MOST_DIFFERENT, f"relative difference {difference:.1e}"

    @pytest.mark.parametrize("length", LENGTHS)
    def test_whole_numbers_are_exact(self, subject: Subject, length: int) -> None:
        """Sums that even 14 bits hold, times powers of two that are each batch entry's own."""
        subject.require("fp8", kv_heads=1)
        subject.require_length(length)
        q, k, k_scale, weights = whole_numbers(subject, 3, min(length, 65), length)
        scores = subject.run(longctx.index_scores, q, k, weights, k_scale=k_scale)
        exact = oracle.index_scores(q, k, weights.double(), k_scale=k_scale)
        assert torch.equal(scores, exact.float())

    def test_scales_are_needed(self, subject: Subject) -> None:
        subject.require("fp8", kv_heads=1)
        q, k, _, weights = whole_numbers(subject, 1, 5, 9)
        with pytest.raises(ValueError, match="fp8 k needs its scales"):
            subject.run(longctx.index_scores, q, k, weights)


@pytest.mark.longctx_op("index_scores", dtypes=("bf16", "fp16", "fp32"))
class TestIndexScoresGradients:
    """The backward pass against autograd through the oracle in fp64."""

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize(
        ("q_len", "k_len"), [(1, 63), (63, 65), (129, 127), (65, 255), (255, 1000)]
    )
    def test_sizes(self, subject: Subject, q_len: int, k_len: int, causal: bool) -> None:
        subject.require(kv_heads=1, gradient=True)
        subject.require_length(q_len, k_len)
        made = _signed_inputs(subject, 2, q_len, k_len)
        _check_gradients(
            subject, made, subject.randn(2, q_len, k_len, dtype=torch.float32), causal=causal
        )

    @pytest.mark.parametrize(("heads", "dim"), [(1, 64), (16, 128), (64, 128)])
    def test_heads_and_dims(self, subject: Subject, heads: int, dim: int) -> None:
        subject.require(q_heads=heads, kv_heads=1, head_dim=dim, gradient=True)
        subject.require_length(129)
        made = _signed_inputs(subject, 1, 65, 129, heads, dim)
        _check_gradients(subject, made, subject.randn(1, 65, 129, dtype=torch.float32))

    def test_key_ranges(self, subject: Subject) -> None:
        subject.require("key-range", kv_heads=1, gradient=True)
        subject.require_length(129)
        made = _signed_inputs(subject, 2, 65, 129)
        upstream = subject.randn(2, 65, 129, dtype=torch.float32)
        _check_gradients(subject, made, upstream, **key_ranges(subject, 2, 65, 129))

    def test_training_loss(self, subject: Subject) -> None:
        """The KL loss of DSA: a softmax over what is seen, against a target."""
        subject.require(kv_heads=1, gradient=True)
        subject.require_length(129)
        made = _signed_inputs(subject, 1, 65, 129)
        target = subject.randn(1, 65, 129, dtype=torch.float32).softmax(-1)

        def loss(scores: Tensor) -> Tensor:
            log_share = (scores / 64).log_softmax(-1)
            return -(target * log_share.masked_fill(log_share == -torch.inf, 0)).sum()

        got = subject.run(_gradients, longctx.index_scores, made, loss)
        exact = _gradients(oracle.index_scores, tuple(t.double() for t in made), loss)
        low = _gradients(oracle.index_scores, tuple(t.float() for t in made), loss)
        for name, one, right, about in zip("qkw", got, exact, low, strict=True):
            subject.check(one, right, about, f"d{name}")


def _signed_inputs(
    subject: Subject, batch: int, q_len: int, k_len: int, heads: int = 4, dim: int = 64
) -> Triple:
    """Return inputs whose products are far from 0, where the gradient of relu jumps.

    Every entry is 1 or -1 times its row's magnitude, over an odd number of channels.
    """

    def signs(*shape: int) -> Tensor:
        return 2 * subject.randint(0, 2, shape, torch.float32) - 1

    q, k = signs(batch, q_len, heads, dim), signs(batch, k_len, dim)
    k[..., 0] = 0
    q = q * subject.randn(batch, q_len, heads, 1, dtype=torch.float32).abs().clamp(min=0.1)
    k = k * subject.randn(batch, k_len, 1, dtype=torch.float32).abs().clamp(min=0.1)
    weights = subject.randn(batch, q_len, heads, dtype=torch.float32)
    return q.to(subject.dtype), k.to(subject.dtype), weights


def _gradients(function: Any, made: Any, loss: Any, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in made]
    return torch.autograd.grad(loss(function(*leaves, **options)), leaves)


def _check_gradients(subject: Subject, made: Triple, upstream: Tensor, **options: Any) -> None:
    """Check the gradients; at pairs that are not seen, ``upstream`` must not count."""
    exact = _gradients(
        oracle.index_scores,
        tuple(t.double() for t in made),
        lambda scores: (scores.masked_fill(scores == -torch.inf, 0) * upstream).sum(),
        **options,
    )
    low = _gradients(
        oracle.index_scores,
        made,
        lambda scores: (scores.masked_fill(scores == -torch.inf, 0) * upstream).sum(),
        **options,
    )

    def backward(*leaves: Tensor, **options: Any) -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in leaves]
        scores = longctx.index_scores(*inputs, **options)
        return torch.autograd.grad(scores, inputs, upstream)

    got = subject.run(backward, *made, **options)
    for name, one, right, about, given in zip("qkw", got, exact, low, made, strict=True):
        assert one.dtype == given.dtype
        subject.check(one, right, about.to(one.dtype), f"d{name}")
