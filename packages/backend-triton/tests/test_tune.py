"""The search for faster tiles, on a bench without a GPU: candidates, filter, winners, command."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import typer
from rich.console import Console

from longctx import cli
from longctx.bench.timing import Spread
from longctx.support import Reason, ReasonCode
from longctx_triton.launch import tuning
from longctx_triton.launch.tuning import lookup, places, read_table, tuned
from longctx_triton.tune import candidates, command, session
from longctx_triton.tune.candidates import Built, neighbours, unfit
from longctx_triton.tune.lab import difference
from longctx_triton.tune.session import Trial, run_trials

GPU = "NVIDIA H100 80GB HBM3"
DEVICE = torch.device("meta")


class Tiles(NamedTuple):
    """What the choice returns."""

    rows: int
    stages: int


@tuned("walk")
def walk_tiles(width):
    """Choose."""
    return Tiles(64, 2)


def walk(width, *, seen=None):
    """Return a call that asks for tiles and returns them."""

    def call():
        if seen is not None:
            seen.append(walk_tiles(width))
        return walk_tiles(width)

    return call


class Bench:
    """Times by tiles, in milliseconds; an exception is raised where they are used."""

    device = DEVICE

    def __init__(self, times, *, spills=None, wrong=()):
        self.times, self.spills, self.wrong = times, spills or {}, wrong
        self.rounds = []

    def compiler(self):
        return nullcontext(self)

    def begin(self, call):
        return call()

    def finish(self, begun):
        found = self.spills.get(tuple(begun), 0)
        if isinstance(found, Exception):
            raise found
        return [Built("walk_kernel", found)]

    def ready(self, call):
        tiles = tuple(call())
        time = self.times[tiles]
        if isinstance(time, BaseException):
            raise time
        return (lambda: tiles), tiles

    def differ(self, results, expected):
        return "3 entries of result 0 differ" if results in self.wrong else ""

    def time(self, calls, share):
        self.rounds.append((len(calls), share))
        found = {}
        for name, call in calls.items():
            time = self.times[call()]
            middle, width = time if isinstance(time, tuple) else (time, 0.01)
            found[name] = Spread((middle - width) / 1e3, middle / 1e3, (middle + width) / 1e3, 9)
        return found


MOVES = ({"rows": "*2"}, {"rows": "/2"}, {"stages": "+1"})
WALK = Trial("walk", "width 8", lambda device: [walk(8)])
TIMES = {(64, 2): 2.0, (128, 2): 1.5, (32, 2): 3.0, (64, 3): 1.6}


@pytest.fixture(autouse=True)
def shop(monkeypatch, tmp_path):
    """Offer one kernel to tune, with empty folders for tables."""
    monkeypatch.setenv("LONGCTX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "_SHIPPED", tmp_path)
    for module in (places, lookup, command):
        monkeypatch.setattr(module, "triton_version", lambda: "3.6")
    monkeypatch.setattr(lookup, "current_gpu", lambda: GPU)
    for module in (session, command):
        monkeypatch.setattr(module, "MOVES", {"walk": MOVES, "run": MOVES})
    lookup.tables.cache_clear()
    lookup._forget()
    yield tmp_path
    lookup.tables.cache_clear()
    lookup._forget()


def run_one(bench, trial=WALK, known=lambda _: []):
    """Return the outcome of one trial."""
    (outcome,) = run_trials([trial], bench, known, lambda _: None)
    return outcome


def notes(outcome):
    """Return the notes of all candidates by their tiles."""
    return {tuple(attempt.tiles.values()): attempt.note for attempt in outcome.others}


def test_neighbours_are_each_once_and_without_the_default():
    moves = (
        {"rows": "*2"}, {"rows": 128}, {"rows": 64}, {"rows": "/2", "stages": "-1"},
        {"stages": "-2"}, {"stages": "+3"}, {"columns": 3}, {"rows": "/128"},
    )  # fmt: skip
    assert neighbours(Tiles(64, 2), moves) == [
        {"rows": 128, "stages": 2}, {"rows": 32, "stages": 1}, {"rows": 64, "stages": 5}
    ]  # fmt: skip


def test_spills_beyond_a_few_and_beyond_the_defaults_are_not_timed():
    fine, much = [Built("a", 0), Built("b", 16)], [Built("a", 0), Built("b", 17)]
    assert unfit(fine, []) == ""
    assert unfit(much, [Built("a", 0)]) == "b spills 17 registers"
    assert unfit(much, [Built("b", 20)]) == ""


def test_the_fastest_wins_after_a_second_look():
    bench = Bench(TIMES)
    outcome = run_one(bench)
    assert outcome.winner.tiles == {"rows": 128, "stages": 2}
    assert bench.rounds == [(4, 1.0), (2, 2.0)]
    entry = outcome.entry()
    assert entry.tiles == {"rows": 128, "stages": 2}
    assert entry.default == {"rows": 64, "stages": 2}
    assert (entry.facts, entry.default_ms, entry.tuned_ms) == ({"width": 8}, 2.0, 1.5)


def test_a_gain_within_the_spread_is_none():
    outcome = run_one(Bench(TIMES | {(128, 2): (1.98, 0.02), (64, 3): (1.99, 0.02)}))
    assert outcome.winner is None
    assert outcome.entry().tiles == outcome.entry().default


def test_luck_does_not_last(monkeypatch):
    bench = Bench(dict(TIMES))
    first = bench.time

    def time(calls, share):
        found = first(calls, share)
        bench.times[128, 2] = 2.1
        return found

    bench.time = time
    assert run_one(bench).winner is None


def test_what_does_not_compile_or_fit_or_agree_is_not_timed():
    spills = {(128, 2): ValueError("out of resource: shared memory\nmore"), (32, 2): 100}
    bench = Bench(TIMES, spills=spills, wrong=[(64, 3)])
    outcome = run_one(bench)
    assert outcome.winner is None
    assert notes(outcome) == {
        (128, 2): "ValueError: out of resource: shared memory",
        (32, 2): "walk_kernel spills 100 registers",
        (64, 3): "3 entries of result 0 differ",
    }
    assert bench.rounds == [(1, 1.0)]


def test_what_fails_at_its_launch_is_not_timed():
    outcome = run_one(Bench(TIMES | {(128, 2): RuntimeError("launch failed")}))
    assert notes(outcome)[128, 2] == "RuntimeError: launch failed"
    assert outcome.winner.tiles == {"rows": 64, "stages": 3}


def test_a_winner_must_compile_in_the_other_calls(monkeypatch):
    asked = []
    trial = Trial("walk", "two calls", lambda device: [walk(8), walk(8, seen=asked)])
    bench = Bench(TIMES)
    assert run_one(bench, trial).winner is not None
    assert set(asked) == {Tiles(128, 2), Tiles(64, 2)}

    finish = bench.finish
    bench.finish = lambda begun: (
        [Built("other_kernel", 99)] if bench.rounds and begun.rows == 128 else finish(begun)
    )
    bench.rounds.clear()
    outcome = run_one(bench, trial)
    assert outcome.winner is None
    assert notes(outcome)[128, 2] == "in another call: other_kernel spills 99 registers"


def test_a_broken_trial_does_not_end_the_others():
    def fail(device):
        raise MemoryError("too large")

    elsewhere = Trial("walk", "elsewhere", lambda device: [lambda: Tiles(1, 1)])
    trials = [Trial("walk", "broken", fail), elsewhere, WALK]
    outcomes = list(run_trials(trials, Bench(TIMES), lambda _: [], lambda _: None))
    assert [bool(o.winner) for o in outcomes] == [False, False, True]
    assert outcomes[0].note == "MemoryError: too large"
    assert outcomes[1].note == "is not launched here on this GPU"
    assert outcomes[0].entry() is outcomes[1].entry() is None


def test_every_tuned_choice_has_moves_of_fields_that_it_has():
    from longctx_triton.launch import dsa_tiles, flash, sparse_tiles
    from longctx_triton.launch.device import Device

    h100 = Device((9, 0), 132, 50 << 20)
    chosen = {
        "flash_forward": flash.forward_tiles(h100, 128, True),
        "flash_dq": flash.dq_tiles(h100, 128, True),
        "flash_dkdv": flash.dkdv_tiles(h100, 128, True),
        "block_list": sparse_tiles.block_tiles(128, 128, (9, 0)),
        "key_range": sparse_tiles.window_tiles(128, 128, (9, 0)),
        "key_range_star": sparse_tiles.star_tiles(128, 128, (9, 0)),
        "token_attention": sparse_tiles.token_tiles(128, 128, (9, 0)),
        "topk_attention": dsa_tiles.list_tiles(128, 512, 512, True, (9, 0)),
        "index_scores": dsa_tiles.index_tiles(64, 4096, (9, 0)),
    }
    if importlib.util.find_spec("triton"):
        from longctx_triton import lightning
        from longctx_triton.launch import decode_plan

        chosen["decode"] = decode_plan._tiles(4, 128, 128, 2, False, h100)
        chosen["lightning"] = lightning._tiles(128, 128, 64, h100)
    for kernel, tiles in chosen.items():
        assert len(neighbours(tiles, candidates.MOVES[kernel])) >= 4


def test_results_differ_by_more_than_rounding():
    right = torch.randn(2, 300, 4, 64, generator=torch.Generator().manual_seed(0))
    right[0, 0] = 0
    lse = torch.randn(2, 4, 300)
    lse[0, :, 0] = -torch.inf
    near = right * (1 + 2**-8)
    assert difference([near, lse], [right, lse.clone()]) == ""
    for value in (torch.nan, torch.inf, 5.0):
        wrong = near.clone()
        wrong[1, 2, 3, 4] = value
        assert difference([wrong, lse], [right, lse]) == "1 entries of result 0 differ"
    later = lse.clone()
    later[0, 1, 0] = 0.0
    assert difference([near, later], [right, lse]) == "1 entries of result 1 differ"


@pytest.fixture
def machine(monkeypatch, shop):
    """Put a bench in the place of the GPU; return a function that sets it."""
    monkeypatch.setattr(command.plugin, "missing", lambda: ())
    monkeypatch.setattr(command.plugin, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: GPU)

    def set_bench(bench, trials=(WALK,)):
        lab, found = ModuleType("lab"), ModuleType("trials")
        lab.Lab, found.TRIALS = lambda device, seconds: bench, trials
        monkeypatch.setitem(sys.modules, "longctx_triton.tune.lab", lab)
        monkeypatch.setitem(sys.modules, "longctx_triton.tune.trials", found)

    return set_bench


def test_the_command_stores_winners_in_the_users_table_which_is_then_used(machine, tmp_path):
    machine(Bench(TIMES))
    out = Console(file=io.StringIO(), width=160)
    command.run_tune((), out, json=tmp_path / "all.jsonl")
    printed = out.file.getvalue()
    assert "walk" in printed
    assert "1.333" in printed
    assert "rows=128" in printed
    (line,) = (tmp_path / "all.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["winner"] == {"rows": 128, "stages": 2}
    assert len(row["others"]) == 3
    path = tuning.user_table(GPU)
    assert str(path) in printed
    (entry,) = read_table(path).entries.values()
    assert entry.tiles == {"rows": 128, "stages": 2}
    lookup.tables.cache_clear()
    lookup._forget()
    assert walk_tiles(8) == Tiles(128, 2)


def test_nothing_faster_leaves_nothing_behind(machine):
    machine(Bench(dict.fromkeys(TIMES, 2.0)))
    command.run_tune((), Console(file=io.StringIO()))
    assert not read_table(tuning.user_table(GPU)).entries


def test_tuning_again_forgets_what_is_no_longer_faster(machine):
    machine(Bench(TIMES))
    command.run_tune((), Console(file=io.StringIO()))
    machine(Bench(dict.fromkeys(TIMES, 2.0)))
    command.run_tune((), Console(file=io.StringIO()))
    assert not read_table(tuning.user_table(GPU)).entries


def test_the_packages_tiles_are_tried_and_overruled_where_they_are_slower_here(machine, shop):
    machine(Bench(TIMES))
    command.run_tune((), Console(file=io.StringIO()), output=shop / "h100.json")
    assert not tuning.user_table(GPU).exists()
    lookup.tables.cache_clear()
    # the package's tiles are the fastest: the user's table has nothing to add
    command.run_tune((), Console(file=io.StringIO()))
    assert not read_table(tuning.user_table(GPU)).entries
    # they are slower here: the user's table goes back to the code's own
    machine(Bench(dict.fromkeys(TIMES, 2.0) | {(128, 2): 3.0}))
    command.run_tune((), Console(file=io.StringIO()))
    lookup.tables.cache_clear()
    lookup._forget()
    assert walk_tiles(8) == Tiles(64, 2)


@pytest.mark.parametrize("at_once", [1, 8])
def test_stopped_by_hand_keeps_what_is_done(machine, monkeypatch, at_once):
    monkeypatch.setattr(session, "AT_ONCE", at_once)
    bench = Bench(TIMES)

    def stop():
        if bench.rounds:
            raise KeyboardInterrupt
        return walk_tiles(16)

    machine(bench, (WALK, Trial("walk", "another", lambda device: [stop])))
    out = Console(file=io.StringIO(), width=160)
    with pytest.raises(KeyboardInterrupt):
        command.run_tune((), out)
    assert len(read_table(tuning.user_table(GPU)).entries) == 1
    assert "width 8" in out.file.getvalue()


def test_what_cannot_be_written_is_said_before_anything_is_timed(machine, shop):
    bench = Bench(TIMES)
    machine(bench)
    with pytest.raises(ValueError, match=r"cannot write .*: Is a directory"):
        command.run_tune((), Console(file=io.StringIO()), output=shop)
    assert not bench.rounds


def test_only_the_kernels_that_are_named(machine):
    machine(Bench(TIMES), (WALK, Trial("run", "unwanted", lambda device: [])))
    assert [o.trial for o in command.run_tune(["walk"], Console(file=io.StringIO()))] == [WALK]
    with pytest.raises(ValueError, match="no kernel is called 'wlak': did you mean 'walk'"):
        command.run_tune(["wlak"], Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="--seconds must be above 0"):
        command.run_tune([], Console(file=io.StringIO()), seconds=0)


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function that runs ``longctx``: exit code, standard output, standard error."""
    point = SimpleNamespace(name="triton", value="longctx_triton.cli:app", load=load_app)
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: [point])

    def longctx(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return longctx


def load_app() -> typer.Typer:
    """Return the commands that the package joins to ``longctx``."""
    from longctx_triton import cli as own

    own._OUT = Console(width=160)
    return own.app


def test_without_a_gpu_one_sentence_and_exit_code_2(run, monkeypatch):
    reasons = (Reason(ReasonCode.NO_DEVICE, "no NVIDIA driver: libcuda.so.1 was not found", ""),)
    monkeypatch.setattr(command.plugin, "missing", lambda: reasons)
    code, out, err = run("tune")
    assert (code, out) == (2, "")
    assert err.strip() == (
        "longctx: error: tuning needs a GPU that the Triton backend runs on: no NVIDIA driver: "
        "libcuda.so.1 was not found"
    )
    code, out, _ = run("tune", "--list")
    assert code == 0
    assert "walk" in out
    assert "no table is in use: no NVIDIA driver" in out


def test_list_shows_which_tables_are_in_use(run, machine, shop):
    machine(Bench(TIMES))
    code, out, _ = run("tune", "--list")
    assert code == 0
    assert "yours: none yet" in out
    assert "the package's: none" in out
    assert run("tune", "--output", str(shop / "h100.json"))[0] == 0
    tuning.user_table(GPU).parent.mkdir(parents=True)
    tuning.user_table(GPU).write_text("{")
    _, out, _ = run("tune", "--list")
    assert "yours: not used: not JSON" in out
    assert "the package's: 1 entries" in out
