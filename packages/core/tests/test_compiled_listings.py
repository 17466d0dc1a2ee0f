"""Counting, reading of assembler reports, and expectations, on stored fragments."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from longctx.testing.listings import (
    INSTRUCTIONS,
    CudaKernel,
    Listing,
    NumbaKernel,
    TritonKernel,
    assert_listing,
    toolkit,
)
from longctx.testing.listings.carries import halves_of_one_register
from longctx.testing.listings.descriptors import descriptors_of_one_path
from longctx.testing.listings.instructions import count_ptx, count_sass
from longctx.testing.listings.kernel import KernelCompileError, compute_capability, load_object
from longctx.testing.listings.ptxas import read_report

PAGE = Path(__file__).parents[3] / "docs" / "backends" / "compile-checks.md"

PTX = """
	.shared .align 16 .b8 tile[1024];
	// wgmma.mma_async in a comment; mma.sync as well
	wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1}, %rd1;
	wgmma.commit_group.sync.aligned;
	@%p3 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2}, {%r1}, {%r5}, {%f5};
	wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32 {%f1}, {%r1}, {%r2}, {%f2};
	mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%f1}, {%r1};
	@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	cp.async.ca.shared.global [%r7], [%rd1], 4;
	cp.async.commit_group;
	cp.async.wait_group 1;
	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1];
	cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {%r3, %r4}], [%r5];
	cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r1], %r2;
	cp.async.bulk.prefetch.tensor.2d.L2.global [%rd1, {%r1, %r2}];
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];
	stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r1, %r2, %r3, %r4};
	atom.global.add.f32 	%f3, [%rd1], %f1;
	red.global.gpu.add.f32 [%rd1], %f1;
	redux.sync.add.s32 %r1, %r2, 0xffffffff;
	st.local.v4.f32 	[%rd5+752], {%f385, %f384, %f383, %f382};
	ld.local.f32 	%f403, [%rd31];
	ld.global.f32 	%f1, [%rd31];
	setmaxnreg.inc.sync.aligned.u32 240;
	fma.rn.f64 	%fd3, %fd1, %fd2, %fd3;
	setp.lt.f64 	%p1, %fd1, 0d0000000000000000;
	fma.rn.f32 	%f3, %f1, %f2, %f3;
"""
IN_PTX = {
    "wgmma": 2,
    "mma": 3,
    "cp.async": 2,
    "tma": 3,
    "ldmatrix": 1,
    "stmatrix": 1,
    "atomic": 2,
    "local": 2,
    "setmaxnreg": 1,
    "fp64": 2,
}

SASS = """
        /*0120*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0130*/              @!P0 QGMMA.64x8x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24 ;
        /*0140*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_1:
        /*0150*/              @!P0 IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
        /*0160*/               @P1 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0170*/                   LDGDEPBAR ;
        /*0180*/              @UP1 UTMALDG.2D [UR8], [UR4] ;
        /*0190*/                   UTMASTG.2D [UR8], [UR4] ;
        /*01a0*/                   UTMACMDFLUSH ;
        /*01b0*/                   UBLKCP.S.G [UR4], [UR6], UR8 ;
        /*01c0*/                   UTMAPF.L2.2D [UR4], [UR6] ;
        /*01d0*/                   LDSM.16.M88.4 R4, [R2] ;
        /*01e0*/                   STSM.16.M88.4 [R2], R4 ;
        /*01f0*/              @!PT ATOMG.E.ADD.F32 PT, R3, desc[UR4][R2.64], R5 ;
        /*0200*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5 ;
        /*0210*/                   REDUX.SUM UR4, R2 ;
        /*0220*/                   ATOMS.ARRIVE.64 RZ, [R2] ;
        /*0230*/                   ATOMS.ADD R2, [R3], R4 ;
        /*0240*/                   STL.128 [R1+0x10], R4 ;
        /*0250*/                   LDL.LU R4, [R1+0x14] ;
        /*0260*/                   LDLX R4, R1 ;
        /*0270*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;
        /*0280*/                   DFMA R4, R2, R6, R4 ;
        /*0290*/                   FFMA R4, R2, R6, R4 ;
