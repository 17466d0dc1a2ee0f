"""``longctx bench`` from the command line: tables, files, comparisons, errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from longctx import cli
from longctx.bench.case import Case, axes
from longctx.bench.comparison import compare_recordings
from longctx.bench.plots import draw
from longctx.bench.records import Row, RowWriter, Status, read_recording
from longctx.bench.tables import quantity


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_OUT", cli.Console(width=160))

    def command(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *map(str, arguments)])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return command


CASES = [
    Case("flash_attention", "t", axes(batch=1, seq=n, q_heads=4, kv_heads=2, head_dim=64))
    for n in (1024, 2048)
]


def row(case=CASES[0], contestant="torch", kind="backend", ms=2.0, **changes):
    values = {
        "status": Status.OK,
        "shape": case.as_dict(),
        "ms": ms,
        "ms_low": None if ms is None else ms * 0.9,
        "ms_high": None if ms is None else ms * 1.1,
        "rounds": 9,
        "tflops": 1.0,
        "tbs": 0.1,
        "gflop": 3.0,
        "gbytes": 0.01,
        "fraction": 0.5,
        "bound": "compute",
        **changes,
    }
    return Row(case.op, case.name, case.grid, contestant, kind, **values)


def recorded(path, *rows, **header):
    with RowWriter(path) as writer:
        writer.header({"device": "box", "torch": "2", **header})
        writer.rows(rows)
    return path


def test_two_ops(run, tmp_path):
    path, pictures = tmp_path / "rows.jsonl", tmp_path / "pictures"
    code, out, err = run(
        "lightning_attention", "decode_attention", "--device", "cpu", "--seconds", 0.01,
        "--json", path, "--plot", pictures, "--backend", "torch",
    )  # fmt: skip
    assert code == 0, err
    assert "ceilings in this run: " in out
    assert "left out: sdpa-fa2" in out
    assert "refused: SDPA takes no page table" in out
    found = read_recording(path)
    assert {row.op for row in found.rows} == {"lightning_attention", "decode_attention"}
    assert {row.status for row in found.rows} == {Status.OK, Status.REFUSED}
    assert found.header["command"] == (
        "longctx bench lightning_attention decode_attention --device cpu --seconds 0.01 "
        "--backend torch"
    )
    assert found.header["device_type"] == "cpu"
    assert found.header["longctx"] == "0.1.0"
    assert len(found.header["commit"] or "0" * 40) in (40, 41)
    assert found.header["ceilings"]["matmul_fp32_tflops"] > 0
    assert (pictures / "latency_lightning_attention.png").stat().st_size > 5000
    assert (pictures / "ratios_decode_attention.png").exists()
    assert (pictures / "roofline.png").exists()
    code, out, _ = run("--compare", path, path)
    assert code == 0
    assert "geometric mean" in out
    assert "1.000" in out


def test_the_list_needs_no_gpu(run):
    code, out, _ = run("--list", "--device", "cuda", "--shapes", "fa3 D128")
    assert code == 0
    assert out.count("flash_attention") == 12
    assert "B1 T16K H16 D128 causal bf16" in out
    assert "--shapes call" not in out
    code, out, _ = run("--list", "--device", "cuda")
    assert "small shapes for the host's time of a call: --shapes call" in out
    code, out, _ = run("--list", "--device", "cuda", "--shapes", "call")
    assert code == 0
    assert out.count(" call ") == 21
    code, out, _ = run("lightning_attention", "--list", "--device", "cpu", "--backward")
    assert code == 0
    assert out.count("backward") == 3


def test_shapes_without_an_op_are_those_of_every_op(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    code, out, err = run(
        "--shapes", "call P8 T1", "--device", "cpu", "--seconds", 0.01, "--json", path
    )
    assert code == 0, err
    assert "host us" not in out, "on a CPU the call is the work"
    found = read_recording(path)
    assert found.header["command"] == (
        "longctx bench --all --shapes 'call P8 T1' --device cpu --seconds 0.01"
    )
    (only,) = found.rows
    assert (only.op, only.grid, only.status) == ("merge_attention", "call", Status.OK)
    assert only.case == "P8 B1 T1 H32 D128 bf16"


def test_compare_tells_faster_slower_missing_and_changed(run, tmp_path):
    short, long = CASES
    a = recorded(
        tmp_path / "a.jsonl",
        row(short, ms=4.0),
        row(short, "sdpa", "peer", ms=1.0),
        row(long, ms=8.0),
        row(long, "gone", ms=1.0),
        commit="0123456789abcdef",
    )
    b = recorded(
        tmp_path / "b.jsonl",
        row(short, ms=2.0),
        row(short, "sdpa", "peer", ms=1.05),
        row(long, ms=None, status=Status.WRONG, note="max error 1"),
        row(long, "new", ms=1.0),
        device="another box",
    )
    code, out, _ = run("--compare", a, b)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert any(line.endswith("torch 4.00 2.00 2.000") for line in lines)
    assert any(line.endswith("sdpa 1.00 1.05 0.952 within the spread") for line in lines)
    assert any(line.endswith("torch 8.00 ok -> wrong") for line in lines)
    assert any(line.endswith("gone 1.00 only in A") for line in lines)
    assert any(line.endswith("new 1.00 only in B") for line in lines)
    assert any("geometric mean of 2" in line and "1.380" in line for line in lines)
    assert "commit 0123456789" in out
    assert "different devices" in out
    pairs = compare_recordings(read_recording(a), read_recording(b))
    assert [pair.ratio for pair in pairs] == [2.0, pytest.approx(1 / 1.05), None, None, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("", "no recording of longctx bench"),
        ("{nonsense", "line 1 is not JSON"),
        ('{"record": "row"}', "its first line is no header"),
        ('{"record": "header", "format": 99}', "another format: this longctx reads 1"),
        ('{"record": "header", "format": 1}\n[1]\n', "line 2 is no object"),
        ('{"record": "header", "format": 1}\n{"a": 1}\n', "line 2 is no row"),
        ('{"record": "header", "format": 1}\n{"record": "row", "op": "x"}\n', "line 2 is no row"),
        ('{"record": "header", "format": 1}\n{oh\n{"a": 1}\n', "line 2 is not JSON"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_unreadable_files_are_one_sentence(run, tmp_path, content, message):
    good, bad = recorded(tmp_path / "good.jsonl", row()), tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = run("--compare", good, bad)
    assert code == 2
    assert message in err
    assert "bad.jsonl" in err
    assert err.startswith("longctx: error: ")
    assert err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name an op"),
        (("flash_atention",), "did you mean 'flash_attention'"),
        (("--all", "flash_attention"), "--all is every op"),
        (("flash_attention", "--device", "tpu"), "--device must be cpu or cuda"),
        (("flash_attention", "--dtype", "bf61"), "did you mean 'bf16'"),
        (("flash_attention", "--dtype", "fp8_e4m3"), "no input dtype is called 'fp8_e4m3'"),
        (("flash_attention", "--shapes", "T3K", "--device", "cpu"), "no shape matches 'T3K'"),
        (("merge_attention", "--backward", "--device", "cpu"), "there is no backward shape"),
        (("flash_attention", "--peer", "sdpaa"), "did you mean 'sdpa'"),
        (("flash_attention", "--backend", "tirton"), "did you mean 'triton'"),
        (("flash_attention", "--seconds", 0), "--seconds must be above 0"),
        (
            ("merge_attention", "--backend", "none", "--peer", "none", "--device", "cpu"),
            "nobody is left to measure",
        ),
        (("--from", "x.jsonl"), "give a folder with --plot"),
        (("--compare", "x.jsonl"), "--compare"),
        (("merge_attention", "--device", "cpu", "--json", "/dev/null/x"), "cannot write"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.startswith("longctx: error: ")
    assert err.strip().count("\n") == 0


def test_pictures_need_matplotlib_before_anything_is_measured(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "rows.jsonl"
    code, out, err = run(
        "merge_attention", "--device", "cpu", "--plot", tmp_path / "p", "--json", path
    )
    assert (code, out) == (2, "")
    assert err == "longctx: error: --plot needs matplotlib: pip install matplotlib\n"
    assert not path.exists()


def test_a_recording_is_drawn_later(run, tmp_path):
    rows = [
        row(case, name, kind, ms=case["seq"] / 500, ratios={"sdpa": 1.2})
        for case in CASES
        for name, kind in (("torch", "backend"), ("sdpa", "peer"))
    ]
    rates = {"matmul_bf16_tflops": 2.0, "copy_tbs": 0.1, "read_tbs": 0.2}
    path = recorded(tmp_path / "a.jsonl", *rows, ceilings=rates, commit="f" * 40)
    code, out, err = run("--from", path, "--plot", tmp_path / "pictures")
    assert code == 0, err
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert names == ["latency_flash_attention.png", "ratios_flash_attention.png", "roofline.png"]
    assert out.count("picture: ") == 3
    wrong = recorded(tmp_path / "b.jsonl", row(status=Status.WRONG, ms=None))
    assert draw(read_recording(wrong), tmp_path / "none") == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0"), (123456.7, "123457"), (12.345, "12.3"), (0.05678, "0.0568")],
)
def test_numbers_have_three_digits(value, text):
    assert quantity(value) == text


def test_importing_longctx_does_not_import_the_bench():
    code = (
        "import sys, longctx, longctx.cli; longctx.cli.build_app(); "
        "print(sorted(m for m in sys.modules if m.startswith(('longctx.bench', 'matplotlib'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
