"""The configuration of a decoder, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from longctx.errors import CheckpointError, nearest_name
from longctx_models.architectures.rope import ROPE_KINDS, RopeConfig

__all__ = ["ModelConfig"]

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}
"""What transformers assumes for keys that a model type's config.json leaves out."""

_ROPE_ALIASES = {"su": "longrope"}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder-only transformer.

    Attributes
    ----------
    architecture : str
        Hugging Face ``model_type``.
    vocab_size, hidden_size, intermediate_size, num_layers : int
    q_heads, kv_heads, head_dim : int
        ``q_heads`` is a multiple of ``kv_heads``; ``head_dim`` need not be ``hidden_size /
        q_heads``.
    norm_eps : float
    rope : RopeConfig
    windows : tuple of int or None
        A layer's sliding window: how many earlier tokens it sees besides the present one; None is
        full attention.
    qkv_bias, output_bias, mlp_bias, qk_norm, tied_embeddings : bool
    eos_ids : tuple of int
        Tokens that end a text.
    bos_id : int or None
    dtype : torch.dtype or None
        Data type that the checkpoint states.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    dtype: torch.dtype | None = None

    @property
    def max_positions(self) -> int:
        """Longest sequence that the checkpoint is made for."""
        return self.rope.usable_positions

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the content of a ``config.json`` (transformers 4 and 5 spellings).

        Parameters
        ----------
        config : mapping
        where : str
            Name of the file in error messages.

        Raises
        ------
        CheckpointError
            If the architecture is unknown, a size is missing or an option is not supported.
        """
        kind = config.get("model_type")
        if not isinstance(kind, str):
            raise CheckpointError(f"{where}: model_type is missing, it names the architecture")
        if kind not in _DEFAULTS:
            raise CheckpointError(
                f"{where}: architecture {kind!r} is not supported: {nearest_name(kind, _DEFAULTS)}"
            )
        _refuse_variants(config, where)
        fields = {**_DEFAULTS[kind], **config}
        hidden, heads = (
            _size(fields, "hidden_size", where),
            _size(fields, "num_attention_heads", where),
        )
        kv_heads = fields.get("num_key_value_heads") or heads
        head_dim = fields.get("head_dim") or hidden // heads
        if heads % kv_heads or head_dim % 2:
            raise CheckpointError(
                f"{where}: {heads} query heads, {kv_heads} KV heads of size {head_dim}: the query "
                "heads must be a multiple of the KV heads and the size even"
            )
        layers = _size(fields, "num_hidden_layers", where)
        bias = bool(fields.get("attention_bias", False))
        return cls(
            architecture=kind,
            vocab_size=_size(fields, "vocab_size", where),
            hidden_size=hidden,
            intermediate_size=_size(fields, "intermediate_size", where),
            num_layers=layers,
            q_heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            rope=_rope(fields, head_dim, where),
            windows=_windows(kind, fields, layers, where),
            qkv_bias=kind == "qwen2" or (kind != "mistral" and bias),
            output_bias=kind in ("llama", "qwen3") and bias,
            mlp_bias=kind == "llama" and bool(fields.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
            eos_ids=token_ids(fields.get("eos_token_id")),
            bos_id=fields.get("bos_token_id"),
            dtype=_dtype(fields.get("dtype") or fields.get("torch_dtype")),
        )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Return ``eos_token_id``, which may be an int, a list or missing, as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _size(fields: Mapping[str, Any], key: str, where: str) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or value < 1:
        found = "is missing" if value is None else f"is {value!r}"
        raise CheckpointError(f"{where}: {key} {found}, it must be a positive whole number")
    return value


def _refuse_variants(config: Mapping[str, Any], where: str) -> None:
    """Refuse what would load but compute something else."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{where}: activation {activation!r} is not supported, only 'silu'")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{where}: the weights are quantised ({method}): use the checkpoint in bf16 or fp16"
        )
    for name in config.get("architectures") or ():
        if not name.endswith("ForCausalLM"):
            raise CheckpointError(
                f"{where}: {name} is not a causal language model (...ForCausalLM)"
            )


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _windows(
    kind: str, fields: Mapping[str, Any], layers: int, where: str
) -> tuple[int | None, ...]:
    """Return each layer's window; transformers counts the present token in, ours does not."""
    size = fields.get("sliding_window")
    if kind == "llama" or size is None:
        return (None,) * layers
    if kind == "mistral":
        return (size - 1,) * layers
    if not fields.get("use_sliding_window", False):
        return (None,) * layers
    types = fields.get("layer_types")
    if types is None:
        first = fields.get("max_window_layers", 28)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != layers:
        raise CheckpointError(
            f"{where}: layer_types must name full_attention or sliding_attention for each of the "
            f"{layers} layers, got {len(types)} entries"
            + (f" with {sorted(unknown)}" if unknown else "")
        )
    return tuple(size - 1 if t == "sliding_attention" else None for t in types)


def _rope(fields: Mapping[str, Any], head_dim: int, where: str) -> RopeConfig:
    """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (4)."""
    given = {**(fields.get("rope_scaling") or fields.get("rope_parameters") or {})}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise CheckpointError(f"{where}: RoPE parameters that differ by layer are not supported")
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = _ROPE_ALIASES.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise CheckpointError(
            f"{where}: RoPE scaling {kind!r} is not supported: "
            f"{nearest_name(str(kind), ROPE_KINDS)}"
        )
    if (given.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor other than 1 is not supported")
    longest = _size({"max_position_embeddings": 2048, **fields}, "max_position_embeddings", where)
    original = (
        fields.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or longest
    )
    factor = given.get("factor")
    if factor is None:
        if kind in ("linear", "dynamic", "llama3"):
            raise CheckpointError(f"{where}: RoPE scaling {kind!r} needs a factor")
        factor = longest / original
    short, long = (tuple(given.get(name) or ()) for name in ("short_factor", "long_factor"))
    if kind == "longrope" and not len(short) == len(long) == head_dim // 2:
        raise CheckpointError(
            f"{where}: longrope needs {head_dim // 2} short and long factors, got {len(short)} "
            "and "
            f"{len(long)}"
        )
    return RopeConfig(
        kind=kind,
        theta=float(given.get("rope_theta") or fields.get("rope_theta") or 10000.0),
        head_dim=head_dim,
        max_positions=longest,
        original_max_positions=original,
        factor=float(factor),
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_attention_factor(kind, given, float(factor), original),
        short_factor=short,
        long_factor=long,
    )


def _attention_factor(kind: str, given: Mapping[str, Any], factor: float, original: int) -> float:
    stated = given.get("attention_factor")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if stated is not None:
        return float(stated)
    if factor <= 1.0:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    some, every = given.get("mscale"), given.get("mscale_all_dim")
    return scale(some) / scale(every) if some and every else scale(1.0)
