"""Long-context language models that run on whichever longctx backend is installed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longctx_models.engine import LongContextLLM
    from longctx_models.generation import Generation, TextStream
    from longctx_models.loading import packaged_checkpoints
    from longctx_models.methods import METHODS, make_method

__all__ = [
    "METHODS",
    "Generation",
    "LongContextLLM",
    "TextStream",
    "make_method",
    "packaged_checkpoints",
]

_HOMES = {
    "LongContextLLM": "engine",
    "Generation": "generation",
    "TextStream": "generation",
    "packaged_checkpoints": "loading",
    "METHODS": "methods",
    "make_method": "methods",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: subpackages without PyTorch stay light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"longctx_models.{_HOMES[name]}"), name)
