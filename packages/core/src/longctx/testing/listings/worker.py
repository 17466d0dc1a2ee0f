"""A process of its own for compilers: pickled requests in, pickled answers out.

Triton's interpreter and Numba's simulator are chosen for a whole process, and a test run without
a GPU has chosen them. Besides, a compiler that crashes must fail one test and not the run.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO

from longctx.errors import LongctxError
from longctx.testing.listings.kernel import Kernel, KernelCompileError
from longctx.testing.listings.listing import Listing

__all__ = ["in_worker", "main"]

_HIDDEN = ("TRITON_INTERPRET", "NUMBA_ENABLE_CUDASIM")
"""Variables that would make the worker run kernels on the CPU instead of compiling them."""


def in_worker(kernel: Kernel, arch: str) -> Listing:
    """Run ``kernel.compile(arch)`` in the worker, started at the first call and after a crash."""
    request = pickle.dumps((kernel, arch))
    with contextlib.ExitStack() as on_failure:
        worker = _start()
        # an answer that nobody waits for would be taken for the answer to the next request
        on_failure.callback(_stop)
        before = worker.messages.seek(0, os.SEEK_END)
        answer: object
        try:
            worker.requests.write(request)
            worker.requests.flush()
            answer = pickle.load(worker.answers)
        except (EOFError, BrokenPipeError):
            code = worker.process.wait()
            answer = KernelCompileError(f"the compiler's process died with exit status {code}")
        else:
            on_failure.pop_all()
        worker.messages.seek(before)
        said = worker.messages.read()[-4000:].decode(errors="replace").strip()
    if isinstance(answer, Listing):
        return answer
    if isinstance(answer, KernelCompileError):
        text = f"{kernel.label} does not compile for {arch}: {answer}\n{said}"
        raise KernelCompileError(text.rstrip())
    assert isinstance(answer, Exception)
    raise answer


@dataclass(frozen=True)
class _Worker:
    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    answers: IO[bytes]
    messages: IO[bytes]
    resources: contextlib.ExitStack


_running: list[_Worker] = []


def _start() -> _Worker:
    if _running and _running[0].process.poll() is not None:
        _stop()
    if not _running:
        environment = {key: value for key, value in os.environ.items() if key not in _HIDDEN}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with contextlib.ExitStack() as resources:
            messages = resources.enter_context(tempfile.TemporaryFile())
            command = f"from {__name__} import main; main()"
            process = resources.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    env=environment,
                )
            )
            resources.callback(process.kill)
            assert process.stdin is not None
            assert process.stdout is not None
            streams = (process.stdin, process.stdout, messages)
            _running.append(_Worker(process, *streams, resources.pop_all()))
    return _running[0]


@atexit.register
def _stop() -> None:
    while _running:
        _running.pop().resources.close()


def main() -> None:
    """Answer requests ``(kernel, arch)`` with a listing or an error until the input ends."""
    # what compilers print must not get between the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            kernel, arch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: object
        try:
            answer = kernel.compile(arch)
        except (LongctxError, ValueError) as error:
            answer = error
        except Exception as error:
            answer = KernelCompileError(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        pickle.dump(answer, answers)
        answers.flush()
