"""Checkpoints: weights in the Qwen3 format, tokenizer, and the state from which a run resumes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from config import BOS, EOS, VOCABULARY, ModelConfig
from model import LAYER_NORMS, MATRICES, NeedleDecoder
from optimizer import Optimizers
from safetensors.torch import load_file, save_file
from torch import Tensor

_SHARD_BYTES = 15 * 2**20
_LAYER_NAMES = {
    **{name: f"self_attn.{name}" for name in MATRICES[:4]},
    **{name: f"mlp.{name}" for name in MATRICES[4:]},
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def export(model: NeedleDecoder, folder: Path) -> None:
    """Write everything that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Parameters
    ----------
    model
        Trained model; its weights are written in bf16.
    folder
        Where to write. Created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.final_norm,
        "lm_head.weight": model.head,
    }
    for name in (*MATRICES, *LAYER_NORMS):
        stack = model.matrices[name] if name in MATRICES else model.norms[name]
        for i, weight in enumerate(stack):
            weights[f"model.layers.{i}.{_LAYER_NAMES[name]}.weight"] = weight
    save_file(
        {k: v.detach().to("cpu", torch.bfloat16).clone() for k, v in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    files = {
        "config.json": _hugging_face_config(model.config),
        "generation_config.json": {
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "do_sample": False,
        },
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": chr(BOS),
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_positions,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load(
    folder: Path, block: int, compute_dtype: torch.dtype, compiled: bool = False
) -> NeedleDecoder:
    """Read what `export` wrote.

    Parameters
    ----------
    folder
        Checkpoint.
    block, compute_dtype, compiled
        See `NeedleDecoder`.
    """
    c = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        layers=c["num_hidden_layers"],
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        mlp_width=c["intermediate_size"],
        rope_base=c["rope_theta"],
        max_positions=c["max_position_embeddings"],
        norm_eps=c["rms_norm_eps"],
    )
    model = NeedleDecoder(config, block, compute_dtype, compiled)
    weights = load_file(folder / "model.safetensors")
    stacks = {
        name: torch.stack(
            [
                weights.pop(f"model.layers.{i}.{_LAYER_NAMES[name]}.weight")
                for i in range(config.layers)
            ]
        )
        for name in (*MATRICES, *LAYER_NORMS)
    }
    with torch.no_grad():
        model.embedding.copy_(weights.pop("model.embed_tokens.weight"))
        model.final_norm.copy_(weights.pop("model.norm.weight"))
        model.head.copy_(weights.pop("lm_head.weight"))
        for name, stack in stacks.items():
            (model.matrices if name in MATRICES else model.norms)[name].copy_(stack)
    if weights:
        raise ValueError(f"{folder} holds unknown weights: {sorted(weights)}")
    return model


def save_state(
    folder: Path, model: NeedleDecoder, optimizers: Optimizers, progress: dict[str, object]
) -> None:
    """Write what a run needs to resume, in files of at most 15 MiB.

    Parameters
    ----------
    folder
        Where to write. Created if missing.
    model, optimizers
        What is being trained.
    progress
        Numbers to keep beside the tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model/{name}": p for name, p in model.named_parameters()}
    for kind, state in optimizers.state().items():
        for index, values in state["state"].items():
            tensors |= {f"{kind}/{index}/{name}": value for name, value in values.items()}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"state-{i}.safetensors")
    # Last, so that a folder with progress is complete.
    (folder / "progress.json").write_text(json.dumps(progress))


def load_state(
    folder: Path, model: NeedleDecoder, optimizers: Optimizers
) -> dict[str, object] | None:
    """Restore what `save_state` wrote and return the progress, or None where nothing is."""
    if not (folder / "progress.json").exists():
        return None
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        tensors |= load_file(path)
    parameters = dict(model.named_parameters())
    states = optimizers.state()
    with torch.no_grad():
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "model":
                parameters[rest].copy_(tensor)
            else:
                index, _, name = rest.partition("/")
                states[kind]["state"].setdefault(int(index), {})[name] = tensor
    optimizers.load(states)
    return json.loads((folder / "progress.json").read_text())


def tokenizer() -> dict[str, object]:
    """Return a tokenizer in the format of Hugging Face's tokenizers: ids are byte values.

    The beginning-of-sequence byte is a special token named by its own character, so that no
    printable character of a user's text can be mistaken for it. The line end, which ends an
    answer, is an ordinary token.
    """
    vocabulary = {char: byte for byte, char in _byte_characters().items()}
    bos = chr(BOS)
    vocabulary = {bos if byte == BOS else char: byte for char, byte in vocabulary.items()}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": BOS,
                "content": bos,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [BOS], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _byte_characters() -> dict[int, str]:
    """Return the printable character that byte-level tokenizers write for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(VOCABULARY) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(VOCABULARY + i) for i, byte in enumerate(hidden)}
    return dict(sorted(characters.items()))


def _hugging_face_config(config: ModelConfig) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
    }
