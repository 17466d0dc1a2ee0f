"""Compiling what a call would launch, many calls at a time, without launching it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

from longctx_triton.tune.candidates import Built

__all__ = ["Compiler"]

MOST_WORKERS = 16


class Compiler:
    """Compiles in threads while it is entered; calls made inside launch nothing.

    Triton's own passes and the assembler run without Python's lock, so that threads are enough.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1))
        self._mode = AsyncCompileMode(self._pool, ignore_errors=True)
        self._found: list[Any] = []
        self._launch: Any = None

    def __enter__(self) -> Compiler:
        """Replace launching by compiling."""
        launch = self._launch = JITFunction.run
        found = self._found

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            made = launch(kernel, *args, grid=grid, warmup=True, **options)
            found.append((kernel.__name__, made))
            return made

        self._mode.__enter__()
        JITFunction.run = compile_only
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Launch again; after an error, what has not begun is not compiled."""
        JITFunction.run = self._launch
        if kind is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._mode.__exit__(kind, error, trace)
        self._pool.shutdown()

    def begin(self, call: Callable[[], Any]) -> list[tuple[str, Any]]:
        """Start compiling what a call launches; `finish` takes what is returned."""
        self._found.clear()
        call()
        return list(self._found)

    @staticmethod
    def finish(begun: Sequence[tuple[str, Any]]) -> list[Built]:
        """Wait for kernels and load them.

        Raises
        ------
        Exception
            Triton's own, if one does not compile or does not fit the GPU's shared memory.
        """
        built = []
        for name, made in begun:
            kernel = made.result() if hasattr(made, "result") else made
            _ = kernel.run  # loads it, or says what the GPU lacks
            built.append(Built(name, kernel.n_spills))
        return built
