"""Registration: cheap metadata now, the primitives on first use."""

from __future__ import annotations

from importlib.metadata import version

import torch

from longctx import Backend, BackendBase, BackendInfo, OpSupport, hookimpl

_DTYPES = frozenset({torch.float32, torch.bfloat16})
_DEVICES = frozenset({"cpu", "cuda"})
SUPPORT = {
    "flash_attention": OpSupport(
        dtypes=_DTYPES, head_dims=frozenset({32, 64}), devices=_DEVICES, priority=1
    ),
    "merge_attention": OpSupport(dtypes=_DTYPES, devices=_DEVICES, priority=1),
}


def _load() -> Backend:
    from longctx_naive.primitives import flash_forward, merge_forward

    return BackendBase(SUPPORT, {"flash_forward": flash_forward, "merge_forward": merge_forward})


@hookimpl
def longctx_backends() -> list[BackendInfo]:
    """Offer the backend called ``"naive"``."""
    return [
        BackendInfo(
            name="naive",
            version=version("longctx-naive"),
            protocol=(1, 0),  # what it was written for, whatever core it meets
            load=_load,
            description="all scores in memory",
        )
    ]