"""
IN_SASS = {
    "wgmma": 2,
    "mma": 2,
    "cp.async": 1,
    "tma": 3,
    "ldmatrix": 1,
    "stmatrix": 1,
    "atomic": 3,
    "local": 2,
    "setmaxnreg": 1,
    "fp64": 1,
}

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function 'other'
ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored to maintain \
compatibility across compilation units.
ptxas info    : Compiling entry function '_Z1tILi3EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z1tILi3EEvPf
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 3.444 ms
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
ptxas         .     200 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 248 bytes cumulative stack size, \
1200 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 4.453 ms
"""
CALLEE = """ptxas info    : Function properties for _Z1fPfi
ptxas         .     48 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
BLACKWELL = """ptxas-blackwell info    : 0 bytes gmem
ptxas-blackwell info    : Compiling entry function 'mm' for 'sm_90a'
ptxas-blackwell info    : Function properties for mm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas-blackwell info    : Used 168 registers, used 1 barriers
"""

LISTING = Listing("flash[D=64]", "sm_90a", 168, 0, 0, 200 * 1024, (), PTX, SASS)


def test_the_fragments_have_every_kind():
    assert set(IN_PTX) == set(IN_SASS) == set(INSTRUCTIONS)


@pytest.mark.parametrize("kind", INSTRUCTIONS)
def test_count(kind):
    assert count_ptx(PTX, kind) == IN_PTX[kind]
    assert count_sass(SASS, kind) == IN_SASS[kind]
    without_sass = dataclasses.replace(LISTING, sass=None)
    assert (LISTING.count(kind), without_sass.count(kind)) == (IN_SASS[kind], IN_PTX[kind])
    assert not dataclasses.replace(LISTING, sass="").has(kind)


def test_an_unknown_kind_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="no instruction kind 'wgma'; did you mean 'wgmma'"):
        LISTING.count("wgma")
    with pytest.raises(ValueError, match="did you mean 'wgmma'"):
        assert_listing(LISTING, forbidden=["wgma"])


def test_a_report_is_read_for_one_kernel():
    small = read_report(REPORT, "_Z1tILi3EEvPf")
    other = read_report(REPORT, "other")
    assert (small.registers, small.spill_bytes, small.stack_bytes) == (8, 0, 0)
    assert small.shared_bytes == 0
    assert (other.registers, other.spill_bytes, other.stack_bytes) == (34, 32, 248)
    assert (other.shared_bytes, other.arch) == (1200, "sm_90a")
    assert read_report(BLACKWELL, "mm").registers == 168


def test_spills_of_a_function_that_is_not_inlined_count_for_every_kernel():
    for entry, own in (("_Z1tILi3EEvPf", 0), ("other", 32)):
        assert read_report(REPORT + CALLEE, entry).spill_bytes == own + 8


def test_warnings_about_other_kernels_are_left_out():
    (ignored,) = read_report(REPORT, "_Z1tILi3EEvPf").warnings
    assert "C7504" in ignored
    assert [text[text.index("(C") :][:7] for text in read_report(REPORT, "other").warnings] == [
        "(C7511)",
        "(C7504)",
    ]


def test_a_report_without_the_kernel_is_refused():
    with pytest.raises(
        ValueError, match=r"no kernel 'flash'; kernels in it: _Z1tILi3EEvPf, other"
    ):
        read_report(REPORT, "flash")


def test_met_expectations_return_the_listing():
    checked = assert_listing(LISTING, expected=["wgmma", "tma"], max_registers=168)
    assert checked is LISTING


@pytest.mark.parametrize(
    ("change", "limits", "message"),
    [
        ({}, {"forbidden": ["fp64"]}, "1 fp64, which is forbidden"),
        ({"sass": ""}, {"expected": ["wgmma"]}, "no wgmma, which is expected"),
        ({}, {"max_registers": 167}, "168 registers, at most 167 allowed"),
        ({"spill_bytes": 8}, {}, "8 bytes of spills, at most 0 allowed"),
        ({"stack_bytes": 800}, {}, "800 bytes of stack, at most 0 allowed"),
        (
            {"stack_bytes": 800},
            {"max_stack_bytes": 799},
            "800 bytes of stack, at most 799 allowed",
        ),
        ({"arch": "sm_80"}, {}, "204800 bytes of shared memory, at most 166912 allowed"),
        ({"shared_bytes": 232449}, {}, "232449 bytes of shared memory, at most 232448 allowed"),
        ({}, {"max_shared_bytes": 9}, "204800 bytes of shared memory, at most 9 allowed"),
        ({"warnings": ("(C7511) serialized",)}, {}, "assembler warning: (C7511) serialized"),
    ],
)
def test_unmet_expectations(change, limits, message):
    """Kernel, architecture, finding and what was found are in the message."""
    listing = dataclasses.replace(LISTING, **change)
    with pytest.raises(AssertionError) as failure:
        assert_listing(listing, **limits)
    text = str(failure.value)
    assert text.startswith(f"flash[D=64] for {listing.arch}:\n")
    assert f"  - {message}\n" in text
    assert text.count("  - ") == 1
    assert f"found: {listing.summary()}" in text


def test_all_unmet_expectations_are_reported_at_once():
    with pytest.raises(AssertionError) as failure:
        assert_listing(LISTING, expected=["mma"], forbidden=["tma", "local"], max_registers=9)
    assert str(failure.value).count("  - ") == 3


def test_allowances():
    spilling = dataclasses.replace(LISTING, spill_bytes=16, stack_bytes=8, warnings=("(C7508) x",))
    assert_listing(spilling, max_spill_bytes=16, allowed_warnings=["C7508"])
    with pytest.raises(AssertionError, match="C7508"):
        assert_listing(spilling, max_spill_bytes=16, allowed_warnings=["C7511"])


LOW = "        /*1c20*/                   UIADD3 UR26, UP0, UR4, 0x40, URZ ;\n"
HIGH = "        /*1d30*/                   UIADD3.X UR31, UR4, -0x7fffffe0, URZ, UP0, !UPT ;\n"


@pytest.mark.parametrize(
    ("between", "wrong"),
    [
        ("", 1),
        ("        /*1c60*/                   UIADD3 UR28, UR4, 0x4000, URZ ;\n", 1),
        ("        /*1c60*/                   UMOV UR4, UR9 ;\n", 0),
        ("        /*1c60*/                   UIADD3 UR7, UP0, UR8, 0x2, URZ ;\n", 0),
        ("        /*1c60*/                   UIADD3 UR7, UP0, UR7, 0x2, URZ ;\n", 0),
    ],
    ids=["both", "a sum between", "rewritten", "another carry", "another carry in place"],
)
def test_halves_of_one_register_are_found(between, wrong):
    found = halves_of_one_register(LOW + between + HIGH)
    assert len(found) == wrong
    assert not halves_of_one_register(LOW + HIGH.replace("UR4", "UR5"))
    with pytest.raises(AssertionError, match="both halves of a sum from one register: UIADD3"):
        assert_listing(dataclasses.replace(LISTING, sass=LOW + HIGH))


TWO_LOOPS = """
        /*0010*/                   UIADD3 UR17, -UR49, URZ, URZ ;
        /*0020*/                   UMOV UR18, UR12 ;
        /*0030*/                   UMOV UR19, 0x40000040 ;
        /*0040*/                   USEL UR16, UR55, UR16, UP1 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   UIADD3 UR16, UP0, UR8, 0x2, URZ ;
        /*0070*/                   UIADD3.X UR17, UR4, 0x40000040, URZ, UP0, !UPT ;
