"""The demo: planted facts, right and wrong answers, the table, the picture, bad input."""

from __future__ import annotations

import errno
import io
import json

import pytest
import torch
from rich.console import Console

from longctx_models import LongContextLLM, cli, demo
from longctx_models.demo import DEPTHS, FACTS, Demo, parse_lengths, read_text
from longctx_models.evaluation.needle import plant
from longctx_models.memory import peak_memory
from longctx_models.methods import make_method
from longctx_models.plotting import heat_map


@pytest.fixture(scope="module")
def llm():
    return LongContextLLM.load("needle", device="cpu")


@pytest.fixture(scope="module")
def report(llm):
    methods = [make_method("dense"), make_method("streaming-llm", window=400)]
    return Demo(llm, read_text(None), methods=methods, lengths=[1024, 2048]).run()


def rows(report):
    return {(row.method, row.length): row for row in report.rows}


def test_the_bundled_text_is_long_prose():
    text = read_text(None)
    assert len(text) > 100_000
    assert text.isascii()


def test_facts_are_planted_where_the_table_says():
    text = plant(read_text(None), FACTS, DEPTHS, 16_000).decode()
    assert len(text.encode()) <= 16_000
    for fact, depth in zip(FACTS, DEPTHS, strict=True):
        assert text.count(fact.statement) == 1
        assert abs(text.index(fact.statement) / len(text) - depth) < 0.02


def test_dense_finds_most_facts_and_streaming_only_those_in_its_window(report):
    found = rows(report)
    assert found["dense", 1024].correct >= 4
    assert found["dense", 2048].correct >= 4
    streaming = found["streaming-llm", 2048]
    outside = [a for a in streaming.answers if a.depth < 0.7]
    assert not any(answer.right for answer in outside)
    assert streaming.density < 0.5
    assert found["dense", 2048].density == 1.0


def test_the_prompt_has_the_stated_length(llm, report):
    for row in report.rows:
        longest = max(len(f"\nQuestion: {fact.question}\nAnswer:") for fact in FACTS)
        run = Demo(llm, read_text(None), methods=[], lengths=[row.length])
        context = run._context(row.length)
        assert row.length - 8 <= len(context.encode()) + longest + 1 <= row.length


def test_the_report_prints_and_serialises(report):
    console = Console(file=io.StringIO(), width=160)
    report.show(console)
    text = console.file.getvalue()
    assert "streaming-llm" in text
    assert "prefill s" in text
    assert json.loads(json.dumps(report.as_dict()))["rows"][0]["correct"] >= 4


def test_the_heat_map_is_a_png(report, tmp_path):
    path = tmp_path / "new" / "demo.png"
    report.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["demo.png"]


def test_a_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "demo.png"
    path.write_bytes(b"old")

    def full(self, partial, **options):
        partial.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left on device"):
        heat_map(path, {"dense": {(0.5, 1024): 1.0}}, depths=[0.5], lengths=[1024], title="t")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["demo.png"]


def test_questions_of_the_user_are_asked_of_the_text_as_it_is(llm):
    text = b"Alice's locker code is 4821.\n" + read_text(None)
    run = Demo(
        llm,
        text,
        methods=[make_method("dense")],
        lengths=[1024],
        questions=["What is Alice's locker code?"],
    )
    (row,) = run.run().rows
    (answer,) = row.answers
    assert answer.right is None
    assert answer.text == "4821"


@pytest.mark.parametrize(
    ("text", "lengths"), [("2K,4096", [2048, 4096]), ("8k, 1000 ,8K", [1000, 8192])]
)
def test_lengths(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "0", "-4K", "4M", "four"])
def test_bad_lengths(text):
    with pytest.raises(ValueError, match="lengths are numbers such as 4096 or 8K"):
        parse_lengths(text)


def test_a_text_that_is_too_short_is_refused(llm):
    with pytest.raises(ValueError, match="the text has about 1000 tokens, 2048 were asked for"):
        Demo(llm, b"x" * 1000, methods=[], lengths=[2048])


