"""Checkpoints: what loads, and one clear sentence for everything that does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.errors import BackendNotFoundError, CheckpointError, UnsupportedError
from longctx_models import loading
from longctx_models.engine import LongContextLLM
from longctx_models.loading import load_config, packaged_checkpoints, resolve_checkpoint

Edit = Callable[[Path], None]


def edit_config(**changes: Any) -> Edit:
    """Return an edit of config.json; None removes a key."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Edit:
    """Return an edit of the tensors in model.safetensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def remove(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def write(name: str, content: str | bytes) -> Edit:
    def edit(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return edit


def cut(name: str, share: float) -> Edit:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return edit


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def swap(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)


DAMAGES: dict[str, tuple[Edit, str]] = {
    "no-config": (remove("config.json"), "has no config.json"),
    "config-not-json": (write("config.json", "{,"), "config.json is not valid JSON"),
    "config-is-a-list": (write("config.json", "[]"), "must hold a JSON object, got list"),
    "config-not-text": (write("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "unknown-architecture": (
        edit_config(model_type="qwen4"),
        "architecture 'qwen4' is not supported: did you mean 'qwen2'|did you mean 'qwen3'",
    ),
    "no-architecture": (edit_config(model_type=None), "model_type is missing"),
    "not-causal": (
        edit_config(architectures=["LlamaForSequenceClassification"]),
        "is not a causal language model",
    ),
    "no-size": (edit_config(hidden_size=None), "hidden_size is missing"),
    "bad-size": (edit_config(num_hidden_layers="3"), "num_hidden_layers is '3'"),
    "bad-heads": (edit_config(num_key_value_heads=3), "must be a multiple of the KV heads"),
    "odd-activation": (edit_config(hidden_act="relu"), "activation 'relu' is not supported"),
    "quantised": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        "weights are quantised (gptq)",
    ),
    "unknown-rope": (
        edit_config(rope_parameters={"rope_type": "yarm", "rope_theta": 1e4}),
        "RoPE scaling 'yarm' is not supported: did you mean 'yarn'",
    ),
    "rope-without-factor": (
        edit_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        "RoPE scaling 'linear' needs a factor",
    ),
    "longrope-without-factors": (
        edit_config(rope_parameters={"rope_type": "longrope", "factor": 2.0}),
        "longrope needs 4 short and long factors, got 0 and 0",
    ),
    "partial-rotary": (
        edit_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    "rope-by-layer": (
        edit_config(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "differ by layer",
    ),
    "no-tokenizer": (remove("tokenizer.json"), "has no tokenizer.json"),
    "bad-tokenizer": (write("tokenizer.json", "{}"), "tokenizer.json cannot be read"),
    "no-weights": (remove("model.safetensors"), "holds neither model.safetensors nor"),
    "pickles": (as_pickle, r"holds its weights as pickles (pytorch_model.bin).*convert"),
    "truncated": (cut("model.safetensors", 0.6), "model.safetensors is damaged or cut short"),
    "header-cut": (cut("model.safetensors", 0.001), "model.safetensors is damaged or cut short"),
    "garbage": (write("model.safetensors", b"\x00" * 64), "is damaged or cut short"),
    "wrong-shape": (
        edit_weights(swap),
        r"layers.0.mlp.down_proj.weight has shape \[48, 32\], config.json implies \[32, 48\]",
    ),
    "missing-tensor": (
        edit_weights(drop),
        "1 missing (model.layers.1.self_attn.k_proj.weight)",
    ),
    "unexpected-tensor": (
        edit_weights(add),
        "1 unexpected (model.layers.7.mlp.up_proj.weight)",
    ),
    "integer-weights": (edit_weights(quantise), "is torch.int8, not a floating-point type"),
    "fewer-layers": (edit_config(num_hidden_layers=2), "9 unexpected (model.layers.2"),
    "more-layers": (edit_config(num_hidden_layers=4), "9 missing (model.layers.3"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_one_sentence(checkpoint: Callable[..., Path], damage: str) -> None:
    edit, message = DAMAGES[damage]
    folder = checkpoint("llama")
    edit(folder)
    pattern = message if "\\" in message or "|" in message or ".*" in message else None
    with pytest.raises(CheckpointError) as caught:
        LongContextLLM.load(folder, device="cpu")
    text = str(caught.value)
    assert "\n" not in text.strip()
    if pattern is None:
        assert message in text
    else:
        assert re.search(pattern.replace("(", r"\(").replace(")", r"\)"), text), text


def test_missing_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no directory"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="there is no directory"):
        resolve_checkpoint("./needle")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(tmp_path / "file")


def test_bare_names_are_packaged_checkpoints(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = tmp_path / "packaged"
    monkeypatch.setattr(loading, "_PACKAGED", packaged)
    assert packaged_checkpoints() == {}
    with pytest.raises(CheckpointError, match="known: none"):
        resolve_checkpoint("needle")
    shutil.copytree(checkpoint("llama"), packaged / "needle")
    (packaged / "unfinished").mkdir()
    assert list(packaged_checkpoints()) == ["needle"]
    assert resolve_checkpoint("needle") == packaged / "needle"
    with pytest.raises(CheckpointError, match="'neddle': did you mean 'needle'"):
        resolve_checkpoint("neddle")
    (tmp_path / "needle").mkdir()
    assert resolve_checkpoint("needle") == Path("needle")


def test_sharded_checkpoints(random_model: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model("qwen2")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    shards = sorted(tmp_path.glob("many/*.safetensors"))
    assert len(shards) > 3
    one, many = (
        LongContextLLM.load(tmp_path / name, device="cpu", tokenizer=None)
        for name in ("one", "many")
    )
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        assert torch.equal(a, b)
    shards[1].unlink()
    with pytest.raises(
        CheckpointError, match=f"lacks 1 of {len(shards)} weight files: {shards[1].name}"
    ):
        LongContextLLM.load(tmp_path / "many", device="cpu", tokenizer=None)
    (tmp_path / "many" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        LongContextLLM.load(tmp_path / "many", device="cpu", tokenizer=None)


def test_tied_weights_may_be_stored_twice(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    llm = LongContextLLM.load(folder, device="cpu")
    assert llm.model.head is llm.model.embedding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_chosen_at_loading(checkpoint: Callable[..., Path], dtype: torch.dtype) -> None:
    llm = LongContextLLM.load(checkpoint("qwen3", head_dim=8), device="cpu", dtype=dtype)
    assert {p.dtype for p in llm.model.parameters()} == {dtype}
    logits = llm.prefill_logits([5, 6, 7])
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    exact = LongContextLLM.load(llm_folder(checkpoint), device="cpu", dtype=torch.float32)
    close = {torch.bfloat16: 0.5, torch.float16: 0.05, torch.float32: 0.0}[dtype]
    assert (logits - exact.prefill_logits([5, 6, 7])).abs().max() <= close


def llm_folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen3", name="again", head_dim=8)


def test_end_tokens_come_from_both_files(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama", eos_token_id=[7, 8])
    (folder / "generation_config.json").unlink()
    assert load_config(folder).eos_ids == (7, 8)
    write("generation_config.json", json.dumps({"eos_token_id": 9}))(folder)
    assert load_config(folder).eos_ids == (9,)
    write("generation_config.json", "{}")(folder)
    assert load_config(folder).eos_ids == (7, 8)


def test_transformers_4_spelling_of_rope(checkpoint: Callable[..., Path]) -> None:
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    new = {"rope_type": "yarn", **{k: v for k, v in old.items() if k != "type"}}
    folder = checkpoint("llama", rope_parameters={**new, "rope_theta": 500.0})
    config = load_config(folder)
    assert config.rope.kind == "yarn"
    assert config.max_positions == 128
    edit_config(rope_parameters=None, rope_theta=500.0, rope_scaling=old)(folder)
    assert load_config(folder) == config
    edit_config(rope_scaling=None)(folder)
    assert load_config(folder).rope.kind == "default"
    assert load_config(folder).rope.theta == 500.0


def test_scaling_lengthens_the_context(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama")
    for kind, positions in (("linear", 384), ("dynamic", 384), ("yarn", 192), ("llama3", 128)):
        parameters = {"rope_type": kind, "factor": 3.0, "original_max_position_embeddings": 64}
        edit_config(rope_parameters=parameters)(folder)
        assert load_config(folder).max_positions == positions


def test_unknown_names_are_refused_before_the_weights(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackendNotFoundError, match="did you mean 'paged'"):
        LongContextLLM.load(folder, cache="pagd")
    with pytest.raises(BackendNotFoundError, match="did you mean 'dense'"):
        LongContextLLM.load(folder, method="dens")
    with pytest.raises(BackendNotFoundError, match="no backend is called 'torhc'"):
        LongContextLLM.load(folder, backend="torhc", device="cpu")
    with pytest.raises((UnsupportedError, BackendNotFoundError), match="triton"):
        LongContextLLM.load(folder, backend="triton", device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_named(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"'cuda:0' was asked for, but torch sees no CUDA GPU"):
        LongContextLLM.load(checkpoint("llama"), device="cuda:0")


def test_default_dtypes() -> None:
    from longctx_models.engine import _default_dtype

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert _default_dtype(gpu, torch.float16) is torch.float16
    assert _default_dtype(gpu, torch.float32) is torch.bfloat16
    assert _default_dtype(gpu, None) is torch.bfloat16
    assert _default_dtype(cpu, torch.float32) is torch.float32
    assert _default_dtype(cpu, torch.float16) is torch.float32
    assert _default_dtype(cpu, torch.bfloat16) in (torch.bfloat16, torch.float32)


def test_loading_reports_progress(checkpoint: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    LongContextLLM.load(
        checkpoint("llama"), device="cpu", progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(n + 1, 30) for n in range(30)]
