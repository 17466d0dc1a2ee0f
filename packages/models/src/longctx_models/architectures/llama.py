"""The Llama family in one decoder: Llama 2 and 3, Mistral, Qwen2, Qwen3.

Pre-norm transformer with RMSNorm, rotary positions, grouped-query attention and SwiGLU; what
differs between the members is data in `ModelConfig`. The decoder knows neither caches nor
sparsity: it hands the rotated q, k, v of each layer to an ``attend`` callable and takes back the
attended values.

Legend of suffixes: B batch, T tokens of this call, E hidden size, H query heads, K key/value
heads, D head size, F MLP size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx_models.architectures.config import ModelConfig
from longctx_models.architectures.rope import RotaryEmbedding, apply_rope

__all__ = ["Attend", "Decoder", "DecoderLayer", "Observe"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, q_BTHD, k_BTKD, v_BTKD) -> out_BTHD``."""

Observe = Callable[[int, Tensor, Tensor], None]
"""``observe(layer, h_in_BTE, h_out_BTE)``: sees the residual stream around each layer."""

SLICE_ROWS = 16384
"""Rows of one call that the row-wise parts handle at once: it bounds their temporaries."""


class Linear(nn.Module):
    """A linear map whose weights are left uninitialised, for the loader to fill."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = _empty(outputs, inputs, dtype=dtype, device=device)
        self.bias = _empty(outputs, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``."""
        return F.linear(x, self.weight, self.bias)


class DecoderLayer(nn.Module):
    """One transformer layer, split where attention happens.

    Parameters
    ----------
    config : ModelConfig
    dtype : torch.dtype
    device : torch.device or str
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.config = config
        hidden, mlp, size = config.hidden_size, config.intermediate_size, config.head_dim
        heads = config.q_heads + 2 * config.kv_heads

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, bias, dtype, device)

        self.attention_norm = _empty(hidden, dtype=dtype, device=device)
        self.mlp_norm = _empty(hidden, dtype=dtype, device=device)
        # q, k and v (gate and up) are one matrix each: decoding is bound by the number of launches
        self.qkv = linear(hidden, heads * size, config.qkv_bias)
        self.output = linear(config.q_heads * size, hidden, config.output_bias)
        self.gate_up = linear(hidden, 2 * mlp, config.mlp_bias)
        self.down = linear(mlp, hidden, config.mlp_bias)
        # one row a head, so that q and k are normalised in one call
        normed = config.q_heads + config.kv_heads
        self.qk_norm = _empty(normed, size, dtype=dtype, device=device) if config.qk_norm else None

    def project(self, x_BTE: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rotated ``q_BTHD, k_BTKD`` and ``v_BTKD``; views of one tensor each."""
        c = self.config
        x = F.rms_norm(x_BTE, (c.hidden_size,), self.attention_norm, c.norm_eps)
        qkv = self.qkv(x).unflatten(-1, (-1, c.head_dim))
        qk, v = qkv[..., : c.q_heads + c.kv_heads, :], qkv[..., c.q_heads + c.kv_heads :, :]
        if self.qk_norm is not None:
            qk = F.rms_norm(qk, (c.head_dim,), None, c.norm_eps) * self.qk_norm
        qk = apply_rope(qk, cos, sin)
        return qk[..., : c.q_heads, :], qk[..., c.q_heads :, :], v

    def finish(self, x_BTE: Tensor, out_BTHD: Tensor) -> Tensor:
        """Return the residual stream after the attention output and the MLP."""
        c = self.config
        x: Tensor = x_BTE + self.output(out_BTHD.flatten(-2))
        h = F.rms_norm(x, (c.hidden_size,), self.mlp_norm, c.norm_eps)
        gate, up = self.gate_up(h).chunk(2, -1)
        mlp: Tensor = self.down(F.silu(gate) * up)
        return x + mlp


class Decoder(nn.Module):
    """A causal language model of the Llama family, for inference.

    Parameters
    ----------
    config : ModelConfig
    dtype : torch.dtype
    device : torch.device or str
        Parameters are left uninitialised: `longctx_models.loading` fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.rotary = RotaryEmbedding(config.rope)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = _empty(*shape, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, dtype, device) for _ in range(config.num_layers)
        )
        self.final_norm = _empty(config.hidden_size, dtype=dtype, device=device)
        tied = config.tied_embeddings
        self.head = self.embedding if tied else _empty(*shape, dtype=dtype, device=device)

    def forward(
        self,
        ids_BT: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        length: int | None = None,
        last_row: bool = False,
        observe: Observe | None = None,
    ) -> Tensor:
        """Run all layers and return the residual stream ``[B, T, E]``.

        Parameters
        ----------
        ids_BT : Tensor, (batch, tokens), int64
        positions : Tensor, (tokens,) or (batch, tokens), int64
            Absolute positions.
        attend : callable
            The attention of a layer; see `Attend`.
        length : int, optional
            Tokens of the whole sequence where it is known (see `RotaryEmbedding.tables`); default:
            the tokens of this call.
        last_row : bool
            Return ``[B, 1, E]``: the last layer hands on the keys and values of all tokens, but
            only the query of the last one, since nobody reads what the others would become.
        observe : callable, optional
            Sees the residual stream around every layer.
        """
        x = F.embedding(ids_BT, self.embedding)
        cos, sin = self.rotary.tables(positions, ids_BT.shape[1] if length is None else length)
        for index, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, cos, sin)
            if last_row and index == len(self.layers) - 1:
                q, x = q[:, -1:], x[:, -1:]
            out = attend(index, q, k, v)
            before, x = x, self._finish(layer, x, out)
            if observe is not None:
                observe(index, before, x)
        return x

    def logits(self, x_BTE: Tensor) -> Tensor:
        """Return fp32 scores of the next token, ``[B, T, V]``, from the residual stream."""
        h = F.rms_norm(x_BTE, (self.config.hidden_size,), self.final_norm, self.config.norm_eps)
        return F.linear(h, self.head).float()

    def _project(
        self, layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(layer, DecoderLayer)
        if x.shape[1] <= SLICE_ROWS:
            return layer.project(x, cos, sin)
        c = self.config
        q, k, v = (
            x.new_empty(*x.shape[:2], heads, c.head_dim)
            for heads in (c.q_heads, c.kv_heads, c.kv_heads)
        )
        for rows in _slices(x.shape[1]):
            parts = layer.project(x[:, rows], cos[..., rows, :, :], sin[..., rows, :, :])
            for whole, part in zip((q, k, v), parts, strict=True):
                whole[:, rows] = part
        return q, k, v

    def _finish(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        assert isinstance(layer, DecoderLayer)
        if x.shape[1] <= SLICE_ROWS:
            return layer.finish(x, out)
        result = torch.empty_like(x)
        for rows in _slices(x.shape[1]):
            result[:, rows] = layer.finish(x[:, rows], out[:, rows])
        return result


def _empty(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


def _slices(rows: int) -> Iterator[slice]:
    for start in range(0, rows, SLICE_ROWS):
        yield slice(start, min(start + SLICE_ROWS, rows))
