"""The bench's time of the host: what is measured, of which calls, and the shapes made for it."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_case import CASE, CPU

import longctx
from longctx.bench.ceilings import Ceilings
from longctx.bench.checking import judge
from longctx.bench.contestants import BackendContestant, PeerContestant
from longctx.bench.peers import PEERS
from longctx.bench.peers.sdpa import Sdpa
from longctx.bench.prepared import Prepared
from longctx.bench.records import Status
from longctx.bench.session import Session
from longctx.bench.shapes import calls
from longctx.bench.timing import Clock
from longctx.bench.workloads import WORKLOADS
from longctx.dispatch import BoundBackend

CEILINGS = Ceilings({"bf16": 1e12, "fp32": 1e12}, copy=1e11, read=1e11)


class Host:
    """A GPU's host in made-up time: a call costs what ``cost`` says of its number."""

    def __init__(self, monkeypatch, cost):
        self.now, self.made, self.waits, self._cost = 0.0, 0, [], cost
        fake = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr("longctx.bench.timing.time", fake)
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda _device: self.waits.append(self.made)
        )
        self.clock = Clock(CPU)
        self.clock._flush = torch.empty(0)

    def call(self):
        self.now += self._cost(self.made)
        self.made += 1

    def seconds(self, taken):
        return self.clock.host_seconds(self.call, taken)

    def runs(self):
        """Calls of each run, a run's beginning being a wait for the GPU."""
        return [later - now for now, later in itertools.pairwise(self.waits)]


def test_the_hosts_time_is_the_least_run_of_calls_that_nobody_waits_for(monkeypatch):
    def disturbed(number):
        # every call may be late, all of one run are not; some put work off for the tenth
        return (30e-6 if 83 <= number < 123 else 30e-6 + number % 7 * 1e-6) + (
            10e-6 if number % 10 == 0 else 0
        )

    host = Host(monkeypatch, disturbed)
    assert host.seconds(20e-6) == pytest.approx(31e-6), "a mean of its calls, the least of runs"
    assert host.runs() == [1, 1, 1] + [40] * 15


@pytest.mark.parametrize(
    ("cost", "taken", "runs"),
    [
        (30e-6, 1e-6, [1] * 3 + [40] * 15),
        (30e-6, 100e-6, [1] * 3 + [40] * 15),
        (30e-6, 1e-3, [1] * 3 + [4] * 15),
        (30e-6, 3e-3, [1] * 15),
        (30e-6, 10e-3, [1] * 6),
        (30e-6, 70e-3, [1] * 3),
        (30e-6, 50.0, [1] * 3),
        # a call of many kernels: what the GPU's queue holds is not filled
        (250e-6, 90e-6, [1] * 3 + [8] * 15),
        (5e-3, 90e-6, [1] * 18),
    ],
)
def test_slow_calls_are_made_fewer_times(monkeypatch, cost, taken, runs):
    host = Host(monkeypatch, lambda _number: cost)
    assert host.seconds(taken) == pytest.approx(cost)
    assert host.runs() == runs


def test_the_hosts_time_of_a_call_is_without_its_setting(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def setting():
        entered.append("in")
        yield
        entered.append("out")

    class Asks(Clock):
        def host_seconds(self, call, taken):
            entered.append("timed")
            call()
            return 1e-6

    class Set(BackendContestant):
        def prepare(self, case, inputs, *, bound):
            right = super().prepare(case, inputs, bound=bound)

            def call():
                assert entered.count("in") == entered.count("out") + 1
                return right.run()

            return Prepared(call, right.outputs, setting)

    session = Session([Set("torch")], CPU, clock=Asks(CPU), ceilings=CEILINGS, seconds=1e-3)
    (row,) = session.run(CASE)
    assert (row.status, row.host_us) == (Status.OK, pytest.approx(1.0))
    assert entered[-3:] == ["in", "timed", "out"]


@pytest.mark.parametrize("backward", [False, True])
def test_sdpa_chooses_its_kernel_around_the_call(backward):
    case = replace(CASE, backward=backward)
    inputs = WORKLOADS[case.op].inputs(case, CPU)
    prepared = Sdpa("sdpa-fa2").prepare(case, inputs)
    with prepared.setting():
        chosen = [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()]
        outputs = prepared.outputs(prepared.run())
    assert chosen == [True, backward], "a gradient's kernel was chosen by its forward pass"
    again = prepared.outputs(prepared())
    assert torch.backends.cuda.math_sdp_enabled()
    for name, tensor in outputs.items():
        assert torch.equal(tensor, again[name])
    assert judge(outputs, WORKLOADS[case.op].sample(case, inputs)).right


@pytest.mark.parametrize("case", calls.CASES, ids=lambda case: f"{case.op} {case.name}")
def test_the_shapes_of_single_calls_run_on_a_cpu(case):
    contestants = [BackendContestant("torch")]
    session = Session(contestants, CPU, clock=Clock(CPU), ceilings=CEILINGS, seconds=1e-3)
    (row,) = session.run(case)
    assert (row.status, row.note, row.host_us) == (Status.OK, "", None)
    assert row.ms > 0


def test_peers_are_not_put_to_packed_sequences():
    case = next(case for case in calls.CASES if case.get("sequences", 1) > 1)
    for name in ("sdpa", "flex", "flash-attn-4", "flashinfer"):
        assert "packed sequences" in PeerContestant(PEERS[name]).refuses(case, CPU)


def test_what_is_timed_is_bound(monkeypatch):
    handles = []

    def attend(q, k, v, *, causal, window, backend):
        handles.append(backend)
        return longctx.flash_attention(q, k, v, causal=causal, window=window, backend=backend)

    monkeypatch.setattr("longctx.bench.contestants.public_function", lambda _op: attend)
    contestants = [BackendContestant("torch")]
    session = Session(contestants, CPU, clock=Clock(CPU), ceilings=CEILINGS, seconds=1e-3)
    (row,) = session.run(CASE)
    assert row.status == Status.OK
    assert handles[0] == "torch", "by name once: declared support has its say"
    assert set(handles[1:]) == {BoundBackend("torch")}
