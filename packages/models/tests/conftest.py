"""Small random checkpoints, written by transformers itself, and a byte-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """Return a maker of random transformers models whose every parameter matters."""

    def make(architecture: str, seed: int = 0, **config: Any) -> Any:
        kinds = {
            "llama": transformers.LlamaConfig,
            "mistral": transformers.MistralConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
        }
        sizes = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        kind = kinds[architecture](**{**sizes, **config})
        kind._attn_implementation = "eager"
        generator = torch.Generator().manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(kind).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name:
                    parameter.copy_(1 + 0.3 * noise)
                elif parameter.ndim == 1:
                    parameter.copy_(0.3 * noise)
                else:
                    parameter.copy_(noise * 1.2 * parameter.shape[-1] ** -0.5)
        return model

    return make


@pytest.fixture
def checkpoint(tmp_path: Path, random_model: Callable[..., Any]) -> Callable[..., Path]:
    """Return a writer of checkpoint directories: ``checkpoint(architecture, **config)``."""

    def write(architecture: str, seed: int = 0, name: str = "model", **config: Any) -> Path:
        folder = tmp_path / name
        random_model(architecture, seed, **config).save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return write


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json whose ids are byte values modulo nothing: 256 bytes, BOS is 1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    vocabulary = {characters[byte]: byte for byte in range(256)}
    del vocabulary[characters[1]]
    vocabulary["<bos>"] = 1
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    special = {
        "id": 1,
        "content": "<bos>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
        },
        "decoder": level,
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
    (folder / "tokenizer.json").write_text(json.dumps(content))
