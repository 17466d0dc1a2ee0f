"""A bench session: who is right is timed; who is not has a reason and no figure."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace

import pytest
import torch
from bench_case import CASE, CPU

from longctx.bench.case import Case, axes
from longctx.bench.ceilings import Ceilings, measure_ceilings
from longctx.bench.contestants import BackendContestant, PeerContestant, find_contestants
from longctx.bench.counting import Work
from longctx.bench.peers import PEERS
from longctx.bench.peers.peer import missing_module
from longctx.bench.prepared import Prepared
from longctx.bench.records import Row, RowWriter, Status, read_recording
from longctx.bench.session import Session
from longctx.bench.timing import Clock, in_turns, spread_of

CEILINGS = Ceilings({"fp32": 1e12}, copy=1e11, read=1e11)


@dataclass
class Planted:
    """A contestant that computes the right thing and then lets ``spoil`` have it."""

    name: str
    spoil: object
    kind: str = "backend"
    calls: list = field(default_factory=list)

    def refuses(self, case, device):
        return None

    def prepare(self, case, inputs, *, bound):
        right = BackendContestant("torch").prepare(case, inputs, bound=True)

        def run():
            self.calls.append(case.q_len)
            return self.spoil(right.run(), case)

        return Prepared(run, right.outputs)


def run(*contestants, case=CASE, seconds=0.01):
    session = Session(contestants, CPU, clock=Clock(CPU), ceilings=CEILINGS, seconds=seconds)
    return {row.contestant: row for row in session.run(case)}


def honest(result, case):
    return result


def test_a_right_contestant_has_figures():
    row = run(Planted("a", honest), Planted("b", honest, kind="peer"))["a"]
    assert row.status == Status.OK
    assert row.ms_low <= row.ms <= row.ms_high
    assert row.rounds >= 3
    assert row.tflops == pytest.approx(row.gflop / row.ms, rel=1e-9)
    assert row.tbs == pytest.approx(row.gbytes / row.ms, rel=1e-9)
    assert row.fraction == pytest.approx(row.gflop / 1e3 / (row.ms * 1e-3), rel=1e-9)
    assert row.bound == "compute"
    assert 0 < row.ratios["b"] < 100
    assert row.error <= row.allowed


def test_fp8_inputs_are_measured_and_what_is_off_by_an_eighth_is_not():
    case = replace(CASE, dtype="fp8_e4m3", causal=False)
    rows = run(Planted("right", honest), Planted("off", lambda r, c: r * 1.125), case=case)
    assert (rows["right"].status, rows["off"].status) == (Status.OK, Status.WRONG)
    ceilings = Ceilings({"fp8_e4m3": 1e12}, copy=1e11, read=1e11)
    session = Session([PeerContestant(PEERS["sdpa"])], CPU, clock=Clock(CPU), ceilings=ceilings,
                      seconds=0.01)  # fmt: skip
    assert session.run(case)[0].note == "SDPA takes no fp8"


def test_on_a_cpu_there_is_no_time_of_the_host():
    assert run(Planted("a", honest))["a"].host_us is None, "the call is the work"


@pytest.mark.parametrize("where", ["small shape", "timed shape"])
def test_a_wrong_contestant_has_no_figures_and_harms_nobody(where):
    def wrong(result, case):
        small = case.q_len < CASE.q_len
        return result * 1.1 if small == (where == "small shape") else result

    planted = Planted("wrong", wrong)
    rows = run(planted, Planted("right", honest))
    assert rows["wrong"].status == Status.WRONG
    assert rows["wrong"].ms is rows["wrong"].tflops is rows["wrong"].fraction is None
    assert "max error 1.0e-01" in rows["wrong"].note
    assert rows["right"].status == Status.OK
    assert rows["right"].ratios == {}
    expected = [321] if where == "small shape" else [321, 400]
    assert planted.calls == expected, "a wrong result is not timed"


def test_nan_is_wrong():
    assert run(Planted("nan", lambda r, c: r * torch.nan))["nan"].status == Status.WRONG


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore lines"),
        MemoryError("no more"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_is_a_row_and_the_run_goes_on(error):
    def hungry(result, case):
        if case.q_len == CASE.q_len:
            raise error
        return result

    rows = run(Planted("hungry", hungry), Planted("modest", honest))
    assert rows["hungry"].status == Status.OUT_OF_MEMORY
    assert rows["hungry"].ms is None
    assert "\n" not in rows["hungry"].note
    assert rows["modest"].status == Status.OK


def test_inputs_that_do_not_fit_are_everybodys_row(monkeypatch):
    from longctx.bench import session
    from longctx.bench.workloads import WORKLOADS

    def inputs(case, device):
        if case.q_len == CASE.q_len:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return WORKLOADS["flash_attention"].inputs(case, device)

    greedy = replace(WORKLOADS["flash_attention"], inputs=inputs)
    monkeypatch.setattr(session, "WORKLOADS", {"flash_attention": greedy})
    rows = run(Planted("a", honest), Planted("b", honest))
    assert {row.status for row in rows.values()} == {Status.OUT_OF_MEMORY}


def test_an_exception_is_a_note_also_while_timing():
    class Breaks:
        def __init__(self, after):
            self.after = after

        def __call__(self, result, case):
            self.after -= 1
            if self.after < 0:
                raise ZeroDivisionError("on purpose\nsecond line")
            return result

    rows = run(Planted("at once", Breaks(0)), Planted("later", Breaks(4)), Planted("ok", honest))
    for name in ("at once", "later"):
        assert rows[name].status == Status.FAILED
        assert rows[name].note == "ZeroDivisionError: on purpose"
        assert rows[name].ms is None
    assert rows["ok"].status == Status.OK
    assert "later" not in rows["ok"].ratios


def test_a_refusal_is_one_sentence():
    windowed = replace(CASE, window=50)
    rows = run(PeerContestant(PEERS["sdpa"]), BackendContestant("torch"), case=windowed)
    assert (rows["sdpa"].status, rows["sdpa"].note) == (
        Status.REFUSED,
        "SDPA has no sliding window",
    )
    assert rows["torch"].status == Status.OK


def test_small_shapes_are_checked_once_for_a_grid():
    planted = Planted("a", honest)
    session = Session([planted], CPU, clock=Clock(CPU), ceilings=CEILINGS, seconds=0.001)
    session.run(CASE)
    session.run(replace(CASE.resized(seq=500), grid="another"))
    assert planted.calls.count(321) == 1


def test_peers_without_the_op_have_no_row():
    merge = Case(
        "merge_attention", "test", axes(parts=2, batch=1, seq=9, q_heads=2, head_dim=8), "fp32"
    )
    rows = run(PeerContestant(PEERS["sdpa"]), BackendContestant("torch"), case=merge)
    assert list(rows) == ["torch"]


@pytest.mark.parametrize("backward", [False, True])
def test_sdpa_and_the_built_in_backend_are_both_right(backward):
    case = replace(CASE, backward=backward)
    rows = run(BackendContestant("torch"), PeerContestant(PEERS["sdpa"]), case=case)
    assert [row.status for row in rows.values()] == [Status.OK, Status.OK]


class Scripted(Clock):
    """A clock that believes what a call returns."""

    def seconds(self, call):
        return call()


def test_calls_take_turns_and_slow_ones_sit_out():
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            return seconds

        return run

    calls = {"a": call("a", 0.001), "b": call("b", 0.002), "slow": call("slow", 0.04)}
    clock = Scripted(CPU)
    times = in_turns(calls, clock, seconds=0.02, failed=lambda *_: None)
    assert order[:12] == ["a", "b", "slow"] * 4, "one estimate and three rounds, in turns"
    assert order[12:] == ["a", "b"] * 7 + ["a"] * 10
    assert [len(t) for t in times.values()] == [20, 10, 3]
    once = in_turns({"slow": calls["slow"]}, clock, seconds=0.001, failed=lambda *_: None)
    assert once == {"slow": [0.04]}
    fast = in_turns({"a": call("a", 1e-6)}, clock, seconds=1, failed=lambda *_: None)
    assert len(fast["a"]) == 200


def test_the_wall_clock_measures_a_call():
    assert Clock(CPU).seconds(lambda: time.sleep(0.01)) >= 0.01


def test_spread():
    spread = spread_of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (spread.low, spread.median, spread.high, spread.rounds) == (2.0, 3.5, 5.0, 6)
    assert spread_of([7.0]).high == 7.0


def test_the_ceiling_that_binds():
    ceilings = Ceilings({"bf16": 100.0, "fp8_e4m3": 200.0}, copy=9.0, read=10.0)
    assert ceilings.floor(Work(1000, 10, 10), "bf16").seconds == 10
    assert ceilings.floor(Work(1000, 10, 10), "fp8_e4m3").seconds == 5
    assert ceilings.floor(Work(0, 10, 10), "bf16") == ceilings.floor(Work(1, 10, 10), "fp32")
    assert ceilings.floor(Work(0, 10, 10), "bf16").bound == "memory"


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr("longctx.bench.ceilings.REPEATS", 2)
    found = measure_ceilings(CPU, ["fp32", "fp8_e4m3"], Clock(CPU))
    assert set(found.matmul) == {"fp32"}, "a CPU has no fp8 product"
    assert 1e9 < found.matmul["fp32"] < 1e14
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.read < 1e13
    assert "matmul_fp32_tflops" in found.as_dict()


def test_who_is_missing_is_named():
    roster = find_contestants(["flash_attention", "lightning_attention"], CPU)
    assert [c.name for c in roster.contestants if c.kind == "peer"] == ["sdpa"]
    assert roster.left_out["fla"] == "runs on cuda, not on cpu"
    absent = missing_module("no_such_module.sub", "Such", "pip install such")
    assert absent == "Such is not installed (pip install such)"
    assert missing_module("json", "JSON", "") is None
    with pytest.raises(LookupError, match="did you mean 'sdpa-fa2'"):
        find_contestants(["flash_attention"], CPU, peers=["sdpa-fa3"])
    none = find_contestants(["flash_attention"], CPU, backends=["torch"], peers=["none"])
    assert [c.name for c in none.contestants] == ["torch"]
    ops = find_contestants(["merge_attention"], CPU, peers=["sdpa"])
    assert "sdpa" not in [c.name for c in ops.contestants]


def test_a_library_that_fails_to_import_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "broken_peer.py").write_text("raise OSError('no libcudart')", encoding="utf-8")
    (tmp_path / "needy_peer.py").write_text("import not_there_at_all", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "OSError: no libcudart" in missing_module("broken_peer", "Broken", "")
    assert missing_module("needy_peer", "Needy", "") == "Needy needs the module not_there_at_all"


def test_the_built_in_backend_runs_from_a_source_tree(monkeypatch):
    import longctx
    from longctx import plugins

    def absent(name):
        raise plugins.metadata.PackageNotFoundError(name)

    registered = list(plugins._extra_plugins)
    monkeypatch.setattr(plugins.metadata, "version", absent)
    longctx.reset_registry()
    try:
        roster = find_contestants(["merge_attention"], CPU, peers=["none"])
        assert "torch" in [c.name for c in roster.contestants]
    finally:
        plugins._extra_plugins[:] = registered
        monkeypatch.undo()
        longctx.reset_registry()


def test_rows_survive_the_file(tmp_path):
    rows = list(run(Planted("a", honest), Planted("b", honest)).values())
    rows.append(Row("op", "case", "grid", "c", "peer", Status.WRONG, error=float("inf")))
    path = tmp_path / "new" / "rows.jsonl"
    with RowWriter(path) as writer:
        writer.header({"device": "cpu", "ceilings": CEILINGS.as_dict()})
        for row in rows:
            writer.rows([row])
            assert len(path.read_text().splitlines()) == rows.index(row) + 2, "flushed as it goes"
    found = read_recording(path)
    assert list(found.rows) == rows
    assert found.header == {"device": "cpu", "ceilings": CEILINGS.as_dict()}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_line_that_was_cut_off_costs_that_row_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowWriter(path) as writer:
        writer.header({})
        writer.rows(run(Planted("a", honest), Planted("b", honest)).values())
    path.write_text(path.read_text()[:-30], encoding="utf-8")
    assert [row.contestant for row in read_recording(path).rows] == ["a"]
