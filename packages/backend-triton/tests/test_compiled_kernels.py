"""Every kernel as the primitives launch it, compiled without a GPU: instructions and spills."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from longctx.testing.listings import (
    TritonKernel,
    assert_listing,
    compile_kernel,
    needs_compiler,
)

pytest.importorskip("triton")


def table(name: str) -> ModuleType:
    """Load a table beside this file."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calls = table("compiled_table_calls")
recorder = table("compiled_table_recorder")
figures = table("compiled_table_figures")

pytestmark = needs_compiler("triton")

TRITON = "3.6" if version("triton").startswith("3.6.") else "3.9"
"""Whose figures hold."""

DOT = {"sm_80": ("mma", "cp.async"), "sm_90a": ("wgmma", "cp.async")}
AMPERE = {"sm_80": DOT["sm_80"]}
HOPPER = {"sm_90a": DOT["sm_90a"]}
GLUON = {"sm_90a": ("wgmma", "tma", "setmaxnreg")}
GATHERING_GLUON = {"sm_90a": ("wgmma", "cp.async", "setmaxnreg")}
NARROW = {"sm_80": ("mma", "cp.async"), "sm_90a": ("mma", "cp.async")}
"""Too few rows for products of a warpgroup."""
AMPERE_UNSTAGED = {"sm_80": ("mma",)}
HOPPER_UNSTAGED = {"sm_90a": ("wgmma",)}
"""One stage: nothing is copied ahead."""
PLAIN = {"sm_80": (), "sm_90a": ()}
"""No products."""

DOUBLE = ("head_mean_kernel", "keep_count_kernel")
"""Kernels that count in double precision, so that the order of sums does not matter."""

OVERLAPPED = "wgmma.wait_group.sync.aligned 1"
"""A product is awaited while the next one runs."""
FP8_PRODUCT = ".f32.e4m3.e4m3"
FP8_CASES = (
    "flash 64 fp8",
    "flash 128 fp8",
    "flash 128 fp8 window",
    "index scores fp8",
    "index scores fp8 one token",
)
"""Where fp8 is multiplied as it is, from sm_89 on."""

