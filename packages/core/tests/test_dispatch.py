"""Choice of a backend: argument, use(), environment, priority; refusals that say why."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

import longctx
from longctx import plugins
from longctx.support import OpRequest, ReasonCode, reasons_against

Q = torch.randn(1, 6, 2, 32)


def marking_backend(mark, **changes):
    """Return a plugin whose flash forward fills the output with ``mark``."""

    def flash_forward(q, k, v, **options):
        return torch.full_like(q, mark), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    table = {
        "dtypes": frozenset({torch.float32}),
        "devices": frozenset({"cpu"}),
        "head_dims": frozenset({32, 64}),
        "features": frozenset({"window"}),
    }
    support = {"flash_attention": longctx.OpSupport(**(table | changes))}

    class Module:
        @longctx.hookimpl
        def longctx_backends(self):
            return [
                longctx.BackendInfo(
                    name=f"mark{mark}",
                    version="1",
                    protocol=longctx.PROTOCOL_VERSION,
                    load=lambda: longctx.BackendBase(support, {"flash_forward": flash_forward}),
                )
            ]

    return Module()


@pytest.fixture
def marks():
    """Register two backends: mark7 below the built-in one's priority, mark9 above it."""
    added = [marking_backend(7, priority=1), marking_backend(9, priority=99)]
    for number, module in enumerate(added):
        longctx.register_plugin(module, name=f"marks{number}")
    yield
    for module in added:
        plugins.unregister_plugin(module)


def mark_of(**options):
    return longctx.flash_attention(Q, Q, Q, **options)[0, 0, 0, 0].item()


def test_priority_decides_when_nobody_asks(marks):
    assert mark_of() == 9


def test_precedence_argument_use_environment_priority(marks, monkeypatch):
    monkeypatch.setenv("LONGCTX_BACKEND", "mark7")
    assert mark_of() == 7
    with longctx.use("mark9"):
        assert mark_of() == 9
        assert mark_of(backend="mark7") == 7
        with longctx.use("mark7"):
            assert mark_of() == 7
        assert mark_of() == 9
    assert mark_of() == 7
    monkeypatch.setenv("LONGCTX_BACKEND", "auto")
    assert mark_of() == 9


def test_auto_takes_the_next_one_that_can(marks):
    out = longctx.flash_attention(Q, Q, Q, softcap=5.0)
    assert out[0, 0, 0, 0].item() not in (7, 9)


@pytest.mark.parametrize("how", ["argument", "use()", "LONGCTX_BACKEND"])
def test_a_named_backend_never_falls_back(marks, monkeypatch, how):
    def call():
        if how == "argument":
            return longctx.flash_attention(Q, Q, Q, softcap=5.0, backend="mark9")
        if how == "use()":
            with longctx.use("mark9"):
                return longctx.flash_attention(Q, Q, Q, softcap=5.0)
        monkeypatch.setenv("LONGCTX_BACKEND", "mark9")
        return longctx.flash_attention(Q, Q, Q, softcap=5.0)

    with pytest.raises(longctx.UnsupportedError) as caught:
        call()
    assert f"'mark9', asked for by {how}, cannot run flash_attention" in str(caught.value)
    assert "no softcap yet (call without softcap)" in str(caught.value)


def test_use_is_local_to_the_thread(marks):
    seen = []
    with longctx.use("mark7"):
        thread = threading.Thread(target=lambda: seen.append(mark_of()))
        thread.start()
        thread.join()
        assert mark_of() == 7
    assert seen == [9]


def test_unknown_backend_names_the_nearest():
    with pytest.raises(
        longctx.BackendNotFoundError, match=r"no backend is called 'torhc': did you mean 'torch'"
    ):
        longctx.flash_attention(Q, Q, Q, backend="torhc")
    with pytest.raises(longctx.BackendNotFoundError), longctx.use("nobody"):
        pass


def test_a_known_backend_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [])
    longctx.reset_registry()
    with pytest.raises(
        longctx.BackendNotFoundError, match=r"pip install 'longctx-backend-cupy\[cuda13\]'"
    ):
        longctx.flash_attention(Q, Q, Q, backend="cupy")
    monkeypatch.undo()
    longctx.reset_registry()


