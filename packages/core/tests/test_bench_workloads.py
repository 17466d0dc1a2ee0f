"""The bench's checks: exact rows agree with the oracle, and nothing wrong passes either."""

from __future__ import annotations

import functools
import itertools
import sys
import types

import pytest
import torch

from longctx.bench import exact
from longctx.bench.case import Case, axes
from longctx.bench.checking import Expectation, judge
from longctx.bench.contestants import BackendContestant
from longctx.bench.peers import PEERS, flex
from longctx.bench.peers.compositions import Compositions
from longctx.bench.plans import block_sparse_plan, token_set_plan
from longctx.bench.prepared import Prepared
from longctx.bench.shapes import calls, cpu
from longctx.bench.workloads import WORKLOADS
from longctx.bench.workloads.dsa import _chosen_scores
from longctx.reference.decode import merge_attention as merge_oracle
from longctx.reference.flash import flash_attention as flash_oracle
from longctx.reference.lightning import lightning_attention as lightning_oracle

CPU = torch.device("cpu")
SMALL = list(dict.fromkeys(WORKLOADS[c.op].reduced(c) for c in (*cpu.CASES, *calls.CASES)))
TORCH = BackendContestant("torch")


def outputs_of(prepared: Prepared):
    return {name: t.clone() for name, t in prepared.outputs(prepared.run()).items()}


@functools.cache
def computed(case: Case):
    with torch.no_grad():
        inputs = WORKLOADS[case.op].inputs(case, CPU)
        return inputs, outputs_of(TORCH.prepare(case, inputs, bound=True))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op} {case.name}")
@pytest.mark.parametrize("check", ["whole", "sample"])
def test_the_built_in_backend_is_right_and_a_damaged_result_is_not(case, check):
    inputs, outputs = computed(case)
    with torch.no_grad():
        expectations = getattr(WORKLOADS[case.op], check)(case, inputs)
        verdict = judge(outputs, expectations)
        assert verdict.right, verdict
        for expected in expectations:
            assert expected.exact.dtype == torch.float64
            damaged = {name: _damage(t) for name, t in outputs.items()}
            assert not judge(damaged, [expected]).right, expected.what
            poisoned = {name: _poison(t) for name, t in outputs.items()}
            assert not judge(poisoned, [expected]).right, expected.what


def _damage(t: torch.Tensor) -> torch.Tensor:
    """Shift every value by what a wrong mask or scale would; every index by one."""
    if not t.is_floating_point():
        return torch.where(t >= 0, t + 1, t)
    wide = t.double()
    return torch.where(wide.isfinite(), wide * 1.2 + wide[wide.isfinite()].abs().median(), wide)


def _poison(t: torch.Tensor) -> torch.Tensor:
    return torch.full_like(t.double(), torch.nan) if t.is_floating_point() else t * 0


@pytest.mark.parametrize("op", [op for op in WORKLOADS if op != "index_topk"])
def test_one_wrong_late_row_is_found(op):
    case = next(case for case in SMALL if case.op == op)
    inputs, outputs = computed(case)
    name = next(iter(outputs))
    wrong = outputs[name].double().clone()
    wrong.reshape(-1)[-1] += 3 * wrong[wrong.isfinite()].abs().mean()
    with torch.no_grad():
        assert not judge({**outputs, name: wrong}, WORKLOADS[op].whole(case, inputs)).right


def test_errors_are_measured_by_row():
    true = torch.tensor([[90.0, 50.0], [2e-3, 1e-3], [3e-3, 4e-3], [0, 0]], dtype=torch.float64)
    expected = Expectation("rows", lambda o: o["out"], true, true, 2.0**-8)
    assert judge({"out": true.bfloat16()}, [expected]).right
    near = true.clone()
    near[2, 0] *= 1.05  # nothing to the first row, much to the third
    assert judge({"out": near}, [expected]).error == pytest.approx(0.05 * 3 / 4)
    assert not judge({"out": near}, [expected]).right
    near = true.clone()
    near[3] += 1e-6  # a row that cancels is measured by the median one
    assert judge({"out": near}, [expected]).error == pytest.approx(1e-6 / 2e-3)