def test_a_length_beyond_the_model_is_refused(llm):
    text = b"word " * 200_000
    with pytest.raises(ValueError, match=f"made for {llm.max_positions} tokens"):
        Demo(llm, text, methods=[], lengths=[llm.max_positions + 1])


def test_a_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_text(path)


def test_peak_memory_sees_what_the_block_needs():
    with peak_memory(torch.device("cpu")) as peak:
        held = torch.ones(2**24)
        del held
    if peak.nbytes is None:
        pytest.skip("this machine does not tell")
    assert 0.9 * 2**26 < peak.nbytes < 1.5 * 2**26


def test_prefill_memory_is_linear_in_length(llm):
    """Count bytes, not seconds: four times the length may take at most five times the memory."""
    text = read_text(None).decode()
    peaks = []
    for length in (3_000, 12_000):
        with peak_memory(torch.device("cpu")) as peak:
            llm.prefill_logits(text[:length], query=" ?")
        if peak.nbytes is None:
            pytest.skip("this machine does not tell")
        peaks.append(peak.nbytes)
    assert peaks[1] < 5 * max(peaks[0], 2**20)


def run_command(capsys, *arguments):
    from longctx.cli import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_generate_answers_a_question_about_a_file(capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(plant(read_text(None), FACTS[:2], [0.3, 0.6], 1500))
    code, out, err = run_command(
        capsys, "generate", "needle", "--prompt-file", str(path),
        "--question", "What is Alice's locker code?", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert out == "4821\n"
    assert "tokens read in" in err


def test_generate_json(capsys):
    code, out, _ = run_command(
        capsys, "generate", "needle", "--prompt", "Alice's locker code is 4821.\n",
        "--question", "What is Alice's locker code?", "--json", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out)
    assert result["text"].strip() == "4821"
    assert result["finish_reason"] == "eos"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "needle"), "give the text by --prompt or by --prompt-file"),
        (("generate", "neddle", "--prompt", "x"), "did you mean 'needle'"),
        (("generate", "needle", "--prompt-file", "no-such-file"), "no-such-file"),
        (("generate", "needle", "--prompt", "x", "--method", "stra"), "did you mean 'star'"),
        (
            (
                "generate",
                "needle",
                "--prompt",
                "x",
                "--method",
                "star",
                "--option",
                "block=4",
            ),
            "did you mean 'block_size'",
        ),
        (
            ("generate", "needle", "--prompt", "x", "--option", "block"),
            "a method's option is name=value",
        ),
        (("generate", "needle", "--prompt", "x", "--dtype", "fp33"), "did you mean 'fp32'"),
        (
            ("generate", "needle", "--prompt", "x", "--backend", "trch"),
            "did you mean 'torch'",
        ),
        (("generate", "needle", "--prompt", "x", "--cache", "page"), "did you mean 'paged'"),
        (("generate", "needle", "--prompt", "x", "--temperature", "nan"), "temperature"),
        (("generate", "needle", "--prompt", "x" * 200_000), "the model is made for"),
        (("demo", "--model", "needle", "--length", "4M"), "lengths are numbers"),
        (("demo", "--model", "needle", "--text", "no-such-file"), "no-such-file"),
    ],
)
def test_bad_commands_are_one_sentence_and_exit_code_2(capsys, arguments, message):
    code, out, err = run_command(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("longctx: error: ")
    assert err.strip().count("\n") == 0
    assert out == ""


def test_the_demo_command_writes_table_and_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "Console", lambda: Console(width=160))
    path = tmp_path / "map.png"
    code, out, err = run_command(
        capsys, "demo", "--model", "needle", "--length", "1K", "--method", "dense",
        "--plot", str(path), "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "hunter27" in out
    assert "decode tok/s" in out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_defaults_name_the_five_methods():
    names = [make_method(name).name for name in demo.DEFAULT_METHODS]
    assert names == ["dense", "a-shape", "star", "token-sparse", "streaming-llm"]
