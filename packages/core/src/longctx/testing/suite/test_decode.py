"""Decode over a contiguous KV cache: lengths, new tokens, heads, windows, unused slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.protocols.attention import AttentionOutput
from longctx.reference import decode as oracle
from longctx.testing.subject import LENGTHS, Subject
from longctx.testing.suite.test_flash import check_found, check_uniform, coarse_qkv, coded_keys

__all__ = ["TestDecodeAttention"]

NONSENSE = (-1, 10**6, -(2**31))
"""What entries of a page table that no sequence uses may hold."""


def int32(subject: Subject, *values: int) -> Tensor:
    """Return integers on the device under test."""
    return torch.tensor(values, dtype=torch.int32, device=subject.device)


def make_cache(
    subject: Subject,
    lengths: Sequence[int],
    capacity: int,
    *,
    page_size: int | None = None,
    kv_heads: int = 2,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys, values and a page table (or None) whose unused parts hold NaN and nonsense.

    Pages are shuffled over all sequences, with some that nobody uses.
    """
    batch = len(lengths)
    table: Tensor | None = None
    shape = (batch, capacity)
    if page_size is not None:
        pages = -(-capacity // page_size)
        shape = (batch * pages + 3, page_size)
        order = torch.randperm(shape[0], generator=subject.generator)
        table = order[: batch * pages].view(batch, pages).to(torch.int32)
    used = torch.zeros(shape, dtype=torch.bool)
    for b, length in enumerate(lengths):
        slots = torch.arange(length)
        if table is None or page_size is None:
            used[b, :length] = True
        else:
            used[table[b][slots // page_size].long(), slots % page_size] = True
            table[b, -(-length // page_size) :] = NONSENSE[b % len(NONSENSE)]
    unused = ~used[..., None, None].to(subject.device)
    k, v = (
        subject.randn(*shape, kv_heads, dim, dtype=torch.float32)
        .masked_fill(unused, torch.nan)
        .to(dtype or subject.dtype)
        for dim in (head_dim, value_dim or head_dim)
    )
    return k, v, None if table is None else table.to(subject.device)


def check_decode(
    subject: Subject, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **options: Any
) -> AttentionOutput:
    """Run decode_attention and check each sequence against the oracle; return the result."""
    got: AttentionOutput = subject.run(
        longctx.decode_attention_with_lse, q, k, v, cache_seqlens=lengths, **options
    )
    assert got.out.dtype == q.dtype
    assert got.lse.dtype == torch.float32
    assert got.out.is_contiguous()
    assert got.lse.is_contiguous()
    check_sequences(subject, got, q, k, v, lengths, **options)
    return got


def check_sequences(
    subject: Subject,
    got: AttentionOutput,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    **options: Any,
) -> None:
    """Check each sequence with a budget of its own: short ones have larger outputs."""
    table = options.pop("page_table", None)
    if table is not None:
        table = table.clamp(0, k.shape[0] - 1)
    # the oracle gathers whole pages before it cuts them to length
    k, v = (t.float().nan_to_num().to(t.dtype) for t in (k, v))
    options |= {"cache_seqlens": lengths, "page_table": table}
    exact = oracle.decode_attention(q.double(), k.double(), v.double(), **options)
    low = oracle.decode_attention(*coarse_qkv(q, k, v), **options)
    for b, length in enumerate(lengths.tolist()):
        for name, one, right, about in zip(("out", "lse"), got, exact, low, strict=True):
            subject.check(one[b], right[b], about[b], f"{name} of {length} keys")


def _head_major(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _larger(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 9, *tensor.shape[2:]), torch.nan)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def _joined(tensor: Tensor) -> Tensor:
    """Return a view of a tensor that holds keys and values of a slot side by side."""
    return torch.cat([tensor, torch.full_like(tensor, torch.nan)], 3)[..., : tensor.shape[3]]


@pytest.mark.longctx_op("decode_attention")
class TestDecodeAttention:
    """1 to 16 new tokens over caches whose unused slots hold NaN."""

    @pytest.mark.parametrize("length", LENGTHS)
    def test_every_length(self, subject: Subject, length: int) -> None:
        subject.require()
        subject.require_length(length)
        lengths = [length, 1, length // 3 + 1]
        k, v, _ = make_cache(subject, lengths, length + 5)
        check_decode(subject, subject.randn(3, 1, 4, 64), k, v, int32(subject, *lengths))

    @pytest.mark.parametrize("q_len", [1, 2, 3, 5, 8, 15, 16])
    def test_new_tokens(self, subject: Subject, q_len: int) -> None:
        """Each sees what came before and itself; one sequence holds nothing else."""
        subject.require(*(("multi-token",) if q_len > 1 else ()))
        subject.require_length(1000)
        lengths = [q_len, 1000, 130]
        k, v, _ = make_cache(subject, lengths, 1000)
        check_decode(subject, subject.randn(3, q_len, 4, 64), k, v, int32(subject, *lengths))

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads"), [(1, 1), (3, 3), (4, 1), (8, 2), (8, 1), (16, 1), (32, 2), (6, 2)]
    )
    @pytest.mark.parametrize("q_len", [1, 4])
    def test_grouped_heads(
        self, subject: Subject, q_len: int, q_heads: int, kv_heads: int
    ) -> None:
        features = ("multi-token",) if q_len > 1 else ()
        subject.require(*features, q_heads=q_heads, kv_heads=kv_heads)
        subject.require_length(255)
        k, v, _ = make_cache(subject, [129, 255], 300, kv_heads=kv_heads)
        q = subject.randn(2, q_len, q_heads, 64)
        check_decode(subject, q, k, v, int32(subject, 129, 255))

    @pytest.mark.parametrize(
        ("head_dim", "value_dim"), [(64, 64), (128, 128), (256, 256), (192, 128), (96, 96)]
    )
    @pytest.mark.parametrize("q_len", [1, 4])
    def test_head_dims(self, subject: Subject, q_len: int, head_dim: int, value_dim: int) -> None:
        features = ("multi-token",) if q_len > 1 else ()
        subject.require(*features, head_dim=head_dim, value_dim=value_dim)
        subject.require_length(255)
        k, v, _ = make_cache(subject, [63, 255], 255, head_dim=head_dim, value_dim=value_dim)
        q = subject.randn(2, q_len, 4, head_dim)
        check_decode(subject, q, k, v, int32(subject, 63, 255))

    @pytest.mark.parametrize(
        "window", [(0, 0), (1, None), (16, 0), (127, 0), (128, None), (5000, 0)]
    )
    @pytest.mark.parametrize("q_len", [1, 7])
    def test_windows(self, subject: Subject, q_len: int, window: tuple[int, int | None]) -> None:
        subject.require("window", *(("multi-token",) if q_len > 1 else ()))
        subject.require_length(1000)
        lengths = [q_len, 129, 1000]
        k, v, _ = make_cache(subject, lengths, 1003)
        q = subject.randn(3, q_len, 4, 64)
        check_decode(subject, q, k, v, int32(subject, *lengths), window=window)

    def test_keys_before_the_window_do_not_matter(self, subject: Subject) -> None:
        """A rolling cache overwrites them, with the keys of other tokens."""
        subject.require("window")
        subject.require_length(1000)
        k, v, _ = make_cache(subject, [1000, 700], 1000)
        q, lengths = subject.randn(2, 1, 4, 64), int32(subject, 1000, 700)
        got = check_decode(subject, q, k, v, lengths, window=(70, 0))
        for cache in (k, v):
            for b, length in enumerate((1000, 700)):
                cache[b, : length - 71] = subject.randn(length - 71, 2, 64, scale=100.0)
        again = subject.run(
            longctx.decode_attention_with_lse, q, k, v, cache_seqlens=lengths, window=(70, 0)
        )
        assert torch.equal(again.out, got.out)
        assert torch.equal(again.lse, got.lse)

    @pytest.mark.parametrize("softcap", [0.5, 20.0])
    @pytest.mark.parametrize("q_len", [1, 5])
    def test_softcap(self, subject: Subject, q_len: int, softcap: float) -> None:
        subject.require("softcap", *(("multi-token",) if q_len > 1 else ()))
        subject.require_length(300)
        k, v, _ = make_cache(subject, [65, 300], 300)
        q = 10 * subject.randn(2, q_len, 4, 64)
        check_decode(subject, q, k, v, int32(subject, 65, 300), softcap=softcap)

    @pytest.mark.parametrize("spread", [2.0, 30.0])
    @pytest.mark.parametrize("q_len", [1, 5])
    def test_sinks(self, subject: Subject, q_len: int, spread: float) -> None:
        subject.require("sinks", *(("multi-token",) if q_len > 1 else ()), q_heads=8)
        subject.require_length(1000)
        k, v, _ = make_cache(subject, [q_len, 1000], 1000)
        sinks = subject.randn(8, dtype=torch.float32, scale=spread)
        q = subject.randn(2, q_len, 8, 64)
        check_decode(subject, q, k, v, int32(subject, q_len, 1000), sinks=sinks)

    def test_everything_at_once(self, subject: Subject) -> None:
        subject.require("window", "softcap", "sinks", "multi-token", q_heads=8)
        subject.require_length(1000)
        k, v, _ = make_cache(subject, [1000, 77], 1003)
        check_decode(
            subject, subject.randn(2, 3, 8, 64), k, v, int32(subject, 1000, 77),
            window=(130, 0), softcap=3.0, scale=0.4, sinks=subject.randn(8, dtype=torch.float32),
        )  # fmt: skip

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize("q_len", [1, 16])
    def test_every_query_finds_its_own_key(
        self, subject: Subject, q_len: int, head_dim: int
    ) -> None:
        """Another key for every sequence, head and token, up to the token itself."""
        features = ("multi-token",) if q_len > 1 else ()
        subject.require(*features, head_dim=head_dim)
        subject.require_length(1500)
        lengths = int32(subject, 1500, 63, 1000)
        _, v, _ = make_cache(subject, lengths.tolist(), 1500, head_dim=head_dim)
        k = coded_keys(subject, 3, 1500, 2, head_dim)
        last = lengths.view(-1, 1, 1) - q_len + torch.arange(q_len, device=subject.device)[:, None]
        back = subject.randint(0, 1500, (3, q_len, 4))
        back[:, :, ::2] %= 2
        wanted = (last - back).clamp(min=0).long().unsqueeze(3).expand(-1, -1, -1, head_dim)
        q = k.repeat_interleave(2, 2).gather(1, wanted)
        got = subject.run(
            longctx.decode_attention_with_lse, q, k, v, cache_seqlens=lengths, scale=1.0
        )
        check_found(subject, got, v.repeat_interleave(2, 2).gather(1, wanted), head_dim * 64)

    @pytest.mark.parametrize("length", [1, 129, 1000, 4099])
    @pytest.mark.parametrize("window", [None, 100])
    def test_exactly_the_keys_of_the_sequence_are_seen(
        self, subject: Subject, length: int, window: int | None
    ) -> None:
        subject.require(*(("window",) if window else ()))
        subject.require_length(length)
        k, v, _ = make_cache(subject, [length], length + 40, kv_heads=1)
        got = subject.run(
            longctx.decode_attention_with_lse, torch.zeros_like(subject.randn(1, 1, 2, 64)), k, v,
            cache_seqlens=int32(subject, length), window=(window, 0) if window else None,
        )  # fmt: skip
        begin = max(0, length - 1 - window) if window else 0
        ends = (torch.tensor([end], device=subject.device) for end in (begin, length))
        check_uniform(subject, got, v[:, :length], *ends)

    def test_long_caches(self, subject: Subject) -> None:
        """So many keys that every backend splits them; 16 bits lose nothing by it."""
        subject.require("multi-token", q_heads=2, kv_heads=1)
        subject.require_length(LENGTHS[-1])  # an interpreter has asked for less
        lengths = [40_003, 30_001]
        k, v, _ = make_cache(subject, lengths, 40_003, kv_heads=1)
        check_decode(subject, subject.randn(2, 2, 2, 64), k, v, int32(subject, *lengths))

    @pytest.mark.parametrize("view", [_head_major, _larger, _joined])
    @pytest.mark.parametrize("q_len", [1, 3])
    def test_strides_of_the_cache_do_not_matter(
        self, subject: Subject, q_len: int, view: Callable[[Tensor], Tensor]
    ) -> None:
        subject.require(*(("multi-token",) if q_len > 1 else ()))
        subject.require_length(255)
        k, v, _ = make_cache(subject, [255, 129], 260)
        q = subject.randn(2, q_len, 4, 64)
        check_decode(subject, q, view(k), view(v), int32(subject, 255, 129))

    def test_one_cache_may_serve_as_keys_and_values(self, subject: Subject) -> None:
        subject.require()
        subject.require_length(129)
        k, _, _ = make_cache(subject, [129, 30], 129)
        check_decode(subject, subject.randn(2, 1, 4, 64), k, k, int32(subject, 129, 30))

    def test_an_empty_batch(self, subject: Subject) -> None:
        subject.require()
        cache = subject.randn(0, 5, 2, 64)
        out, lse = subject.run(
            longctx.decode_attention_with_lse, subject.randn(0, 1, 4, 64), cache, cache,
            cache_seqlens=int32(subject),
        )  # fmt: skip
        assert out.shape == (0, 1, 4, 64)
        assert lse.shape == (0, 4, 1)

    def test_a_sequence_does_not_depend_on_its_batch(self, subject: Subject) -> None:
        """What runs beside a sequence changes it by rounding at most, NaN or not."""
        subject.require()
        subject.require_length(1000)
        lengths = int32(subject, 1000, 129, 500)
        k, v, _ = make_cache(subject, lengths.tolist(), 1000)
        q = subject.randn(3, 1, 4, 64)
        k[0], v[2] = torch.nan, torch.nan
        got = subject.run(longctx.decode_attention_with_lse, q, k, v, cache_seqlens=lengths)
        alone = slice(1, 2)
        check_sequences(
            subject, AttentionOutput(got.out[alone], got.lse[alone]),
            q[alone], k[alone], v[alone], lengths[alone],
        )  # fmt: skip

    def test_same_inputs_give_the_same_bits(self, subject: Subject) -> None:
        subject.require()
        subject.require_length(4099)
        if not subject.support.deterministic:
            pytest.skip("not declared: determinism")
        lengths = int32(subject, 4099, 129)
        k, v, _ = make_cache(subject, lengths.tolist(), 4099)
        q = subject.randn(2, 1, 4, 64)
        runs = [
            subject.run(longctx.decode_attention_with_lse, q, k, v, cache_seqlens=lengths)
            for _ in range(20 if subject.device.type == "cuda" else 2)
        ]
        for run in runs[1:]:
            assert torch.equal(run.out, runs[0].out)
            assert torch.equal(run.lse, runs[0].lse)