TABLE = (
    # kernel, instructions, cases, further cases that take longer
    ("flash_hopper_kernel", GLUON,
     "flash 64 causal; flash 128 causal; flash 128 full; flash 128 fp8",
     "flash 64 full; flash 64 sinks; flash 64 fp8; flash 128 sinks; flash 128 ping-pong"),
    ("widen_kernel", {"sm_90a": ()}, "flash 128 fp8", "flash 64 fp8"),
    ("flash_forward_kernel", AMPERE, "flash 128 causal",
     "flash 64 causal; flash 64 full; flash 64 packed; flash 64 fp8; flash 128 full; "
     "flash 128 sinks; flash 128 packed; flash 128 fp8"),
    ("flash_forward_kernel", HOPPER, "flash 64 packed; flash 128 packed",
     "flash 128 fp8 window"),
    ("flash_forward_kernel", AMPERE, "", "flash 64 window; flash 128 window"),
    ("flash_forward_kernel", DOT, "flash 128 all", "flash 64 all; flash 256"),
    ("flash_delta_kernel", PLAIN, "flash backward 128 causal",
     "flash backward 64 all; flash backward 256"),
    ("flash_dq_kernel", DOT, "flash backward 128 causal",
     "flash backward 64 causal; flash backward 64 full; flash backward 64 packed; "
     "flash backward 64 all; flash backward 128 full; flash backward 128 packed; "
     "flash backward 128 all"),
    ("flash_dq_kernel", AMPERE_UNSTAGED, "", "flash backward 256"),
    ("flash_dq_kernel", HOPPER, "", "flash backward 256"),
    ("flash_dkdv_kernel", DOT, "flash backward 128 causal",
     "flash backward 64 causal; flash backward 64 full; flash backward 64 packed; "
     "flash backward 64 all; flash backward 128 full; flash backward 128 packed; "
     "flash backward 128 all"),
    ("flash_dkdv_kernel", AMPERE_UNSTAGED, "", "flash backward 256"),
    ("flash_dkdv_kernel", HOPPER_UNSTAGED, "", "flash backward 256"),
    ("flash_backward_hopper_kernel", {"sm_90a": ("wgmma", "tma", "cp.async", "setmaxnreg")},
     "flash backward hopper 64 causal; flash backward hopper 128 causal",
     "flash backward hopper 64 full; flash backward hopper 128 full"),
    ("flash_dq_sums_kernel", {"sm_90a": ()}, "flash backward hopper 128 causal",
     "flash backward hopper 64 causal"),
    ("decode_kernel", NARROW, "decode 128 paged; decode 128 fp8; decode 128 dense; "
     "decode 128 dense fp8",
     "decode 64 paged; decode 64 dense; decode 64 fp8; decode 64 window; decode 128 full batch; "
     "decode 128 apart; decode 128 window; decode 256; decode 64 apart; decode 64 dense fp8"),
    ("decode_kernel", DOT, "decode 128 tokens",
     "decode 64 tokens; decode 64 apart tokens; decode 128 apart tokens"),
    ("merge_splits_kernel", PLAIN, "decode 128 apart", "decode 64 apart; decode 128 apart tokens"),
    ("merge_kernel", PLAIN, "merge 128", "merge 64"),
    ("lightning_state_kernel", DOT, "lightning 128 cut",
     "lightning 64 cut; lightning 128 packed; lightning backward 64; lightning backward 128"),
    ("lightning_scan_kernel", DOT, "lightning 128 cut; lightning 64 cut; lightning 64 padded",
     "lightning 64 packed; lightning 128 packed; lightning 64 whole; lightning 128 whole; "
     "lightning backward 64; lightning backward 128"),
    ("lightning_decode_kernel", PLAIN, "lightning decode 128", "lightning decode 64"),
    ("block_attention_kernel", AMPERE, "block sparse 128", "block sparse 64"),
    ("block_attention_kernel", DOT, "block sparse 128 of 64", "block sparse 64 of 64"),
    ("range_attention_kernel", AMPERE, "window sparse 128",
     "window sparse 64; window sparse 64 by head; window sparse 128 by head"),
    ("range_attention_kernel", DOT, "star context 128 of 1000", "star context 64 of 1000"),
    ("key_walk_hopper_kernel", GLUON, "window sparse 128; star context 128; block sparse 128",
     "window sparse 64; window sparse 64 by head; window sparse 128 by head; star context 64; "
     "block sparse 64; block sparse 64 of 64 by pair; block sparse 128 of 64 by pair; "
     "flash 64 window; flash 128 window"),
    ("walk_list_kernel", {"sm_90a": ()}, "block sparse 128", "block sparse 128 of 64 by pair"),
    ("scatter_stripes_kernel", PLAIN, "stripe sparse 96", ""),
    ("stripe_index_kernel", PLAIN, "stripe sparse 96", ""),
    ("stripe_attention_kernel", AMPERE, "stripe sparse 128", "stripe sparse 64"),
    ("stripe_attention_kernel", HOPPER, "stripe sparse 96", ""),
    ("stripe_walk_hopper_kernel", GLUON, "stripe sparse 128", "stripe sparse 64"),
    ("stripe_tables_kernel", {"sm_90a": ()}, "stripe sparse 128", "stripe sparse 64"),
    ("star_query_kernel", DOT, "star query 128 chained", "star query 64 chained"),
    ("star_query_kernel", NARROW, "star query 128 parts", "star query 64 parts"),
    ("merge_parts_kernel", PLAIN, "star query 128 parts",
     "star query 64 parts; topk attention latent decode"),
    ("statistics_kernel", DOT, "token scores 128", "token scores 64"),
    ("merge_statistics_kernel", PLAIN, "token scores 128", ""),
    ("share_kernel", DOT, "token scores 128", "token scores 64"),
    ("pool_kernel", PLAIN, "token scores 128", ""),
    ("head_mean_kernel", PLAIN, "select tokens", ""),
    ("keep_count_kernel", PLAIN, "select tokens", ""),
    ("row_threshold_kernel", PLAIN, "select tokens", "index topk large"),
    ("row_emit_kernel", PLAIN, "select tokens", "index topk large"),
    ("clear_rows_kernel", PLAIN, "token sparse 128", "token sparse 64"),
    ("token_set_attention_kernel", AMPERE, "token sparse 128", "token sparse 64"),
    ("token_set_attention_kernel", HOPPER, "token sparse 128 portable",
     "token sparse 64 portable"),
    ("token_attention_hopper_kernel", GATHERING_GLUON, "token sparse 128", "token sparse 64"),
    ("quantize_kernel", PLAIN, "quantize", "quantize ue8m0"),
    ("index_score_kernel", DOT, "index scores; index scores fp8",
     "index scores fp8 one token; index scores ranged; index topk; index topk rows"),
    ("score_backward_queries_kernel", DOT, "index backward", ""),
    ("score_backward_keys_kernel", DOT, "index backward", ""),
    ("topk_rows_kernel", PLAIN, "index topk rows", "index topk"),
    ("list_attention_kernel", NARROW, "topk attention 128",
     "topk attention 64; topk attention 64 pages; topk attention 128 pages"),
    ("list_attention_kernel", AMPERE_UNSTAGED, "topk attention wide", ""),
    ("list_attention_kernel", {"sm_90a": NARROW["sm_90a"]}, "topk attention wide", ""),
    ("list_attention_kernel", DOT, "topk attention latent", "topk attention latent decode"),
    ("latent_hopper_kernel", GATHERING_GLUON, "topk attention latent hopper",
     "topk attention latent hopper decode"),
)  # fmt: skip


def rows() -> Iterator[object]:
    """Yield kernel, case, architecture and instructions, one row a test."""
    for kernel, instructions, always, further in TABLE:
        for cases, marks in ((always, ()), (further, (pytest.mark.slow,))):
            for case in filter(None, cases.split("; ")):
                for arch, kinds in instructions.items():
                    name = f"{kernel} in {case} on {arch}"
                    yield pytest.param(kernel, case, arch, kinds, marks=marks, id=name)


