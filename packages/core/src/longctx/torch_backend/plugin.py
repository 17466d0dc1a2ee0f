"""Registration of the built-in backend."""
from __future__ import annotations
import importlib
from longctx.backend_base import BackendBase
from longctx.hookspecs import hookimpl
from longctx.protocols.backend import Backend, BackendInfo
from longctx.protocols.version import PROTOCOL_VERSION
from longctx.protocols.attention import OPS, FEATURES, GRADIENT_PRIMITIVES
from longctx.support import OpSupport
import torch

def _load() -> Backend:
    prims = {}
    for f in ("flash","decode","lightning","dsa","block_sparse","star","token_sparse"):
        try: m = importlib.import_module(f"longctx.torch_backend.{f}")
        except ModuleNotFoundError as e:
            if e.name != f"longctx.torch_backend.{f}": raise
            continue
        prims.update({n: getattr(m, n) for n in m.__all__})
    fl = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn})
    sup = {op: OpSupport(dtypes=fl, devices=frozenset({"cpu","cuda"}), features=frozenset(FEATURES), gradient=op in GRADIENT_PRIMITIVES, priority=10) for op in OPS}
    return BackendBase(sup, prims)

@hookimpl
def longctx_backends():
    return [BackendInfo(name="torch", version="0.1.0", protocol=PROTOCOL_VERSION, load=_load, description="plain PyTorch")]