.L_x_1:
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*00a0*/               @P2 BRA `(.L_x_4) ;
.L_x_3:
        /*00b0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*00c0*/               @P3 BRA `(.L_x_3) ;
.L_x_4:
        /*00d0*/                   EXIT ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5);
"""
"""Both loops multiply with one descriptor; the branch to the second one jumps past its sum."""
SECOND = ".L_x_2:\n"
SUM = """
        /*00a2*/                   UIADD3 UR16, UP0, UR8, 0x2, URZ ;
        /*00a4*/                   UIADD3.X UR17, UR4, 0x40000040, URZ, UP0, !UPT ;
"""
IN_TURNS = """
        /*0010*/                   R2UR UR6, R0 ;
        /*0020*/                   R2UR UR7, R5 ;
.L_x_1:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR4].tnspB, R24 ;
        /*0040*/                   R2UR UR6, R89 ;
        /*0050*/                   R2UR UR7, R88 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_a_descriptor_made_in_the_first_loop_alone_is_found():
    found = descriptors_of_one_path(TWO_LOOPS)
    assert [text.partition(" of ")[0] for text in found] == ["UR16", "UR17"]
    assert all("HGMMA.64x64x16" in text for text in found)
    assert found[1].endswith(
        "from UIADD3 UR17, -UR49, URZ, URZ or UIADD3.X UR17, UR4, 0x40000040, URZ, UP0, !UPT"
    )
    with pytest.raises(AssertionError, match="not made on every path to its use: UR16 of HGMMA"):
        assert_listing(dataclasses.replace(LISTING, sass=TWO_LOOPS))


