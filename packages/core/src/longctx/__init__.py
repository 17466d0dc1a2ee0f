"""One protocol for long-context attention, interchangeable backends, plain PyTorch built in."""

from longctx.backend_base import BackendBase
from longctx.binding import bind
from longctx.dispatch import explain, use
from longctx.errors import (
    BackendNotFoundError,
    CheckpointError,
    LongctxError,
    PluginError,
    UnsupportedError,
)
from longctx.explanation import Candidate, Explanation
from longctx.hookspecs import hookimpl
from longctx.ops.block_sparse import block_sparse_attention, block_sparse_attention_with_lse
from longctx.ops.decode import decode_attention, decode_attention_with_lse, merge_attention
from longctx.ops.dsa import (
    QuantizedTensor,
    index_scores,
    index_topk,
    quantize_fp8,
    topk_attention,
    topk_attention_with_lse,
)
from longctx.ops.flash import flash_attention, flash_attention_with_lse
from longctx.ops.lightning import lightning_attention, lightning_decode
from longctx.ops.star import (
    star_context_attention,
    star_context_attention_with_lse,
    star_query_attention,
    star_query_attention_with_lse,
)
from longctx.ops.token_sparse import (
    select_tokens,
    token_scores,
    token_sparse_attention,
    token_sparse_attention_with_lse,
)
from longctx.plans import (
    BlockPlan,
    Plan,
    RetentionPlan,
    StripePlan,
    TokenSetPlan,
    TopKPlan,
    WindowPlan,
)
from longctx.plugins import PluginFailure, register_plugin, registry, reset_registry
from longctx.protocols.attention import AttentionOutput, LightningOutput
from longctx.protocols.backend import Backend, BackendInfo
from longctx.protocols.kv_cache import CacheView, KVCache, KVCacheInfo
from longctx.protocols.selector import (
    Budget,
    LayerChoice,
    Phase,
    SelectContext,
    SelectorInfo,
    SparsitySelector,
)
from longctx.protocols.version import PROTOCOL_VERSION
from longctx.support import OpRequest, OpSupport, Reason, ReasonCode

__all__ = [
    "PROTOCOL_VERSION",
    "AttentionOutput",
    "Backend",
    "BackendBase",
    "BackendInfo",
    "BackendNotFoundError",
    "BlockPlan",
    "Budget",
    "CacheView",
    "Candidate",
    "CheckpointError",
    "Explanation",
    "KVCache",
    "KVCacheInfo",
    "LayerChoice",
    "LightningOutput",
    "LongctxError",
    "OpRequest",
    "OpSupport",
    "Phase",
    "Plan",
    "PluginError",
    "PluginFailure",
    "QuantizedTensor",
    "Reason",
    "ReasonCode",
    "RetentionPlan",
    "SelectContext",
    "SelectorInfo",
    "SparsitySelector",
    "StripePlan",
    "TokenSetPlan",
    "TopKPlan",
    "UnsupportedError",
    "WindowPlan",
    "__version__",
    "bind",
    "block_sparse_attention",
    "block_sparse_attention_with_lse",
    "decode_attention",
    "decode_attention_with_lse",
    "explain",
    "flash_attention",
    "flash_attention_with_lse",
    "hookimpl",
    "index_scores",
    "index_topk",
    "lightning_attention",
    "lightning_decode",
    "merge_attention",
    "quantize_fp8",
    "register_plugin",
    "registry",
    "reset_registry",
    "select_tokens",
    "star_context_attention",
    "star_context_attention_with_lse",
    "star_query_attention",
    "star_query_attention_with_lse",
    "token_scores",
    "token_sparse_attention",
    "token_sparse_attention_with_lse",
    "topk_attention",
    "topk_attention_with_lse",
    "use",
]


def __getattr__(name: str) -> object:
    if name == "__version__":  # read on demand: importing the metadata machinery costs time
        from longctx.probes import distribution_version

        return distribution_version("longctx-core")
    raise AttributeError(f"module 'longctx' has no attribute {name!r}")
