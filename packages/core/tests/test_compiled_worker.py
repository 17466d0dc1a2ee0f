"""The worker process: environment, noise, errors, crashes."""

from __future__ import annotations

import sys

import pytest

from longctx.testing import listings
from longctx.testing.listings import (
    CompilerNotFoundError,
    KernelCompileError,
    compile_kernel,
    compile_kernels,
    needs_compiler,
    worker,
)

MODULE = """
import os
import sys
from dataclasses import dataclass

from longctx.testing.listings import CompilerNotFoundError, Listing


@dataclass(frozen=True)
class Fake:
    label: str

    def compile(self, arch):
        print("noise on stdout")
        os.write(1, b"noise below python")
        print("said by the compiler", file=sys.stderr, flush=True)
        if self.label == "abort":
            os.abort()
        if self.label == "exit":
            sys.exit(3)
        if self.label == "bug":
            return 1 // 0
        if self.label == "argument":
            raise ValueError("a wrong argument")
        if self.label == "missing":
            raise CompilerNotFoundError("it is not installed: pip install it")
        hidden = os.environ.get("TRITON_INTERPRET"), os.environ.get("NUMBA_ENABLE_CUDASIM")
        return Listing(f"{self.label} {hidden}", arch, os.getpid(), 0, 0, 0, (), "", None)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a class of kernels that the worker of this test can import."""
    (tmp_path / "fake_kernels_of_a_test.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    worker._stop()
    from fake_kernels_of_a_test import Fake

    yield Fake
    worker._stop()
    monkeypatch.delitem(sys.modules, "fake_kernels_of_a_test")


def test_one_worker_answers_until_a_compiler_crashes(fake):
    """Interpreter and simulator are off in it, and what compilers print does no harm."""
    found = list(compile_kernels([fake("a"), fake("b")]))
    expected = [(f"{name} (None, None)", arch) for name in "ab" for arch in ("sm_80", "sm_90a")]
    assert [(listing.kernel, listing.arch) for listing in found] == expected
    (process,) = {listing.registers for listing in found}

    for crash, status in (("abort", "-6"), ("exit", "3")):
        with pytest.raises(KernelCompileError) as failure:
            compile_kernel(fake(crash), "sm_80")
        text = str(failure.value)
        assert text.startswith(f"{crash} does not compile for sm_80: the compiler's process died")
        assert f"exit status {status}\n" in text
        assert "said by the compiler" in text
    again = compile_kernel(fake("a"), "sm_80")
    assert again.registers != process


def test_errors_arrive_as_they_are(fake):
    with pytest.raises(ValueError, match=r"^a wrong argument$"):
        compile_kernel(fake("argument"), "sm_80")
    with pytest.raises(CompilerNotFoundError, match=r"^it is not installed: pip install it$"):
        compile_kernel(fake("missing"), "sm_80")
    with pytest.raises(
        KernelCompileError, match=r"(?s)bug does not .* ZeroDivisionError: .*said by"
    ):
        compile_kernel(fake("bug"), "sm_80")
    # messages of one request are not told again with the next
    with pytest.raises(KernelCompileError) as failure:
        compile_kernel(fake("bug"), "sm_80")
    assert str(failure.value).count("said by the compiler") == 1


def test_an_interrupted_request_leaves_no_answer_behind(fake, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker.pickle, "load", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compile_kernel(fake("late"), "sm_80")
    assert compile_kernel(fake("next"), "sm_80").kernel == "next (None, None)"


def test_a_missing_compiler_is_the_reason_of_a_skip(monkeypatch):
    monkeypatch.setattr(listings.compile, "COMPILERS", {"a": lambda: "pip install a", "b": str})
    assert needs_compiler("a").args == (True,)
    assert needs_compiler("a").kwargs == {"reason": "pip install a"}
    assert needs_compiler("b").args == (False,)
    with pytest.raises(ValueError, match="no compiler 'c'; known: a, b"):
        needs_compiler("c")


@pytest.mark.parametrize(
    ("kernel", "command"),
    [
        (listings.TritonKernel("a:b", {}), "pip install 'triton>="),
        (listings.CudaKernel("", "a"), "pip install nvidia-cuda-nvrtc"),
        (listings.NumbaKernel("a:b", "void()"), "pip install 'numba-cuda"),
    ],
    ids=["triton", "nvrtc", "numba"],
)
def test_a_missing_compiler_is_an_error_that_says_how_to_install_it(monkeypatch, kernel, command):
    for module in ("triton_kernels", "nvrtc_kernels", "numba_kernels"):
        parts = getattr(listings, module)
        monkeypatch.setattr(parts, "is_installed", lambda _: False, raising=False)
        monkeypatch.setattr(parts, "find_library", lambda _: None, raising=False)
    listings.nvrtc_kernels._library.cache_clear()
    with pytest.raises(CompilerNotFoundError) as failure:
        kernel.compile("sm_80")
    assert command in str(failure.value)