@pytest.mark.parametrize(
    "sass",
    [
        TWO_LOOPS.replace(SECOND, SECOND + SUM),
        TWO_LOOPS.replace(SECOND, SECOND + "  /*00a2*/  UIADD3.64 UR16, UR8, UR18, URZ ;\n"),
        TWO_LOOPS.replace("@P1 BRA `(.L_x_2)", "@P1 BRA `(.L_x_4)"),
        TWO_LOOPS.replace("R24, gdesc", "R24, R56, gdesc"),
        IN_TURNS,
        "",
    ],
    ids=["sum of its own", "pair of its own", "both skipped", "A in registers", "turns", "none"],
)
def test_descriptors_made_on_every_path(sass):
    assert not descriptors_of_one_path(sass)


@pytest.mark.parametrize(
    "change",
    [
        ("R2UR UR6, R0", "NOP"),
        ("R2UR UR6, R0", "UISETP.GE.AND UP0, UPT, UR6, UR4, UPT"),
        (".L_x_1:", "  /*0028*/ @UP0 UMOV UR6, UR9 ;\n.L_x_1:"),
        ("R2UR UR7, R88", "UIMAD.WIDE UR6, UR14, UR15, URZ"),
    ],
    ids=["never made", "only read", "predicated", "both halves"],
)
def test_what_makes_a_descriptor(change):
    assert descriptors_of_one_path(IN_TURNS.replace(*change))


@pytest.mark.parametrize(
    ("branch", "count"),
    [
        ("      BRA `(.L_x_2)", 0),
        ("  @P1 BRA `(.L_x_2)", 2),
        ("      BRA UP1, `(.L_x_2)", 2),
        ('      BRX R4 -0x70     (*"BRANCH_TARGETS .L_x_0,.L_x_2"*)', 2),
        ("  @P1 EXIT", 0),
    ],
)
def test_branches_past_a_descriptor(branch, count):
    sass = TWO_LOOPS.replace("         @P1 BRA `(.L_x_2)", branch)
    sass = sass.replace(
        "        /*0060", ".L_x_0:\n        /*0060" if "BRX" in branch else "/*0060"
    )
    assert len(descriptors_of_one_path(sass)) == count


def test_a_string_is_no_collection_of_kinds():
    with pytest.raises(ValueError, match=r"write \('wgmma',\)"):
        assert_listing(LISTING, expected="wgmma")


def test_summary_and_repr():
    assert LISTING.summary() == (
        "168 registers, 0 bytes of spills, 0 bytes of stack, 204800 bytes of shared memory; "
        "wgmma 2, mma 2, cp.async 1, tma 3, ldmatrix 1, stmatrix 1, atomic 3, local 2, "
        "setmaxnreg 1, fp64 1"
    )
    assert "HGMMA" not in repr(LISTING)


