"""One protocol for long-context attention, interchangeable backends, plain PyTorch built in."""
import importlib, os
from longctx.errors import *
from longctx.hookspecs import hookimpl
from longctx.protocols.version import PROTOCOL_VERSION
from longctx.dispatch import BoundBackend, explain, use
from longctx.plans import *
from longctx.protocols.attention import AttentionOutput, LightningOutput
for _f in ("flash","decode","lightning","dsa","block_sparse","star","token_sparse"):
    try:
        _m = importlib.import_module(f"longctx.ops.{_f}")
    except ModuleNotFoundError as _e:
        if _e.name != f"longctx.ops.{_f}": raise
        continue
    for _n in _m.__all__: globals()[_n] = getattr(_m, _n)
