"""What a backend implements: the primitives of the seven attention families.

Primitives are plain functions of tensors. They know neither autograd nor ``torch.library``: core
registers each family once (schema, fake, gradient) and hands the tensors over. Shapes are named
``B`` batch, ``Sq``/``Sk`` query/key length, ``Hq``/``Hkv`` query/KV heads (``Hq % Hkv == 0``),
``D`` head size, ``Dv`` value head size, ``N`` packed sequences. All of these hold for every
primitive:

- any strides with a unit last stride come in; outputs are freshly allocated and contiguous;
- ``lse`` is fp32 (fp64 for fp64 inputs), natural log, ``[B, Hq, Sq]``; an empty row gives out 0
  and lse -inf;
- causality and windows are aligned bottom-right: query ``i`` stands at ``i + Sk - Sq``;
- ``sinks`` ``[Hq]`` fp32 are learned logits in the softmax denominator alone (and ``lse``);
- arguments were checked by core: a primitive may trust ranks, sizes and dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = [
    "AttentionOutput",
    "BlockSparseAttention",
    "DecodeAttention",
    "FlashAttention",
    "LightningAttention",
    "LightningOutput",
    "SparseIndexer",
    "StarAttention",
    "TokenSparseAttention",
]


class AttentionOutput(NamedTuple):
    """Result of an attention op that also returns its softmax statistics.

    Attributes
    ----------
    out : Tensor, (batch, q_len, q_heads, value_dim)
    lse : Tensor, (batch, q_heads, q_len), float32
        Natural-log log-sum-exp of the scaled scores; -inf for an empty row.
    """

    out: Tensor
    lse: Tensor


class LightningOutput(NamedTuple):
    """Result of `longctx.lightning_attention`.

    Attributes
    ----------
    out : Tensor, (batch, seq, heads, value_dim)
    final_state : Tensor, (sequences, heads, head_dim, value_dim), float32
        The decayed state as of after each sequence's last token.
    """

    out: Tensor
    final_state: Tensor


class FlashAttention(Protocol):
    """Exact softmax attention (FlashAttention-2 tiling, arXiv 2307.08691)."""

    def flash_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window_left: int | None,
        window_right: int | None,
        softcap: float,
        sinks: Tensor | None,
        scale: float,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        q_descale: Tensor | None,
        k_descale: Tensor | None,
        v_descale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out [B, Sq, Hq, Dv], lse [B, Hq, Sq])``.

        ``window_left``/``window_right`` are inclusive, None is unlimited; ``softcap`` 0 is off
        (``c * tanh(s / c)`` on the scaled score otherwise). With ``cu_seqlens_*`` (int32
        ``[N+1]``) the batch is 1 and sequences are packed. ``*_descale`` fp32 ``[B, Hkv]``
        (at least 0) multiply fp8 inputs; the output of fp8 inputs is bfloat16.
        """
        ...

    def flash_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        window_left: int | None,
        window_right: int | None,
        softcap: float,
        sinks: Tensor | None,
        scale: float,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return ``(dq, dk, dv, dsinks)``; ``dsinks`` is None when ``sinks`` is.

        ``dout`` comes with a unit last stride; ``dlse`` is contiguous, or None when nobody used
        ``lse``.
        """
        ...


class DecodeAttention(Protocol):
    """Attention of 1 to 16 query tokens over a KV cache, and the merge of partial results."""

    def decode_forward(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor | None,
        window_left: int | None,
        softcap: float,
        sinks: Tensor | None,
        scale: float,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out [B, Sq, Hq, Dv], lse [B, Hq, Sq])``.

        Caches are ``[B, Smax, Hkv, D]``, or paged ``[pages, page_size, Hkv, D]`` with
        ``page_table`` int32 ``[B, max_pages]``. ``cache_seqlens`` int32 ``[B]`` counts the keys of
        each sequence, those of the query tokens included; query ``i`` stands at ``cache_seqlens -
        Sq + i`` and sees nothing behind itself. ``k_scale``/``v_scale`` fp32 ``[B, Hkv]`` multiply
        an fp8 cache.
        """
        ...

    def merge_forward(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        """Merge partial results ``[S, B, Sq, Hq, D]``, ``[S, B, Hq, Sq]`` over their first axis.

        ``lse = logsumexp_s lse_s``, ``out = sum_s exp(lse_s - lse) out_s``, shifted by the
        maximum; a partial result with lse -inf contributes nothing whatever its ``out`` holds.
        """
        ...


class LightningAttention(Protocol):
    """Linear attention with a fixed decay a head (Lightning Attention-2, arXiv 2401.04658).

    ``S_t = exp(log_decay) S_{t-1} + k_t^T v_t`` and ``o_t = scale q_t S_t``, the state in fp32.
    """

    def lightning_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        *,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out [B, S, H, Dv], final_state [N, H, D, Dv])``; ``N = B`` unless packed."""
        ...

    def lightning_backward(
        self,
        dout: Tensor,
        dfinal_state: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        *,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``(dq, dk, dv, dinitial_state)``; decays are constants and get no gradient."""
        ...

    def lightning_decode_forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, *, scale: float
    ) -> Tensor:
        """Return ``out [B, 1, H, Dv]``, updating ``state [B, H, D, Dv]`` fp32 in place."""
        ...