def test_disassembly_of_one_kernel(tmp_path, monkeypatch):
    """Only the code between a kernel's label and the next section is returned."""
    text = "\t.target\tsm_90a\n//------------- .text.ab ---\n\nab:\n.text.ab:\n  /*0000*/ HMMA ;\n"
    text += "//--------------------- .text.a ----\n\t.align 128\n.text.a:\n  /*0000*/ EXIT ;\n"
    (tmp_path / "listing").write_text(text, encoding="utf-8")
    tool = tmp_path / "nvdisasm"
    tool.write_text(f"#!/bin/sh\ncat {tmp_path}/listing\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setattr(toolkit, "_nvdisasm", lambda: str(tool))
    assert toolkit.disassemble(b"", "ab") == "  /*0000*/ HMMA ;\n"
    assert toolkit.disassemble(b"", "a") == "  /*0000*/ EXIT ;\n"
    with pytest.raises(ValueError, match="no kernel 'b' in the disassembly"):
        toolkit.disassemble(b"", "b")
    monkeypatch.setattr(toolkit, "_nvdisasm", lambda: None)
    assert toolkit.disassemble(b"", "a") is None


def test_wheels_and_toolkits_are_searched(tmp_path, monkeypatch):
    """The layouts of the CUDA 13 wheels and of an installed toolkit."""
    for folder in ("site/nvidia/cu13/lib", "site/nvidia/cu13/include", "toolkit/lib64"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "toolkit/lib64/libxyz.so.12").touch()
    monkeypatch.setattr(toolkit, "is_installed", lambda _: False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert toolkit.find_library("xyz") == str(tmp_path / "toolkit/lib64/libxyz.so.12")
    (tmp_path / "site/nvidia/cu13/lib/libxyz.so.13").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(toolkit, "is_installed", lambda name: name == "nvidia")
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert toolkit.find_library("xyz") == str(tmp_path / "site/nvidia/cu13/lib/libxyz.so.13")
    assert str(tmp_path / "site/nvidia/cu13/include") in toolkit.find_include_folders()
    assert toolkit.find_library("no_such_library_anywhere") is None


@pytest.mark.parametrize(
    ("arch", "parts"), [("sm_80", (8, 0, "")), ("sm_90a", (9, 0, "a")), ("sm_120", (12, 0, ""))]
)
def test_architectures(arch, parts):
    assert compute_capability(arch) == parts


@pytest.mark.parametrize("arch", ["90", "sm_9", "compute_90", "sm_90A", ""])
def test_misspelt_architectures(arch):
    with pytest.raises(ValueError, match="expected a spelling such as 'sm_80'"):
        compute_capability(arch)


@pytest.mark.parametrize(
    "source", ["nowhere", "longctx.nowhere:x", "longctx:nowhere", "/no/file.py:x"]
)
def test_sources_that_do_not_exist(source):
    with pytest.raises(KernelCompileError, match=r"cannot be loaded .* expected 'package\.module"):
        load_object(source)


def test_sources(tmp_path):
    (tmp_path / "some.py").write_text("value = object()\n", encoding="utf-8")
    place = f"{tmp_path}/some.py:value"
    assert load_object(place) is load_object(place)
    assert load_object("longctx.testing.listings:Listing") is Listing


def test_labels_tell_variants_apart():
    kernel = TritonKernel("a.b:flash", {}, {"D": 64, "x": None, "CAUSAL": True}, num_warps=8)
    assert str(kernel) == "flash[D=64,CAUSAL=True,warps=8,stages=3]"
    assert str(CudaKernel("", "flash<64, true>")) == "flash<64, true>"
    assert str(NumbaKernel("a.py:scale", "void(float32[::1])")) == "scale[void(float32[::1])]"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the package")
def test_the_page_lists_every_kind_with_its_mnemonics():
    rows = re.findall(r"^\| `([\w.]+)` \| .+ \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    mnemonics = {kind: re.findall(r"`(\w+)`", sass) for kind, sass in rows}
    assert set(mnemonics) == set(INSTRUCTIONS)
    for kind, names in mnemonics.items():
        assert count_sass("".join(f" /*00*/ {name}.X R1 ;\n" for name in names), kind) == len(
            names
        )
