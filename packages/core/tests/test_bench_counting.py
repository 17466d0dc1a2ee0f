"""The bench's FLOP and byte counts against counts by brute force from masks and tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longctx.bench.case import Case, axes
from longctx.bench.counting import kept_pairs, work_of
from longctx.bench.plans import block_sparse_plan, sequence_ends, token_set_plan, topk_indices
from longctx.bench.shapes import calls, cpu, dense, sparse, standard_cases
from longctx.bench.workloads import WORKLOADS
from longctx.plans import TopKPlan
from longctx.protocols.families import OPS
from longctx.reference.dsa import index_mask
from longctx.reference.flash import flash_mask
from longctx.reference.star import star_context_mask

HEADS = {"q_heads": 6, "kv_heads": 2, "head_dim": 8}
CPU = torch.device("cpu")


def flash(**changes) -> Case:
    sizes = axes(batch=3, seq=37, **HEADS)
    return replace(Case("flash_attention", "test", sizes, dtype="fp32"), **changes)


def sparse_case(**changes) -> Case:
    sizes = axes(batch=2, seq=75, **HEADS, block=16, columns=7, diagonals=9, sink_tokens=3)
    return replace(Case("block_sparse_attention", "test", sizes, dtype="fp32"), **changes)


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, 5), (True, 100), (True, 0)]
)
def test_flash_pairs_flops_and_bytes(causal, window):
    case = flash(causal=causal, window=window)
    bounds = None if window is None else (window, 0)
    mask = flash_mask(37, 37, causal=causal, window=bounds)
    assert kept_pairs(case) == int(mask.sum()) * 3 * 6
    work = work_of(case)
    assert work.flops == 4 * 8 * int(mask.sum()) * 18
    inputs = WORKLOADS[case.op].inputs(case, CPU)
    assert work.read == nbytes(*inputs.values())
    assert work.written == nbytes(inputs["q"])


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 5)])
def test_packed_sequences_see_themselves(causal, window):
    case = flash(axes=axes(batch=1, seq=37, sequences=3, **HEADS), causal=causal, window=window)
    ends = sequence_ends(case)
    assert ends[0] == 0
    assert ends[-1] == 37
    assert (ends.diff() > 0).all()
    assert len(ends) == 4
    bounds = None if window is None else (window, 0)
    kept = sum(
        int(flash_mask(n, n, causal=causal, window=bounds).sum()) for n in ends.diff().tolist()
    )
    assert kept_pairs(case) == kept * 6
    inputs = WORKLOADS[case.op].inputs(case, CPU)
    assert torch.equal(inputs["cu_seqlens_q"], ends)
    assert work_of(case).read == nbytes(*inputs.values())


def test_a_causal_square_is_half_of_the_full_one():
    sizes = axes(batch=1, seq=16384, q_heads=1, kv_heads=1, head_dim=128)
    full = work_of(Case("flash_attention", "test", sizes, causal=False)).flops
    half = work_of(Case("flash_attention", "test", sizes)).flops
    assert full == 4 * 128 * 16384**2
    assert half / full == pytest.approx(0.5, rel=1e-4)


def test_backward_is_five_products_for_two():
    case = flash(backward=True)
    forward, backward = work_of(flash()), work_of(case)
    assert backward.flops == 2.5 * forward.flops
    inputs = WORKLOADS[case.op].inputs(case, CPU)
    out, lse = inputs["dout"], torch.empty(3, 6, 37)
    assert backward.read == nbytes(*inputs.values(), out, lse)
    assert backward.written == nbytes(*(inputs[name] for name in "qkv"))


@pytest.mark.parametrize(
    ("plan", "density", "window"),
    [
        ("block", 0.3, None),
        ("block", 0.01, None),
        ("block", 1.0, None),
        ("stripe", None, None),
        ("window", None, 11),
        ("window", None, 200),
    ],
)
def test_plan_pairs_and_bytes(plan, density, window):
    case = sparse_case(plan=plan, density=density, window=window)
    made = block_sparse_plan(case)
    mask = made.to_mask(75, 75)
    # a shared or KV-head set counts for each of its query heads
    assert kept_pairs(case) == pytest.approx(
        int(mask.sum()) * (6 / mask.shape[1]) * (2 / mask.shape[0])
    )
    assert mask.any(2).all(), "every key is read: by its own query"
    inputs = WORKLOADS[case.op].inputs(case, CPU)
    tensors = [inputs[name] for name in "qkv"]
    kept_entries = {
        "window": 0,
        "stripe": (7 + 9 + 2) * 6 * 2,
        "block": 0 if plan != "block" else int(made.counts.sum()) + made.counts.numel(),
    }[plan]
    assert work_of(case).read == nbytes(*tensors) + 4 * kept_entries


def test_a_block_plan_keeps_its_density_of_earlier_blocks():
    case = sparse_case(plan="block", density=0.5)
    counts = block_sparse_plan(case).counts
    assert counts[0, 0].tolist() == [1, 1, 2, 2, 3]
    indices = block_sparse_plan(case).indices
    assert all(4 in row for row in indices[:, :, 4].flatten(0, 1).tolist())


def test_decode_counts_what_is_read():
    sizes = axes(batch=2, q_len=1, k_len=70, **HEADS, page_size=0)
    case = Case("decode_attention", "test", sizes, kv_dtype="fp8_e4m3")
    inputs = WORKLOADS[case.op].inputs(case, CPU)
    tensors = [t for t in inputs.values() if t is not None]
    assert work_of(case).read == nbytes(*tensors)
    assert work_of(case).flops == 4 * 8 * 70 * 6 * 2
    paged = replace(case, kv_dtype="").resized(page_size=16)
    inputs = WORKLOADS[case.op].inputs(paged, CPU)
    spare = inputs["k_cache"].shape[0] * 16 - 2 * 70  # slots of last pages that hold nothing
    caches = nbytes(inputs["k_cache"], inputs["v_cache"]) - 2 * spare * 2 * 8 * 2
    others = nbytes(inputs["q"], inputs["page_table"], inputs["cache_seqlens"])
    assert work_of(paged).read == caches + others


def test_lightning_counts():
    sizes = axes(batch=2, seq=33, heads=3, head_dim=16)
    case = Case("lightning_attention", "test", sizes)
    inputs = WORKLOADS[case.op].inputs(case, CPU)
    work = work_of(case)
    assert work.flops == 33 * 2 * 3 * (2 * 16 * 16 + 2 * 16 * 16)
    assert work.read == nbytes(*inputs.values())
    assert work.written == nbytes(inputs["v"]) + 2 * 3 * 16 * 16 * 4
    back = replace(case, backward=True)
    inputs = WORKLOADS[case.op].inputs(back, CPU)
    assert work_of(back).read == nbytes(*inputs.values())
    assert work_of(back).written == nbytes(*(inputs[n] for n in "qkv"))
    assert work_of(back).flops == 2.5 * work.flops


@pytest.mark.parametrize("op", ["index_scores", "index_topk"])
@pytest.mark.parametrize("dtype", ["fp8_e4m3", "bf16"])
def test_indexer_counts(op, dtype):
    sizes = axes(batch=2, q_len=9, k_len=31, index_heads=5, index_dim=16, top_k=4)
    case = Case(op, "test", sizes, dtype=dtype)
    pairs = int(index_mask(9, 31, causal=True).sum()) * 2
    work = work_of(case)
    assert work.flops == 2 * 16 * 5 * pairs
    inputs = WORKLOADS[op].inputs(case, CPU)
    assert work.read == nbytes(*(t for t in inputs.values() if t is not None))
    assert work.written == 2 * 9 * 4 * (4 if op == "index_topk" else 31)


@pytest.mark.parametrize(("q_len", "top_k"), [(1, 6), (40, 6), (3, 100)])
def test_topk_counts(q_len, top_k):
    sizes = {"q_heads": 4, "kv_heads": 1, "head_dim": 12, "value_dim": 8}
    case = Case(
        "topk_attention", "test", axes(batch=2, q_len=q_len, k_len=40, **sizes, top_k=top_k)
    )
    plan = TopKPlan(topk_indices(case, CPU))
    mask = plan.to_mask(q_len, 40)
    valid = plan.indices >= 0
    assert int(valid.sum()) == int(mask.sum()), "keys are distinct"
    assert not (mask & ~flash_mask(q_len, 40, causal=True)).any(), "no key behind its query"
    assert kept_pairs(case) == int(mask.sum()) * 4
    work = work_of(case)
    assert work.flops == 2 * (12 + 8) * int(mask.sum()) * 4
    rows = min(40, int(mask[0].sum()))  # at most, and exact for a single query
    assert work.read == 2 * (q_len * 4 * 12 * 2 + rows * 12 * 2 + q_len * top_k * 4)
    if q_len == 1:
        assert rows == int(mask.any(2).sum()) / 2


def test_keys_chosen_by_kv_head():
    case = Case("topk_attention", "test", axes(batch=2, q_len=3, k_len=40, **HEADS, top_k=6))
    inputs = WORKLOADS[case.op].inputs(case, CPU)
    plan = inputs["plan"]
    assert (plan.head_axis, plan.indices.shape) == ("kv", (2, 3, 2, 6))
    assert not torch.equal(plan.indices[:, :, 0], plan.indices[:, :, 1])
    assert inputs["v"].untyped_storage().data_ptr() != inputs["k"].untyped_storage().data_ptr()
    assert kept_pairs(case) == int(plan.to_mask(3, 40).sum()) * 3
    one = case.resized(q_len=1)
    inputs = WORKLOADS[case.op].inputs(one, CPU)
    rows = 2 * 2 * 6  # a single query's keys are distinct
    read = nbytes(inputs["q"], inputs["plan"].indices) + 2 * rows * 8 * 2
    assert work_of(one).read == read


@pytest.mark.parametrize(("length", "block", "anchor"), [(75, 16, 16), (64, 16, 5), (10, 16, 16)])
def test_star_counts(length, block, anchor):
    sizes = axes(batch=2, seq=length, **HEADS, block_size=block, anchor_size=anchor)
    case = Case("star_context_attention", "test", sizes)
    mask = star_context_mask(length, length, block_size=block, anchor_size=anchor)
    assert kept_pairs(case) == int(mask.sum()) * 12


def test_star_query_counts():
    sizes = axes(batch=1, q_len=5, shards=3, shard_len=11, **HEADS)
    case = Case("star_query_attention", "test", sizes)
    mask = flash_mask(5, 33, causal=True)
    assert kept_pairs(case) == int(mask.sum()) * 6
    inputs = WORKLOADS[case.op].inputs(case, CPU)
    parts = [t for shard in inputs["shards"] for t in shard]
    assert work_of(case).read == nbytes(inputs["q"], *parts)


def test_token_sparse_counts():
    sizes = axes(batch=2, seq=41, **HEADS)
    case = Case("token_sparse_attention", "test", sizes, density=0.4)
    plan = token_set_plan(case)
    mask = plan.to_mask(41, 41)
    assert kept_pairs(case) == int(mask.sum())
    group = mask.view(2, 2, 3, 41, 41)
    rows = int(group.any(2).any(2).sum())  # distinct keys a KV head
    entries = int(mask.any(3).sum())
    work = work_of(case)
    assert work.read == (entries + 2 * rows) * 8 * 2 + (entries + 12) * 4
    scores = Case(
        "token_scores", "test", axes(batch=2, window_queries=7, k_len=30, **HEADS), dtype="fp32"
    )
    seen = int(flash_mask(7, 30, causal=True).sum())
    assert work_of(scores).flops == 2 * 8 * seen * 12
    assert work_of(scores).written == 2 * 6 * 23 * 4


def test_elementwise_ops_have_bytes_alone():
    quantize = Case("quantize_fp8", "test", axes(rows=10, channels=16))
    assert (work_of(quantize).flops, work_of(quantize).bytes) == (0, 10 * 16 * 3 + 10 * 4)
    merge = Case("merge_attention", "test", axes(parts=4, batch=2, seq=3, q_heads=5, head_dim=8))
    inputs = WORKLOADS["merge_attention"].inputs(merge, CPU)
    assert work_of(merge).read == nbytes(*inputs.values())
    assert work_of(merge).written == nbytes(*inputs.values()) / 4
    select = Case("select_tokens", "test", axes(batch=1, heads=4, prefix_len=50, recent=3))
    assert work_of(select).bytes == 4 * 50 * 4 + 4 * 54 * 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_shapes_with_work(device):
    cases = standard_cases(tuple(OPS), device=device)
    assert {case.op for case in cases} == set(OPS)
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    for case in cases:
        work = work_of(case)
        assert work.read > 0
        assert work.written > 0
        assert WORKLOADS[case.op].reduced(case) != case or case.get("batch", 1) <= 2


def test_the_standard_grids_are_there():
    names = {(case.grid, case.name) for case in dense.CASES}
    fa3 = [case for case in dense.CASES if case.grid == "fa3"]
    assert len(fa3) == 36
    assert {case["batch"] * case["seq"] for case in fa3} == {16384}
    assert {case["q_heads"] * case["head_dim"] for case in fa3} == {2048}
    assert ("prefill", "B1 T128K H64/8 D128 causal bf16") in names
    assert ("prefill", "B1 T64K H32 D128 window4096 bf16") in names
    assert ("paged", "B32 Q1 K1M H32/8 D128 page16 bf16 kv-fp8_e4m3") in names
    assert ("prefill", "B1 T128K H64 D128 bf16 backward") in names
    assert any(case["q_len"] == 8192 for case in sparse.CASES if case.op == "index_topk")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_single_calls_run_only_where_their_grid_is_named(device):
    asked = standard_cases(tuple(OPS), device=device, shapes="call")
    assert set(asked) == set(calls.CASES)
    assert len(asked) == len({(case.op, case.name) for case in calls.CASES}) == 21
    assert {case.op for case in calls.CASES} == set(OPS)
    assert {case.grid for case in calls.CASES} == {calls.GRID}
    for words in ("", "*", "c*", "T128", "K4K"):
        cases = standard_cases(tuple(OPS), device=device, shapes=words)
        assert calls.GRID not in {case.grid for case in cases}
    (one,) = standard_cases(["flash_attention"], device=device, shapes="Call window*")
    assert one.name == "B1 T128 H32/8 D128 window32 bf16"
    for case in calls.CASES:
        work = work_of(case)
        assert work.flops < 3e9
        assert 0 < work.bytes < 40e6
    assert not standard_cases(tuple(OPS), device=device, shapes="call", backward=True)


def test_a_filter_takes_words_and_globs():
    cases = standard_cases(["flash_attention"], device="cuda", shapes="fa3 d128 CAUSAL t*k")
    assert {case["seq"] for case in cases} == {1024, 2048, 4096, 8192, 16384}
    assert all(case["head_dim"] == 128 and case.causal for case in cases)
    # 64 is no part of the word D64, nor D64 of H64
    assert not standard_cases(["flash_attention"], device="cuda", shapes="64")
    both = standard_cases(["flash_attention"], device="cuda", shapes="T16K H64/8")
    assert [case.grid for case in both] == ["cudnn"]
    (one,) = standard_cases(["flash_attention"], device="cuda", shapes="prefill T16K H64/8")
    assert one.name == both[0].name


def test_another_dtype_replaces_that_of_the_shapes():
    cases = standard_cases(["flash_attention"], device="cpu", dtype="fp16")
    assert {case.dtype for case in cases} == {"fp16"}
    assert len(cases) < len([c for c in cpu.CASES if c.op == "flash_attention" and not c.backward])
    with pytest.raises(ValueError, match="no op is called 'flash'"):
        standard_cases(["flash"], device="cpu")
