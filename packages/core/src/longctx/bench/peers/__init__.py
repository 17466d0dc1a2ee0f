"""Libraries to compare with, one file each: what they run, and how they are called."""

from __future__ import annotations

from collections.abc import Mapping

from longctx.bench.peers.compositions import Compositions
from longctx.bench.peers.fla import Fla
from longctx.bench.peers.flash_attn_cute import FlashAttnCute
from longctx.bench.peers.flashinfer import FlashInfer
from longctx.bench.peers.flex import FlexAttention
from longctx.bench.peers.peer import Peer
from longctx.bench.peers.sdpa import Sdpa

__all__ = ["PEERS"]

_ALL: tuple[Peer, ...] = (
    Sdpa("sdpa"),
    Sdpa("sdpa-fa2"),
    Sdpa("sdpa-cudnn"),
    FlexAttention(),
    FlashAttnCute(),
    FlashInfer(),
    Fla(),
    Compositions(),
)
PEERS: Mapping[str, Peer] = {peer.name: peer for peer in _ALL}
"""Peers by name, in the order of the tables."""
