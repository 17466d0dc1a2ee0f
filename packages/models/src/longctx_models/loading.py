"""Loading a checkpoint directory in the Hugging Face layout; nothing is ever fetched.

Weights come from safetensors alone and are copied tensor by tensor from the memory-mapped shards
into the model's own memory, in its dtype and on its device: the peak is the model plus one
tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from longctx.errors import CheckpointError, nearest_name
from longctx_models.architectures.config import ModelConfig, token_ids
from longctx_models.architectures.llama import Decoder
from longctx_models.architectures.weights import destinations, may_be_ignored

__all__ = [
    "load_config",
    "load_method_defaults",
    "load_model",
    "packaged_checkpoints",
    "resolve_checkpoint",
]

_PACKAGED = Path(__file__).parent / "checkpoints"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Progress = Callable[[int, int], None]
"""``progress(done, total)``."""


def packaged_checkpoints() -> dict[str, Path]:
    """Return the checkpoints that come with this package, by name."""
    folders = sorted(_PACKAGED.iterdir()) if _PACKAGED.is_dir() else []
    return {folder.name: folder for folder in folders if (folder / "config.json").is_file()}


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the directory that a path, or the bare name of a packaged checkpoint, stands for.

    Parameters
    ----------
    path : str or Path
        A directory; or a name such as ``"needle"``, unless a directory of that name is here.

    Raises
    ------
    CheckpointError
        If there is no such directory or packaged checkpoint.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the directory that holds config.json")
    packaged = packaged_checkpoints()
    if str(path) in packaged:
        return packaged[str(path)]
    if len(folder.parts) == 1 and not str(path).startswith((".", "~")):
        raise CheckpointError(
            f"no directory and no packaged checkpoint is called {str(path)!r}: "
            f"{nearest_name(str(path), packaged)}"
        )
    raise CheckpointError(f"there is no directory {folder}")


def load_config(folder: Path) -> ModelConfig:
    """Read ``config.json``, and the tokens that end a text from ``generation_config.json``.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or describes what is not supported.
    """
    config = ModelConfig.from_hf(_read_json(folder / "config.json"), str(folder / "config.json"))
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return config
    # it wins, as in transformers: chat models add their end-of-turn token there
    eos = token_ids(_read_json(generation).get("eos_token_id"))
    return replace(config, eos_ids=eos) if eos else config


def load_method_defaults(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Read ``longctx.json``, which may state the options of methods that suit the checkpoint.

    ``{"methods": {"token-sparse": {"layers": "5"}}}`` is one; without the file nothing is stated.

    Raises
    ------
    CheckpointError
        If the file is damaged or of another form.
    """
    path = folder / "longctx.json"
    if not path.is_file():
        return {}
    methods = _read_json(path).get("methods")
    if not isinstance(methods, dict) or not all(isinstance(m, dict) for m in methods.values()):
        raise CheckpointError(f"{path} must hold {{'methods': {{name: {{option: value}}}}}}")
    return methods


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> Decoder:
    """Build the model and fill it from the checkpoint's safetensors.

    Parameters
    ----------
    folder : Path
        Checkpoint directory.
    config : ModelConfig
    dtype, device
        Of the model in memory, whatever the files hold.
    progress : callable, optional
        Told ``(tensors done, tensors in all)``.

    Raises
    ------
    CheckpointError
        If weights are missing, damaged, of another shape, unexpected, or stored as pickles.
    """
    shards = _shards(folder)
    model = Decoder(config, dtype=dtype, device=device)
    wanted = destinations(model)
    total, seen = len(wanted), set[str]()
    unexpected: list[str] = []
    for shard in shards:
        with _open(shard) as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                if name not in wanted:
                    if not may_be_ignored(name, model):
                        unexpected.append(name)
                    continue
                _fill(file, name, wanted[name].view, wanted[name].shape, shard)
                seen.add(name)
                if progress is not None:
                    progress(len(seen), total)
    missing = [name for name in wanted if name not in seen]
    if missing or unexpected:
        raise CheckpointError(_mismatch(folder, config, missing, unexpected))
    return model.eval()


def _fill(file: Any, name: str, view: torch.Tensor, shape: tuple[int, ...], shard: Path) -> None:
    found = tuple(file.get_slice(name).get_shape())
    if found != shape:
        raise CheckpointError(
            f"{shard}: {name} has shape {list(found)}, config.json implies {list(shape)}"
        )
    try:
        tensor = file.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{shard}: {name} cannot be read: {error}") from error
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(
            f"{shard}: {name} is {tensor.dtype}, not a floating-point type: use an unquantised "
            "checkpoint"
        )
    view.copy_(tensor)


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing)}"
            )
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickles ({pickles[0]}), which can run code when "
            "they are "
            f"read: convert them to {_SINGLE} first (safetensors.torch.save_file)"
        )
    raise CheckpointError(f"{folder} holds neither {_SINGLE} nor {_INDEX}")


def _open(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{shard} is damaged or cut short ({error}): copy it again from its source"
        ) from error


def _mismatch(folder: Path, config: ModelConfig, missing: list[str], unexpected: list[str]) -> str:
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    return (
        f"the weights in {folder} do not fit architecture {config.architecture!r} with "
        f"{config.num_layers} layers: {' and '.join(parts)}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
