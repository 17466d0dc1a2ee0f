"""Methods against mask oracles: one dense forward in which every forbidden pair is masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.errors import BackendNotFoundError
from longctx.plans import WindowPlan
from longctx.plugins import registry
from longctx.protocols.selector import SelectContext
from longctx.reference.flash import masked_attention
from longctx_models.architectures.config import ModelConfig
from longctx_models.engine import LongContextLLM
from longctx_models.methods import (
    METHODS,
    AShape,
    Dense,
    Method,
    SelectorMethod,
    Star,
    StreamingLLM,
    TokenSparse,
    make_method,
)
from longctx_models.selectors import (
    DenseFirst,
    DriftMeter,
    LayerList,
    ReuseFrom,
    SecondHalf,
    StarPlan,
    WindowSelector,
)

CONTEXT, QUERY, GENERATED = 150, 21, 25
PROMPT = CONTEXT + QUERY
TOTAL = PROMPT + GENERATED

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3-some-windows": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 24,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}

Mask = Callable[[int, Tensor, Tensor], Tensor]
"""``mask(layer, q, k)`` gives the visible pairs, broadcastable to ``[1, H, TOTAL, TOTAL]``."""


def causal(q_len: int = TOTAL) -> Tensor:
    return torch.ones(q_len, q_len, dtype=torch.bool).tril()


def plan_on_context(plan: Any, rows: int = CONTEXT) -> Mask:
    """Return a mask that a plan makes for the first rows; the others see everything."""
    mask = causal()
    mask[:rows, :rows] = plan.to_mask(rows, rows)[0, 0]
    return lambda layer, q, k: mask


def token_sparse_mask(drop: float, window: int, pool: int, least: int, layers: set[int]) -> Mask:
    """Return the paper's selection, spelled out token by token."""

    def mask(layer: int, q: Tensor, k: Tensor) -> Tensor:
        if layer not in layers:
            return causal()
        heads, group = q.shape[2], q.shape[2] // k.shape[2]
        n = PROMPT
        keys = k[0, :n].repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->hij", q[0, n - window : n], keys) * q.shape[3] ** -0.5
        scores = scores.masked_fill(~causal(n)[n - window :], -torch.inf).softmax(-1)
        mass = scores.mean(1)[:, : n - window]
        padded = torch.nn.functional.pad(mass, (pool // 2, pool // 2))
        mass = padded.unfold(1, pool, 1).mean(-1)
        shared = mass.mean(0)
        shared = (shared / shared.sum()).sort().values
        dropped, total = 0, 0.0
        while total < drop:
            total += float(shared[dropped])
            dropped += 1
        keep = max(least, n - window - dropped)
        result = causal().expand(heads, -1, -1).clone()
        for head in range(heads):
            chosen = torch.zeros(n, dtype=torch.bool)
            chosen[mass[head].sort(descending=True, stable=True).indices[:keep]] = True
            chosen[n - window :] = True
            result[head, :n, :n] &= chosen[:, None] & chosen[None, :]
        return result

    return mask


def oracle_logits(llm: LongContextLLM, ids: Sequence[int], mask: Mask) -> Tensor:
    """Return the logits after each token from the prompt's last one on."""
    config: ModelConfig = llm.config

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = config.windows[layer]
        near = None if window is None else causal() & ~causal().tril(-window - 1)
        visible = mask(layer, q, k) if near is None else near
        return masked_attention(q, k, v, visible)[0]

    with torch.inference_mode():
        x = llm.model(torch.tensor([ids]), torch.arange(TOTAL), attend)
        return llm.model.logits(x)[0, PROMPT - 1 :]


def our_logits(llm: LongContextLLM, ids: Sequence[int], method: Method) -> tuple[Tensor, Any]:
    """Read context and query by a method, feed the rest token by token."""
    prompt = llm.prompt(ids[:CONTEXT], ids[CONTEXT:PROMPT])
    assert prompt.context_tokens == CONTEXT
    run = llm._run(prompt, method, GENERATED)
    logits = [run.prefill(None)]
    logits += [run.step(token) for token in ids[PROMPT:]]
    return torch.stack(logits), run


def window_mask(window: int, sinks: int, rows: int) -> Mask:
    return plan_on_context(WindowPlan(window, sinks), rows)


CASES: dict[str, tuple[Method, Mask]] = {
    "dense": (Dense(), lambda layer, q, k: causal()),
    "a-shape": (AShape(sink_tokens=5, window=30), window_mask(30, 5, CONTEXT)),
    "a-shape-query-too": (
        AShape(sink_tokens=5, window=30, dense_query=False),
        window_mask(30, 5, PROMPT),
    ),
    "a-shape-no-sinks": (AShape(sink_tokens=0, window=0), window_mask(0, 0, CONTEXT)),
    "streaming": (StreamingLLM(sink_tokens=4, window=32), window_mask(32, 4, TOTAL)),
    "streaming-tiny": (StreamingLLM(sink_tokens=1, window=3), window_mask(3, 1, TOTAL)),
    "star-default": (Star(), plan_on_context(StarPlan(38, 38))),
    "star": (Star(block_size=40, anchor_size=16), plan_on_context(StarPlan(40, 16))),
    "star-one-block": (Star(block_size=500), plan_on_context(StarPlan(500, 500))),
    "token-sparse": (
        TokenSparse(drop_mass=0.2, window=16, pool=5, min_tokens=20),
        token_sparse_mask(0.2, 16, 5, 20, {1, 2}),
    ),
    "token-sparse-all-layers": (
        TokenSparse(0.6, window=24, pool=1, min_tokens=1, layers=LayerList((0, 2))),
        token_sparse_mask(0.6, 24, 1, 1, {0, 2}),
    ),
    "token-sparse-floor": (
        TokenSparse(0.9, window=8, pool=3, min_tokens=100),
        token_sparse_mask(0.9, 8, 3, 100, {1, 2}),
    ),
    "selector-on-one-layer": (
        SelectorMethod(WindowSelector(20, 2), LayerList((0,))),
        lambda layer, q, k: window_mask(20, 2, CONTEXT)(layer, q, k) if layer == 0 else causal(),
    ),
}


@pytest.fixture(params=MODELS)
def llm(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> LongContextLLM:
    architecture, config = MODELS[request.param]
    folder = checkpoint(architecture, max_position_embeddings=512, **config)
    return LongContextLLM.load(folder, device="cpu", dtype=torch.float32)


@pytest.fixture
def ids() -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, 97, (TOTAL,), generator=generator).tolist()


@pytest.mark.parametrize("case", CASES)
def test_method_equals_its_mask(llm: LongContextLLM, ids: list[int], case: str) -> None:
    method, mask = CASES[case]
    expected = oracle_logits(llm, ids, mask)
    dense = oracle_logits(llm, ids, lambda layer, q, k: causal())
    if case not in ("dense", "star-one-block"):
        assert (expected - dense).abs().max() > 1e-2, "the case tests nothing"
    for cache, chunk in (("contiguous", 4096), ("contiguous", 37), ("paged", 16)):
        other = LongContextLLM(llm.model, llm.kernels, cache=cache, prefill_chunk=chunk)
        actual, _ = our_logits(other, ids, method)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_density_is_that_of_the_mask(llm: LongContextLLM, ids: list[int], case: str) -> None:
    method, mask = CASES[case]
    seen: list[float] = []

    def count(layer: int, q: Tensor, k: Tensor) -> Tensor:
        visible = mask(layer, q, k)
        share = visible[..., :PROMPT, :PROMPT].double().sum((-1, -2)).mean()
        seen.append(float(share) / (PROMPT * (PROMPT + 1) / 2))
        return visible

    oracle_logits(llm, ids, count)
    full = sum(window is None for window in llm.config.windows)
    assert len(seen) == full
    expected = (sum(seen) + len(llm.config.windows) - full) / len(llm.config.windows)
    for chunk in (4096, 37):
        llm.prefill_chunk = chunk
        _, run = our_logits(llm, ids, method)
        assert run.density == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
@pytest.mark.parametrize("case", CASES)
def test_a_context_read_once_is_asked_as_if_read_anew(
    llm: LongContextLLM, ids: list[int], case: str, cache: str
) -> None:
    llm = LongContextLLM(llm.model, llm.kernels, cache=cache, prefill_chunk=64)
    method, _ = CASES[case]
    reading = llm.read(ids[:CONTEXT], method=method, room=60)
    for question in (ids[CONTEXT:PROMPT], ids[60:70], ids[CONTEXT:PROMPT]):
        whole = llm.generate(ids[:CONTEXT], query=question, method=method, max_new_tokens=12)
        again = reading.ask(question, max_new_tokens=12)
        assert again.token_ids == whole.token_ids
        assert again.stats.density == pytest.approx(whole.stats.density)
        assert again.stats.prompt_tokens == whole.stats.prompt_tokens
    if isinstance(method, TokenSparse):
        assert reading.cache is None
    else:
        assert reading.cache is not None
        assert reading.cache.logical_length() == CONTEXT
    with pytest.raises(ValueError, match="the query is empty"):
        reading.ask([])


def test_streaming_cache_stays_small(llm: LongContextLLM, ids: list[int]) -> None:
    llm.prefill_chunk = 16
    _, run = our_logits(llm, ids, StreamingLLM(sink_tokens=4, window=32))
    for layer, window in enumerate(llm.config.windows):
        held = run.cache.physical_length(layer)
        assert held == TOTAL if window is not None else 36 <= held <= 36 + 4
    assert run.cache.logical_length() == TOTAL


def test_plain_prompt_ends_in_a_query_part(llm: LongContextLLM, ids: list[int]) -> None:
    assert llm.prompt(ids).context_tokens == TOTAL - 128
    assert llm.prompt(ids[:100]).context_tokens == 0
    assert llm.prompt(ids[:100], ids[100:]).context_tokens == 100
    split = llm.prefill_logits(ids[:-128], query=ids[-128:], method=Star(block_size=20))
    torch.testing.assert_close(llm.prefill_logits(ids, method=Star(block_size=20)), split)


def test_star_plan_density_and_mask() -> None:
    plan = StarPlan(7, 3)
    for q_len, k_len in ((30, 30), (5, 30), (1, 8), (7, 7)):
        mask = plan.to_mask(q_len, k_len)[0, 0]
        pairs = causal(k_len)[-q_len:].sum()
        assert plan.density(q_len, k_len) == pytest.approx(float(mask.sum() / pairs))


def test_drift_is_measured_on_the_residual_stream(llm: LongContextLLM, ids: list[int]) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    llm.prefill_logits(ids, observe=lambda layer, a, b: seen.append((a.clone(), b.clone())))
    per_layer = [
        torch.cat([b - a for a, b in seen[layer::3]], 1).norm(dim=-1)
        / torch.cat([a for a, _ in seen[layer::3]], 1).norm(dim=-1)
        for layer in range(3)
    ]
    meter = DriftMeter()
    llm.prefill_chunk = 11
    llm.prefill_logits(ids, observe=meter)
    profile = meter.profile(share=0.7)
    assert profile.drift == pytest.approx([float(d.mean()) for d in per_layer], rel=1e-4)
    assert profile.layers == tuple(sorted(sorted(range(3), key=profile.drift.__getitem__)[:2]))


def test_reused_plans_are_those_of_the_same_call(
    checkpoint: Callable[..., Path], ids: list[int]
) -> None:
    asked: list[tuple[int, dict[int, Any]]] = []

    class Recorder:
        def select(self, context: SelectContext) -> Any:
            asked.append((context.layer, dict(context.earlier)))
            return WindowSelector(len(asked), 1).select(context)

    folder = checkpoint("llama", num_hidden_layers=4, max_position_embeddings=512)
    llm = LongContextLLM.load(folder, device="cpu", prefill_chunk=50)
    reuse = ReuseFrom(Recorder(), {3: 1})
    llm.prefill_logits(ids[:150], query=ids[150:160], method=SelectorMethod(reuse, DenseFirst(1)))
    # layers 1 and 2 are asked anew in each of the three chunks, layer 3 takes layer 1's plan
    assert [layer for layer, _ in asked] == [1, 2] * 3
    assert [sorted(earlier) for _, earlier in asked] == [[], [1]] * 3
    assert [earlier[1].window for _, earlier in asked if earlier] == [1, 3, 5]
    with pytest.raises(ValueError, match="layer 1 can only reuse an earlier layer"):
        ReuseFrom(Recorder(), {1: 1})


def test_selectors_of_plugins_are_methods() -> None:
    if "window" not in registry().selectors:
        pytest.skip("this package's entry point is not installed")
    method = make_method("window", window="9", sink_tokens="2")
    assert method == SelectorMethod(WindowSelector(9, 2), name="window")
    with pytest.raises(ValueError, match="no option 'size'"):
        make_method("window", size=3)


def test_methods_by_name() -> None:
    assert make_method("dense") == Dense()
    assert make_method("star", block_size="1024") == Star(1024)
    assert make_method("a-shape", window="none", dense_query="false") == AShape(dense_query=False)
    sparse = make_method("token-sparse", drop_mass="0.02", layers="1,4-6")
    assert sparse == TokenSparse(0.02, layers=LayerList((1, 4, 5, 6)))
    assert TokenSparse().layers == SecondHalf()
    assert make_method(Star(8)) == Star(8)
    assert all(kind().name == name for name, kind in METHODS.items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a-shap", {}, "did you mean 'a-shape'"),
        ("star", {"block": 4}, "no option 'block': did you mean 'block_size'"),
        ("star", {"block_size": 0}, "block_size must be at least 1, got 0"),
        ("star", {"block_size": 4, "anchor_size": 5}, "must not exceed"),
        ("star", {"block_size": "many"}, "block_size must be int, got 'many'"),
        ("a-shape", {"window": -1}, "window must be at least 0"),
        ("a-shape", {"dense_query": "perhaps"}, "true or false"),
        ("streaming-llm", {"sink_tokens": -2}, "sink_tokens must be at least 0"),
        ("token-sparse", {"drop_mass": 1.0}, "drop_mass must be at least 0 and below 1"),
        ("token-sparse", {"drop_mass": float("nan")}, "drop_mass"),
        ("token-sparse", {"pool": 4}, "pool must be odd"),
        ("token-sparse", {"layers": "late"}, "layers 'late' not understood"),
    ],
)
def test_bad_methods_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, BackendNotFoundError), match=message):
        make_method(name, **options)


def test_layers_beyond_the_model_are_refused(llm: LongContextLLM, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="layers 0 to 2, the list names 7"):
        llm.prefill_logits(ids, method=TokenSparse(layers=LayerList((7,))))
