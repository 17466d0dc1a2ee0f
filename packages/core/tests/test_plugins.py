"""Discovery: good plugins are found, each bad one is recorded with its reason and harms nobody."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

import longctx
from longctx import plugins
from longctx.support import ReasonCode


class FakeDist:
    def __init__(self, name, version):
        self.name = name
        self.version = version


class FakeEntryPoint:
    def __init__(self, name, load, dist="some-dist", version="1.2.3"):
        self.name = name
        self.value = f"{name}_module"
        self.dist = FakeDist(dist, version)
        self.load = load


def info(name="good", **changes):
    fields = {
        "name": name,
        "version": "1.0",
        "protocol": longctx.PROTOCOL_VERSION,
        "load": lambda: longctx.BackendBase({}, {}),
    }
    return longctx.BackendInfo(**(fields | changes))


def plugin(*infos, hook="longctx_backends"):
    module = types.ModuleType("fake_plugin")
    setattr(module, hook, longctx.hookimpl(lambda: list(infos)))
    return module


def raises(error):
    def load():
        raise error

    return load


@pytest.fixture
def discover(monkeypatch):
    """Return a function that discovers the given entry points beside the built-in backend."""

    def with_entry_points(*points):
        monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: list(points))
        longctx.reset_registry()
        return longctx.registry()

    yield with_entry_points
    monkeypatch.undo()
    longctx.reset_registry()


def test_the_built_in_backend_needs_no_metadata(discover):
    assert list(discover().backends) == ["torch"]


def test_a_good_plugin_is_found_with_its_distribution(discover):
    found = discover(FakeEntryPoint("good", lambda: plugin(info())))
    assert list(found.backends) == ["torch", "good"]
    assert found.sources["backends", "good"] == "some-dist 1.2.3"
    assert not found.failures


@pytest.mark.parametrize(
    ("load", "code", "message"),
    [
        (raises(OSError("libcuda.so.1: no such file")), ReasonCode.IMPORT_FAILED, "libcuda.so.1"),
        (raises(ModuleNotFoundError("No module named 'x'", name="x")), "import-failed", "'x'"),
        (raises(SyntaxError("bad")), ReasonCode.IMPORT_FAILED, "SyntaxError"),
        (
            lambda: plugin(info(protocol=(2, 0))),
            ReasonCode.PROTOCOL_VERSION,
            "speaks protocol 2.0",
        ),
        (lambda: plugin(info(protocol=(1, 99))), ReasonCode.PROTOCOL_VERSION, "protocol 1.99"),
        (
            lambda: plugin(info("torch")),
            ReasonCode.DUPLICATE_NAME,
            "'torch' is taken by longctx-core",
        ),
        (
            lambda: types.ModuleType("empty"),
            ReasonCode.IMPORT_FAILED,
            "defines no @longctx.hookimpl",
        ),
        (lambda: plugin(hook="longctx_backend"), ReasonCode.IMPORT_FAILED, "unknown hook"),
        (lambda: plugin(object()), ReasonCode.IMPORT_FAILED, "has no name/protocol"),
        (lambda: plugin(None), ReasonCode.IMPORT_FAILED, "returned None"),
        (lambda: plugin(info(protocol=())), ReasonCode.IMPORT_FAILED, "it is two integers"),
        (lambda: plugin(info(protocol=("1", 0))), ReasonCode.IMPORT_FAILED, "it is two integers"),
        (lambda: plugin(info("Mine")), ReasonCode.IMPORT_FAILED, "names are lower case"),
        (
            lambda: plugin(info(missing=None)),
            ReasonCode.IMPORT_FAILED,
            "without a callable missing",
        ),
        (raises(SystemExit("bye")), ReasonCode.IMPORT_FAILED, "SystemExit: bye"),
    ],
)
def test_a_bad_plugin_is_recorded_and_the_others_still_load(discover, load, code, message):
    found = discover(
        FakeEntryPoint("a_bad", load, dist="bad-dist", version="0.9"),
        FakeEntryPoint("z_good", lambda: plugin(info())),
    )
    assert list(found.backends) == ["torch", "good"]
    (failure,) = found.failures
    assert failure.reason.code == code
    assert message in failure.reason.message
    assert (failure.dist, failure.version) == ("bad-dist", "0.9")
    q = torch.randn(1, 3, 1, 8)
    assert longctx.flash_attention(q, q, q).shape == q.shape


def test_a_missing_module_comes_with_an_install_hint(discover):
    error = ModuleNotFoundError("No module named 'gpu_lib.sub'", name="gpu_lib.sub")
    (failure,) = discover(FakeEntryPoint("bad", raises(error))).failures
    assert failure.reason.hint == "pip install gpu_lib"


def test_strict_mode_raises_what_isolation_would_record(discover, monkeypatch):
    monkeypatch.setenv("LONGCTX_STRICT_PLUGINS", "1")
    with pytest.raises(longctx.PluginError, match="libcuda"):
        discover(FakeEntryPoint("bad", raises(OSError("libcuda"))))


def test_environment_adds_plugins_without_metadata(tmp_path):
    (tmp_path / "env_plugin.py").write_text(
        "import longctx\n"
        "@longctx.hookimpl\n"
        "def longctx_backends():\n"
        "    return [longctx.BackendInfo('from-env', '1', longctx.PROTOCOL_VERSION,\n"
        "            lambda: longctx.BackendBase({}, {}))]\n"
    )
    code = (
        "import longctx; found = longctx.registry();"
        "print('from-env' in found.backends, found.failures)"
    )
    environment = {"PYTHONPATH": str(tmp_path), "LONGCTX_PLUGINS": "env_plugin,no_such_module"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("True")
    assert "no_such_module" in done.stdout


def test_register_plugin_and_back():
    module = plugin(info("mine"))
    longctx.register_plugin(module, name="mine")
    assert "mine" in longctx.registry().backends
    plugins.unregister_plugin(module)
    assert "mine" not in longctx.registry().backends


class RaisingBackend:
    """A backend one of whose answers raises."""

    def __init__(self, what):
        self.what = what

    def support(self):
        if self.what == "support":
            raise RuntimeError("no table today")
        return flash_table() if self.what != "rows" else {"flash_attention": "yes"}

    def reasons(self, request):
        if self.what == "reasons":
            raise RuntimeError("no answer today")
        return ()

    def primitive(self, name):
        if self.what == "primitive":
            raise OSError("no kernel today")
        return lambda *args, **kwargs: None


def flash_table(**changes):
    table = {"dtypes": frozenset({torch.float32}), "devices": frozenset({"cpu"})} | changes
    return {"flash_attention": longctx.OpSupport(**table)}


def unfit(q, k, v):
    return q, k


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (raises(OSError("libcudart.so")), "OSError: libcudart.so"),
        (raises(SystemExit(3)), "SystemExit: 3"),
        (lambda: RaisingBackend("support"), "no table today"),
        (lambda: RaisingBackend("rows"), "declares flash_attention by str"),
        (lambda: RaisingBackend("reasons"), "reasons() raised RuntimeError: no answer today"),
        (lambda: RaisingBackend("primitive"), "no kernel today"),
        (lambda: object(), "lacks support/reasons/primitive"),
        (
            lambda: longctx.BackendBase({"flash": flash_table()["flash_attention"]}, {}),
            "unknown op 'flash'",
        ),
        (lambda: longctx.BackendBase(flash_table(), {}), "brings none of flash_forward"),
        (
            lambda: longctx.BackendBase(flash_table(), {"flash_forward": unfit}),
            "flash_forward does not take causal",
        ),
        (
            lambda: longctx.BackendBase(
                flash_table(gradient=True), {"flash_forward": lambda *a, **k: None}
            ),
            "brings no flash_backward",
        ),
    ],
)
def test_a_backend_that_cannot_be_used_is_left_out_of_dispatch(discover, load, message):
    discover(FakeEntryPoint("odd", lambda: plugin(info("odd", load=load))))
    request = {"device": "cpu", "dtype": torch.float32, "q_heads": 1, "kv_heads": 1, "head_dim": 8}
    row = next(
        c for c in longctx.explain("flash_attention", **request).candidates if c.backend == "odd"
    )
    assert message in row.reasons[0].message
    q = torch.randn(1, 3, 1, 8)
    assert longctx.flash_attention(q, q, q).shape == q.shape


def test_what_is_missing_is_asked_before_the_kernels_are_imported(discover):
    reason = longctx.Reason(ReasonCode.NO_DEVICE, "no GPU", "buy one")
    found = discover(
        FakeEntryPoint(
            "odd",
            lambda: plugin(info("odd", missing=lambda: (reason,), load=raises(AssertionError()))),
        )
    )
    assert found.load_backend("odd") == (reason,)


def test_a_backend_whose_missing_raises_is_left_out(discover):
    found = discover(
        FakeEntryPoint("odd", lambda: plugin(info("odd", missing=raises(OSError("probe failed")))))
    )
    (reason,) = found.load_backend("odd")
    assert "probe failed" in reason.message
    q = torch.randn(1, 3, 1, 8)
    assert longctx.flash_attention(q, q, q).shape == q.shape


def test_a_known_backend_that_failed_is_not_called_uninstalled(discover):
    discover(FakeEntryPoint("triton", raises(OSError("libtriton.so: wrong ELF class"))))
    with pytest.raises(longctx.BackendNotFoundError, match="not usable: OSError: libtriton"):
        longctx.flash_attention(*[torch.randn(1, 3, 1, 8)] * 3, backend="triton")
    rows = {c.backend: c for c in longctx.explain("flash_attention", device="cpu").candidates}
    assert "libtriton.so" in rows["triton"].reasons[0].message