class SparseIndexer(Protocol):
    """DeepSeek Sparse Attention: fp8 indexer, exact top-k, attention over the chosen keys."""

    def quantize_forward(self, x: Tensor, *, scale_format: str) -> tuple[Tensor, Tensor]:
        """Return ``(x8 e4m3 [..., D], scale fp32 [...])``, one scale a row of the last axis.

        ``scale = max(amax, 1e-4) / 448``, rounded up to a power of two for
        ``scale_format="ue8m0"``.
        """
        ...

    def index_scores_forward(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        *,
        k_scale: Tensor | None,
        causal: bool,
        key_start: Tensor | None,
        key_end: Tensor | None,
    ) -> Tensor:
        """Return ``I [B, Sq, Sk]`` fp32: ``k_scale[s] sum_h weights[t, h] relu(q[t, h] . k[s])``.

        ``q [B, Sq, Hi, Di]``, ``k [B, Sk, Di]``, ``weights [B, Sq, Hi]`` fp32, ``k_scale [B,
        Sk]``; keys outside ``[key_start, key_end)`` (int32 ``[B, Sq]``) or behind the query are
        -inf.
        """
        ...

    def index_scores_backward(
        self,
        dscores: Tensor,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        *,
        causal: bool,
        key_start: Tensor | None,
        key_end: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(dq, dk, dweights)`` of `index_scores_forward` without ``k_scale``."""
        ...

    def index_topk_forward(
        self,
        q: Tensor,
        k: Tensor,
        k_scale: Tensor | None,
        weights: Tensor,
        top_k: int,
        *,
        causal: bool,
        key_start: Tensor | None,
        key_end: Tensor | None,
        deterministic: bool,
    ) -> Tensor:
        """Return int32 ``[B, Sq, top_k]``: the best keys ascending, then -1; never holds Sq x Sk.

        Ties: higher score first, then lower index. Keys with score -inf are never chosen.
        """
        ...

    def topk_attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        *,
        page_size: int,
        scale: float,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out [B, Sq, Hq, Dv], lse)`` over ``indices`` int32 ``[B, Sq, G, K]``.

        ``G`` is 1 (shared by all heads) or ``Hkv``; -1 anywhere is skipped; with ``page_size`` > 1
        an index names a page of that many consecutive keys. Causality is carried by the indices
        alone for single tokens; keys of a page behind the query are masked.
        """
        ...


class BlockSparseAttention(Protocol):
    """Attention over the pairs that a block, stripe or window plan keeps."""

    def block_sparse_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        counts: Tensor,
        indices: Tensor,
        *,
        block_q: int,
        block_k: int,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)``; ``counts [B, Hx, Nq]`` and ``indices [B, Hx, Nq, C]`` are int32.

        ``Hx`` is 1, ``Hkv`` or ``Hq``. Query blocks tile the queries from row 0.
        """
        ...

    def stripe_sparse_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        vertical: Tensor,
        vertical_counts: Tensor,
        slash: Tensor,
        slash_counts: Tensor,
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)`` over columns ``vertical [B, Hx, V]`` and diagonals ``slash``.

        A diagonal ``o`` holds the pairs with ``query position - key position == o``; causal.
        """
        ...

    def window_sparse_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        head_windows: Tensor | None,
        *,
        window: int,
        sink_tokens: int,
        last_queries: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)`` over ``key < sink_tokens or query - key <= window``; causal.

        ``head_windows`` int32 ``[Hq]`` overrides ``window`` a head; the last ``last_queries`` rows
        attend everything.
        """
        ...


class StarAttention(Protocol):
    """Star Attention (arXiv 2411.17116): blockwise context encoding, exact query phase."""

    def star_context_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, block_size: int, anchor_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)`` over ``j <= i and (i // b == j // b or j < a)``, absolute."""
        ...

    def star_query_forward(
        self,
        q: Tensor,
        shard_keys: Sequence[Tensor],
        shard_values: Sequence[Tensor],
        *,
        query_shard: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)`` over all shards ``[B, Sk_i, Hkv, D]``, exactly merged.

        Causal (bottom-right) on shard ``query_shard`` alone, whose last ``Sq`` keys are the
        queries' own; every other shard is seen whole.
        """
        ...


class TokenSparseAttention(Protocol):
    """Token Sparse Attention (arXiv 2602.03216): score, select, attend among them, scatter."""

    def token_scores_forward(
        self, q_recent: Tensor, k: Tensor, *, pool: int, scale: float
    ) -> Tensor:
        """Return fp32 ``[B, Hq, Sk - W]`` from the last ``W`` queries ``[B, W, Hq, D]``.

        Mean over the queries of the causal softmax over all keys, average-pooled over ``pool``
        keys (stride 1, zero padding counted in the divisor).
        """
        ...

    def select_tokens_forward(
        self, scores: Tensor, *, drop_mass: float, min_tokens: int, recent: int
    ) -> tuple[Tensor, Tensor]:
        """Return ``(indices [B, Hx, L + recent], counts [B, Hx])`` int32, ascending, -1 padded.

        One length a batch entry: the fewest tokens to keep so that what is dropped holds at least
        ``drop_mass`` of the head-mean score, never below ``min_tokens``; identity a head by top-k.
        """
        ...

    def token_sparse_forward(
        self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, *, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)``: a selected query attends the selected keys up to itself.

        ``indices [B, Hx, C]`` are absolute key positions, ``Hx`` in {1, Hkv, Hq}; unselected rows
        give out 0 and lse -inf.
        """
        ...