def test_a_row_that_cancels_is_allowed_its_own_error_and_gives_it_to_no_other():
    true = torch.tensor([[1.0, 1.0], [1e-9, 0.0], [2.0, 1.0]], dtype=torch.float64)
    low = true + torch.tensor([[0.0], [0.1], [0.0]], dtype=torch.float64)
    expected = Expectation("rows", lambda o: o["out"], true, low, 2.0**-6, by_row=True)
    assert judge({"out": low}, [expected]).right
    assert not judge({"out": 2 * low - true + 0.1}, [expected]).right
    near = true.clone()
    near[2, 0] += 0.1  # as much as the second row may be off
    verdict = judge({"out": near}, [expected])
    assert not verdict.right
    assert (verdict.error, verdict.allowed) == pytest.approx((0.05, 2 * 2.0**-6))
    near[0, 0] = torch.nan
    assert not judge({"out": near}, [expected]).right


def test_a_masked_pair_that_has_a_score_is_wrong():
    true = torch.tensor([[1.0, -torch.inf, 2.0]], dtype=torch.float64)
    expected = Expectation("scores", lambda o: o["scores"], true, true, 1e-2)
    assert judge({"scores": true.clone()}, [expected]).right
    assert not judge({"scores": torch.tensor([[1.0, 0.5, 2.0]])}, [expected]).right
    assert not judge({"scores": torch.tensor([[-torch.inf, -torch.inf, 2.0]])}, [expected]).right


def test_chosen_keys_must_be_distinct_and_visible():
    tied = torch.zeros(5, dtype=torch.float64)
    assert _chosen_scores(torch.tensor([0, 3, -1]), tied).tolist() == [0, 0]
    assert _chosen_scores(torch.tensor([3, 3]), tied).isnan().all()
    assert _chosen_scores(torch.tensor([0, 5]), tied).isnan().all()


def test_a_result_of_another_shape_is_wrong():
    true = torch.ones(2, 3, dtype=torch.float64)
    expected = Expectation("out", lambda o: o["out"], true, true, 1e-2)
    assert judge({"out": torch.ones(3, 2)}, [expected]).error == float("inf")
    assert not judge({"out": true.masked_fill(true > 0, -torch.inf)}, [expected]).right


