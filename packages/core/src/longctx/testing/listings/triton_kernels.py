"""Triton and Gluon kernels; the only place that knows how Triton 3.6 to 3.9 compile ahead."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from longctx.testing.listings.kernel import (
    CompilerNotFoundError,
    KernelCompileError,
    compute_capability,
    load_object,
)
from longctx.testing.listings.listing import Listing
from longctx.testing.listings.ptxas import read_report
from longctx.testing.listings.toolkit import disassemble, is_installed

__all__ = ["TritonKernel", "missing_triton"]


def missing_triton() -> str:
    """Return what is not installed and how to install it; empty if all is there."""
    if is_installed("triton"):
        return ""
    return "Triton is not installed: pip install 'triton>=3.6,<3.10'"


@dataclass(frozen=True)
class TritonKernel:
    """A Triton or Gluon kernel with the types and constants of one launch.

    Attributes
    ----------
    source : str
        ``"package.module:name"`` or ``"path/to/file.py:name"`` of the jit function. Autotuners and
        heuristics around it are taken off, so `constexprs` must have what they would give.
    signature : mapping of str to str
        Triton type of every argument that is no constant: ``"*bf16"``, ``"i64"``, ``"fp32"``,
        ``"tensordesc<bf16[64,128]>"``. A launch tells the compiler which pointers and integers
        are multiples of 16, and wide copies (cp.async, TMA) depend on it: write ``"*bf16:16"``
        and ``"i32:16"`` for those. A Gluon descriptor without a layout gets the default one.
    constexprs : mapping of str to object
        Values of the constant arguments; defaults of the function may be left out. A pointer that
        a launch gives as None, and an integer that it gives as 1, are constants too.
    num_warps, num_stages : int
        Warps of a program and depth of software pipelining.
    options : mapping of str to object
        Further compile options, such as ``{"maxnreg": 168}``.
    """

    source: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name, constants that are not None, warps and stages."""
        name = self.source.rpartition(":")[2]
        given = {key: value for key, value in self.constexprs.items() if value is not None}
        values = [f"{key}={value}" for key, value in given.items()]
        values += [f"warps={self.num_warps}", f"stages={self.num_stages}"]
        return f"{name}[{','.join(values)}]"

    def __str__(self) -> str:
        return self.label

    def compile(self, arch: str) -> Listing:
        """Compile for one architecture; see `Kernel.compile`.

        Triton turns ``"sm_90"`` into ``"sm_90a"``; the listing has what was assembled.
        """
        if reason := missing_triton():
            raise CompilerNotFoundError(reason)
        import triton
        from triton.backends.compiler import GPUTarget

        major, minor, _ = compute_capability(arch)
        source = self._source(_jit_function(self.source))
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **self.options,
        }
        with _fresh_compile() as printed:
            try:
                compiled = triton.compile(
                    source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options
                )
            except Exception as error:
                raise KernelCompileError(f"{type(error).__name__}: {error}") from error
            ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
        entry = compiled.metadata.name
        resources = read_report(printed.getvalue(), entry)
        return Listing(
            kernel=self.label,
            arch=resources.arch,
            registers=resources.registers,
            spill_bytes=resources.spill_bytes,
            stack_bytes=resources.stack_bytes,
            shared_bytes=compiled.metadata.shared,
            warnings=resources.warnings,
            ptx=ptx,
            sass=disassemble(cubin, entry),
        )

    def _source(self, function: Any) -> Any:
        from triton.compiler import ASTSource

        gluon = function.is_gluon()
        signature, constants, attributes = {}, dict(self.constexprs), {}
        unknown = [*self.signature.keys(), *self.constexprs.keys()]
        for place, parameter in enumerate(function.params):
            name = parameter.name
            unknown = [other for other in unknown if other != name]
            if name in self.signature:
                kind, _, divisor = self.signature[name].partition(":")
                signature[name] = _with_layout(kind) if gluon else kind
                if divisor:
                    attributes[(place,)] = [["tt.divisibility", int(divisor)]]
                continue
            signature[name] = "constexpr"
            if name not in constants:
                if not parameter.has_default:
                    raise KernelCompileError(f"argument {name!r} has neither a type nor a value")
                constants[name] = parameter.default
        if unknown:
            raise KernelCompileError(f"the function has no argument {', '.join(unknown)}")
        if gluon:
            from triton.experimental.gluon._runtime import GluonASTSource

            return GluonASTSource(function, signature, constants, attrs=attributes)
        return ASTSource(function, signature, constants, attrs=attributes)


def _jit_function(source: str) -> Any:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    function = load_object(source)
    while not isinstance(function, JITFunction):
        if isinstance(function, InterpretedFunction):
            raise KernelCompileError(
                "the kernel was decorated for Triton's interpreter; expected a process without "
                "TRITON_INTERPRET, such as that of compile_kernel"
            )
        if not hasattr(function, "fn"):
            raise KernelCompileError(
                f"{source!r} is a {type(function).__name__}; expected a function under @triton.jit"
            )
        function = function.fn
    return function


def _with_layout(kind: str) -> str:
    """Give a Gluon descriptor without a layout the default one for its block."""
    match = re.fullmatch(r"tensordesc<(\w+)\[([\d,\s]+)\]>", kind)
    if match is None:
        return kind
    from triton import language as tl
    from triton.experimental.gluon.language import NVMMASharedLayout

    block = [int(size) for size in match[2].split(",")]
    layout = NVMMASharedLayout.get_default_for(block, tl.dtype(match[1]))
    return f"tensordesc<{match[1]}[{match[2]}],{layout!r}>"


@contextlib.contextmanager
def _fresh_compile() -> Iterator[io.StringIO]:
    """Compile with an empty cache, for a full one keeps no report, and catch the report."""
    from triton import knobs

    with contextlib.ExitStack() as stack:
        for group in (knobs.nvidia, knobs.cache):
            stack.enter_context(group.scope())
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        yield stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