def test_when_none_can_the_error_quotes_every_backend(marks, monkeypatch):
    support = dict(longctx.registry().load_backend("torch").support())
    support.pop("flash_attention")
    monkeypatch.setattr(longctx.registry().load_backend("torch"), "_support", support)
    q = torch.randn(1, 6, 2, 48, requires_grad=True)
    with pytest.raises(longctx.UnsupportedError) as caught:
        longctx.flash_attention(q, q, q, causal=True)
    text = str(caught.value)
    assert "q heads 2, kv heads 2, head_dim 48, fp32, cpu, gradient wanted" in text
    assert "head_dim 48 not in {32, 64}  -> pad to 64 with zeros" in text
    assert "no backward pass  -> call under torch.no_grad()" in text
    assert "does not implement flash_attention" in text


def test_auto_logs_its_choice_once(marks, caplog):
    caplog.set_level(logging.INFO, logger="longctx")
    for _ in range(3):
        mark_of()
    lines = [r.message for r in caplog.records if "mark9" in r.message]
    assert lines == ["flash_attention runs on backend mark9 (chosen by priority)"]


def test_explain_runs_nothing_and_lists_everybody(marks):
    table = longctx.explain(
        "flash_attention", device="cpu", dtype=torch.float32, head_dim=32, features=("softcap",)
    )
    assert table.chosen == "torch"
    rows = {c.backend: c for c in table.candidates}
    assert rows["mark9"].reasons[0].code == ReasonCode.FEATURE
    assert {"torch", "mark7", "mark9", "triton", "cupy", "numba"} <= set(rows)
    assert table.as_dict()["candidates"][0]["backend"] == "torch"
    assert "no softcap yet" in str(table)


def test_explain_unknown_op_names_the_nearest():
    with pytest.raises(longctx.BackendNotFoundError, match="did you mean 'flash_attention'"):
        longctx.explain("flash_atention")


def test_bind_resolves_once(marks, monkeypatch):
    attend = longctx.bind("flash_attention", device="cpu", dtype=torch.float32, head_dim=32)
    monkeypatch.setenv("LONGCTX_BACKEND", "mark7")
    monkeypatch.setattr("longctx.dispatch._resolve", None)
    assert attend(Q, Q, Q)[0, 0, 0, 0].item() == 9


def test_bind_refuses_what_cannot_run(marks):
    with pytest.raises(longctx.UnsupportedError, match="no softcap"):
        longctx.bind(
            "flash_attention", backend="mark9", device="cpu", dtype=torch.float32, head_dim=32,
            features=("softcap",),
        )  # fmt: skip


def test_arch_priority_and_bounds():
    table = longctx.OpSupport(
        dtypes=frozenset({torch.bfloat16}),
        min_arch=(8, 0),
        max_arch=(9, 0),
        priority=10,
        arch_priority={(9, 0): 70},
    )
    assert table.priority_on((9, 0)) == 70
    assert table.priority_on((8, 6)) == 10

    def request(arch):
        return OpRequest("flash_attention", "cuda", arch, torch.bfloat16, 64, 64, 1, 1)

    assert reasons_against(table, request((9, 0))) == ()
    assert (
        reasons_against(table, request((7, 5)))[0].message == "needs sm_80 or newer, this is sm_75"
    )
    assert reasons_against(table, request((10, 0)))[0].code == ReasonCode.ARCH


def test_all_reasons_are_reported_at_once():
    table = longctx.OpSupport(dtypes=frozenset({torch.bfloat16}), head_dims=frozenset({64}))
    request = OpRequest(
        "flash_attention", "cpu", None, torch.float32, 80, 80, 1, 1, ("softcap", "window"), True
    )
    codes = [reason.code for reason in reasons_against(table, request)]
    assert codes == ["device", "dtype", "head-dim", "feature", "feature", "gradient"]


@pytest.mark.parametrize("dynamic", [None, True])
def test_public_functions_trace_whole(marks, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: longctx.flash_attention(q, k, v, causal=True),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    assert compiled(Q, Q, Q)[0, 0, 0, 0].item() == 9
    bound = longctx.bind(
        "flash_attention", backend="mark7", device="cpu", dtype=torch.float32, head_dim=32
    )
    compiled = torch.compile(bound, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert compiled(Q, Q, Q)[0, 0, 0, 0].item() == 7
