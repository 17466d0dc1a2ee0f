"""Two backends that end the interpreter, when run and when loaded, and one too modest."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from longctx import PROTOCOL_VERSION, BackendBase, BackendInfo, OpSupport, hookimpl
from longctx.torch_backend import decode, lightning
from longctx.torch_backend.support import SUPPORT


def crash(*args: Any, **kwargs: Any) -> Any:
    """End the process as a wild pointer does."""
    os.kill(os.getpid(), signal.SIGSEGV)


def _crashing() -> BackendBase:
    ops = ("lightning_decode", "merge_attention")
    return BackendBase(
        {op: SUPPORT[op] for op in ops},
        {"lightning_decode_forward": crash, "merge_forward": decode.merge_forward},
    )


def _modest() -> BackendBase:
    only_bf16 = OpSupport(dtypes=frozenset({torch.bfloat16}), devices=frozenset({"cpu"}))
    return BackendBase(
        {"lightning_decode": only_bf16},
        {"lightning_decode_forward": lightning.lightning_decode_forward},
    )


@hookimpl
def longctx_backends() -> list[BackendInfo]:
    """Offer the backends."""
    loaders = {"crashes-when-run": _crashing, "crashes-when-loaded": crash, "modest": _modest}
    return [BackendInfo(name, "1.0", PROTOCOL_VERSION, load) for name, load in loaders.items()]
