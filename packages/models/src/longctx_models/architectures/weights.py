"""Where each tensor of a Hugging Face Llama-family checkpoint goes in a `Decoder`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from longctx_models.architectures.llama import Decoder, DecoderLayer, Linear

__all__ = ["Destination", "destinations", "may_be_ignored"]


@dataclass(frozen=True)
class Destination:
    """A part of a parameter that one checkpoint tensor fills.

    Attributes
    ----------
    view : Tensor
        Written with ``copy_``; a vector that is kept once a head is broadcast over the heads.
    shape : tuple of int
        Shape that the checkpoint tensor must have.
    """

    view: Tensor
    shape: tuple[int, ...]


def destinations(model: Decoder) -> dict[str, Destination]:
    """Return the destination of every tensor that the checkpoint must hold, by its name."""
    return dict(_all(model))


def may_be_ignored(name: str, model: Decoder) -> bool:
    """Return whether an unexpected tensor is no fault.

    Tied weights may be stored a second time, and old files hold the rotary frequencies.
    """
    tied_head = name == "lm_head.weight" and model.config.tied_embeddings
    return tied_head or name.endswith("rotary_emb.inv_freq")


def _all(model: Decoder) -> Iterator[tuple[str, Destination]]:
    yield "model.embed_tokens.weight", _whole(model.embedding)
    yield "model.norm.weight", _whole(model.final_norm)
    if not model.config.tied_embeddings:
        yield "lm_head.weight", _whole(model.head)
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        for name, destination in _layer(layer):
            yield f"model.layers.{index}.{name}", destination


def _layer(layer: DecoderLayer) -> Iterator[tuple[str, Destination]]:
    c = layer.config
    yield "input_layernorm.weight", _whole(layer.attention_norm)
    yield "post_attention_layernorm.weight", _whole(layer.mlp_norm)
    q, kv = c.q_heads * c.head_dim, c.kv_heads * c.head_dim
    rows = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    for name, (start, end) in rows.items():
        yield from _linear(f"self_attn.{name}", layer.qkv, start, end)
    yield from _linear("self_attn.o_proj", layer.output, 0, c.hidden_size)
    yield from _linear("mlp.gate_proj", layer.gate_up, 0, c.intermediate_size)
    yield from _linear("mlp.up_proj", layer.gate_up, c.intermediate_size, 2 * c.intermediate_size)
    yield from _linear("mlp.down_proj", layer.down, 0, c.hidden_size)
    if layer.qk_norm is not None:
        shape = (c.head_dim,)
        yield "self_attn.q_norm.weight", Destination(layer.qk_norm.data[: c.q_heads], shape)
        yield "self_attn.k_norm.weight", Destination(layer.qk_norm.data[c.q_heads :], shape)


def _linear(name: str, linear: Linear, start: int, end: int) -> Iterator[tuple[str, Destination]]:
    yield f"{name}.weight", _whole(linear.weight.data[start:end])
    if linear.bias is not None:
        yield f"{name}.bias", _whole(linear.bias.data[start:end])


def _whole(tensor: Tensor) -> Destination:
    return Destination(tensor.data, tuple(tensor.shape))
