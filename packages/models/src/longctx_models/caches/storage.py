"""Saved caches: one safetensors file, written layer by layer and renamed into place at the end."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["SavedCache", "read_cache", "write_cache"]

_FORMAT = "longctx-kv-cache-1"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Lengths = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Logical and physical length, and the length at the last eviction, of each layer."""


def write_cache(
    path: Path,
    batch: int,
    lengths: Lengths,
    gather: Callable[[int], tuple[Tensor, Tensor]],
    auxiliary: Mapping[str, Tensor],
) -> None:
    """Write a cache; only one layer is held in memory a second time.

    Parameters
    ----------
    path : Path
    batch : int
    lengths : tuple
        See `Lengths`.
    gather : callable
        Gives ``(k, v)`` of a layer.
    auxiliary : mapping of str to Tensor
        Side state by ``"layer.name"``.

    Raises
    ------
    OSError
        If the file cannot be written whole; the unfinished file is removed, an older one stays.
    """
    sources: dict[str, Callable[[], Tensor]] = {}
    for layer in range(len(lengths[0])):
        for index, part in enumerate("kv"):
            sources[f"layers.{layer}.{part}"] = partial(_part, gather, layer, index)
    for name, tensor in auxiliary.items():
        sources[f"auxiliary.{name}"] = partial(Tensor.detach, tensor)
    described = {"batch": batch, "lengths": lengths}
    header: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "cache": json.dumps(described)}}
    offset = 0
    for name, source in sources.items():
        tensor = source()
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            _write(file, header, sources)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the cache ({offset / 2**20:.0f} MiB) could not be saved ({error.strerror}), "
            "nothing was "
            "left behind: free space or choose another place",
            str(path),
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _part(gather: Callable[[int], tuple[Tensor, Tensor]], layer: int, index: int) -> Tensor:
    return gather(layer)[index]


def _write(
    file: IO[bytes], header: Mapping[str, Any], sources: Mapping[str, Callable[[], Tensor]]
) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for source in sources.values():
        tensor = source().detach().to("cpu").contiguous()
        file.write(tensor.flatten().view(torch.uint8).numpy().data)


class SavedCache:
    """An open cache file; tensors are read when they are asked for."""

    def __init__(self, file: Any, described: Mapping[str, Any]) -> None:
        self._file = file
        self.batch: int = described["batch"]
        self.logical, self.physical, self.evicted_at = map(tuple, described["lengths"])

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return ``(k, v)`` of a layer, ``[B, physical, Hkv, D]``."""
        return (
            self._file.get_tensor(f"layers.{layer}.k"),
            self._file.get_tensor(f"layers.{layer}.v"),
        )

    def auxiliary(self) -> dict[str, Tensor]:
        """Return the side state by ``"layer.name"``."""
        prefix = "auxiliary."
        names = [name for name in self._file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): self._file.get_tensor(name) for name in names}

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)


def read_cache(path: Path) -> SavedCache:
    """Open what `write_cache` wrote.

    Raises
    ------
    ValueError
        If the file is damaged or holds something else.
    FileNotFoundError
        If there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no saved cache {path}")
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no saved cache: it was written by something else")
    return SavedCache(file, json.loads(metadata["cache"]))