def known(figures: Mapping[str, Any], kernel: str, case: str, arch: str) -> Any:
    """Return the figure of a row under this Triton, or None."""
    return figures.get(kernel, {}).get(f"{case} on {arch}", {}).get(TRITON)


@cache
def launches(case: str, arch: str) -> tuple[TritonKernel, ...]:
    """Return what a case launches, each variant of a kernel once."""
    with recorder.recording(recorder.DEVICES[arch]) as found:
        calls.CASES[case]()
    return tuple(found)


@pytest.mark.parametrize(("kernel", "case", "arch", "kinds"), list(rows()))
def test_listing(kernel, case, arch, kinds):
    variants = [k for k in launches(case, arch) if k.source.endswith(f":{kernel}")]
    assert variants, f"{case} does not launch {kernel}"
    spills, stack = known(figures.SPILLS, kernel, case, arch) or (0, 0)
    warning = known(figures.SERIALIZED, kernel, case, arch)
    unwanted = {"wgmma": ("mma",), "mma": ("wgmma",)}.get(kinds[0] if kinds else "", ("mma",))
    for variant in variants:
        listing = compile_kernel(variant, arch)
        assert_listing(
            listing,
            expected=kinds,
            forbidden=(*unwanted, *(() if kernel in DOUBLE else ("fp64",))),
            max_spill_bytes=spills,
            max_stack_bytes=stack,
            allowed_warnings=[warning] if warning else [],
        )
        if kinds == GLUON["sm_90a"] or kernel == "token_attention_hopper_kernel":
            assert OVERLAPPED in listing.ptx
            assert min(exponentials_between_waits(listing.sass)) >= 30, "softmax waits for values"
        if kernel == "flash_backward_hopper_kernel":
            assert "red.relaxed.gpu.global.add.v4.f32" in listing.ptx
            assert OVERLAPPED in listing.ptx
            counts = exponentials_between_waits(listing.sass)
            assert sum(count >= 30 for count in counts) == 2, "the softmax waits for dP"
        if kernel == "topk_rows_kernel":  # places are called contiguous, and are not
            assert "st.global.v" not in listing.ptx
        if case in FP8_CASES and arch == "sm_90a" and kernel != "widen_kernel":
            assert FP8_PRODUCT in listing.ptx


def exponentials_between_waits(sass: str) -> list[int]:
    """Return the exponentials between each wait but for one product and the next for all."""
    waits = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", sass)[1:]
    return [part.split("WARPGROUP.DEPBAR.LE gsb0, 0x0")[0].count("MUFU.EX2") for part in waits]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in calls.CASES if " 64" not in case])
def test_shared_memory_is_enough_on_sm_89(case):
    for variant in launches(case, "sm_89"):
        listing = compile_kernel(variant, "sm_89")
        # no figures are kept here: spills are slow, too much shared memory does not launch
        assert_listing(listing, max_spill_bytes=1 << 16)
        if case in FP8_CASES:
            assert FP8_PRODUCT in listing.ptx


LENGTHS = (2000, 2048, 8192, 5003)
"""Multiples of 16 and others; windows of 1024 hide something in all of them."""
FURTHER = {
    "decode paged": lambda length: calls.decode_case(128, pages=length // 16),
    "lightning": lambda length: calls.lightning_case(128, batch=4, heads=66, tokens=length),
    "merge": lambda length: calls.merge_case(128, torch.bfloat16, tokens=length),
    "topk attention": lambda length: calls.topk_attention_case(128, 128, tokens=length),
    "index scores": lambda length: calls.index_scores_case(tokens=length),
}
"""What the cases do at a length of their own."""
BY_SPLITS = {"merge_splits_kernel": "BLOCK_S"}
"""A power of two for the number of splits, of which there are four."""


@pytest.mark.parametrize("case", [*calls.CASES, *FURTHER])
def test_a_new_length_compiles_nothing(case, monkeypatch):
    """The sequence length enters neither types, nor alignment, nor constants."""
    found = []
    for length in LENGTHS:
        monkeypatch.setattr(calls, "LENGTH", length)
        with recorder.recording(recorder.DEVICES["sm_90a"]) as launched:
            FURTHER.get(case, lambda _: calls.CASES[case]())(length)
        found.append([without_splits(kernel) for kernel in launched])
    for later in found[1:]:
        assert later == found[0]


def without_splits(kernel: TritonKernel) -> TritonKernel:
    """Return the kernel without constants that depend on the number of splits."""
    kept = dict(kernel.constexprs)
    kept.pop(BY_SPLITS.get(kernel.source.rpartition(":")[2]), None)
    return replace(kernel, constexprs=kept)


def test_every_kernel_has_a_row():
    assert {row[0] for row in TABLE} == set(recorder.backend_kernels())


def test_every_figure_has_a_row():
    rows_with_figures = {
        (kernel, row)
        for known_figures in (figures.SPILLS, figures.SERIALIZED)
        for kernel, listed in known_figures.items()
        for row in listed
    }
    assert rows_with_figures <= {
        (kernel, f"{case} on {arch}") for kernel, case, arch, _ in (row.values for row in rows())
    }