@pytest.mark.parametrize(
    "case", [c for c in SMALL if c.op == "block_sparse_attention"], ids=lambda c: c.name
)
def test_masks_of_rows_are_rows_of_the_plans_mask(case):
    plan = block_sparse_plan(case)
    mask = plan.to_mask(case.q_len, case.k_len)
    rows = torch.tensor([0, 1, case.q_len // 2, case.q_len - 1])
    for head in range(mask.shape[1]):
        own = exact.plan_keep(plan, rows, case.k_len, batch=0, head_set=head)
        assert torch.equal(own, mask[0, head, rows])


def test_masks_of_rows_of_a_token_set():
    case = next(c for c in SMALL if c.op == "token_sparse_attention")
    plan = token_set_plan(case)
    rows = torch.arange(case.q_len)
    own = exact.plan_keep(plan, rows, case.k_len, batch=0, head_set=3)
    assert torch.equal(own, plan.to_mask(case.q_len, case.k_len)[0, 3])


@pytest.mark.parametrize("case", [c for c in SMALL if c.op.startswith("index")], ids=str)
def test_the_composition_of_the_indexer_is_right(case):
    inputs, _ = computed(case)
    with torch.no_grad():
        outputs = outputs_of(Compositions().prepare(case, inputs))
        for check in (WORKLOADS[case.op].whole, WORKLOADS[case.op].sample):
            assert judge(outputs, check(case, inputs)).right


def test_a_composition_in_chunks_is_the_same(monkeypatch):
    case = next(c for c in SMALL if c.op == "index_topk" and c.q_len > 1)
    inputs, _ = computed(case)
    monkeypatch.setattr("longctx.bench.peers.compositions.CHUNK_BYTES", 50_000)
    outputs = outputs_of(Compositions().prepare(case, inputs))
    assert judge(outputs, WORKLOADS[case.op].whole(case, inputs)).right


def test_flash_attn_cute_is_called_in_its_own_terms(monkeypatch):
    def flash_attn_func(q, k, v, causal=False, window_size=(None, None)):
        left, right = window_size
        bounds = None if left is None and right is None else (left, right)
        return flash_oracle(q, k, v, causal=causal, window=bounds)

    _module(monkeypatch, "flash_attn.cute.interface", flash_attn_func=flash_attn_func)
    peer = PEERS["flash-attn-4"]
    for case in SMALL:
        if case.op == "flash_attention" and case.dtype == "fp32":
            _is_right(peer, case)


def test_fla_is_called_in_its_own_terms(monkeypatch):
    def chunk_simple_gla(q, k, v, *, g_gamma, scale, output_final_state):
        out, state = lightning_oracle(q, k, v, g_gamma, scale=scale)
        return out, state if output_final_state else None

    def fused_recurrent_simple_gla(q, k, v, *, g_gamma, scale, initial_state, output_final_state):
        assert output_final_state
        return lightning_oracle(q, k, v, g_gamma, scale=scale, initial_state=initial_state)

    _module(
        monkeypatch,
        "fla.ops.simple_gla",
        chunk_simple_gla=chunk_simple_gla,
        fused_recurrent_simple_gla=fused_recurrent_simple_gla,
    )
    for op in ("lightning_attention", "lightning_decode"):
        for case in SMALL:
            if case.op == op:
                _is_right(PEERS["fla"], case.with_dtype("fp32"))


def test_flashinfer_merges_in_base_2_with_parts_second(monkeypatch):
    def merge_states(v, s):  # [rows, parts, heads, dim], [rows, parts, heads]
        ln2 = torch.log(torch.tensor(2.0))
        out, lse = merge_oracle(
            v.transpose(0, 1).unsqueeze(1), (s * ln2).permute(1, 2, 0)[:, None]
        )
        return out[0], lse[0].T / ln2

    _module(monkeypatch, "flashinfer", merge_states=merge_states)
    case = Case(
        "merge_attention", "test", axes(parts=3, batch=2, seq=5, q_heads=4, head_dim=8), "fp32"
    )
    _is_right(PEERS["flashinfer"], case)


def test_flashinfer_decodes_pages(monkeypatch):
    class Wrapper:
        def __init__(self, workspace, layout, use_tensor_cores):
            assert layout == "NHD"

        def plan(self, starts, indices, last, q_heads, kv_heads, dim, page, **dtypes):
            self.args = starts.tolist(), indices.long(), last.tolist(), page

        def run(self, q, caches):
            starts, indices, last, page = self.args
            outs = []
            for b, (start, stop) in enumerate(itertools.pairwise(starts)):
                length = (stop - start - 1) * page + last[b]
                k, v = (c[indices[start:stop]].flatten(0, 1)[None, :length] for c in caches)
                outs.append(flash_oracle(q[b].view(1, 1, *q.shape[1:]), k, v)[0][0])
            return torch.cat(outs)

    _module(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setattr("longctx.bench.peers.flashinfer.WORKSPACE_BYTES", 8)
    case = next(c for c in SMALL if c.op == "decode_attention" and c["page_size"])
    assert case.k_len % 16
    _is_right(PEERS["flashinfer"], case.resized(batch=3))


def _is_right(peer, case: Case) -> None:
    with torch.no_grad():
        inputs = WORKLOADS[case.op].inputs(case, CPU)
        outputs = outputs_of(peer.prepare(case, inputs))
        assert judge(outputs, WORKLOADS[case.op].whole(case, inputs)).right


def _module(monkeypatch, name: str, **members) -> None:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    for member, value in members.items():
        setattr(sys.modules[name], member, value)


def test_flex_gets_the_plans_blocks():
    case = next(c for c in SMALL if c.plan == "block")
    plan = block_sparse_plan(case)
    mask = flex._plan_mask(plan, case)
    blocks = mask.to_dense()[:, :: case["q_heads"] // case["kv_heads"]].bool()
    expected = torch.zeros_like(blocks)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in plan.counts.shape)).tolist():
        kept = plan.indices[b, h, row, : plan.counts[b, h, row]]
        expected[b, h, row, kept.long()] = True
    assert torch.equal(blocks, expected)
    own = mask.kv_indices[..., 0] == torch.arange(plan.counts.shape[2])
    assert own.all(), "the block that needs a mask is the query's own"
    assert (mask.full_kv_num_blocks == plan.counts.repeat_interleave(2, 1) - 1).all()
