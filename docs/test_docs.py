"""The pages agree with the code: variables, codes, ops, commands."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import longctx
from longctx import cli
from longctx.protocols.families import FAMILIES, GRADIENT_PRIMITIVES, OPS
from longctx.settings import SETTINGS

DOCS = Path(__file__).parent
PACKAGES = DOCS.parent / "packages"
VARIABLE = re.compile(r"LONGCTX_[A-Z_]+")
STORY = "The lamp is old. The door code of the blue house is 4711. The cat sleeps.\n" * 3


def read(page: str) -> str:
    """Return the text of a page."""
    return (DOCS / page).read_text(encoding="utf-8")


def table(text: str) -> dict[str, list[str]]:
    """Return the rows of a page whose first cell is a literal: its text to the other cells."""
    rows = re.findall(r"^\| `([^`]+)` \|(.+)\|$", text, re.MULTILINE)
    return {first: [cell.strip() for cell in rest.split(" | ")] for first, rest in rows}


def test_every_variable_in_the_source_is_in_the_table_and_the_reverse():
    """Whoever adds or renames a variable changes environment.md."""
    sources = [path.read_text(encoding="utf-8") for path in PACKAGES.glob("*/src/**/*.py")]
    used = {name for text in sources for name in VARIABLE.findall(text)}
    assert used
    assert set(table(read("environment.md"))) == used


def test_defaults_of_the_numeric_variables():
    """Defaults and meanings are those of longctx.settings."""
    rows = table(read("environment.md"))
    for name, setting in SETTINGS.items():
        default, effect = rows[name]
        assert default == f"`{setting.default:g}`"
        assert effect.replace("`", "") == f"{setting.meaning}."


def test_no_page_names_a_variable_that_does_not_exist():
    """Every LONGCTX_* on any page stands in the table."""
    known = set(table(read("environment.md")))
    for page in DOCS.rglob("*.md"):
        if "_build" not in page.parts:
            assert set(VARIABLE.findall(page.read_text(encoding="utf-8"))) <= known, page


def test_every_reason_code_is_explained():
    """support.md lists the closed set of codes."""
    codes = {code.value for code in longctx.ReasonCode}
    assert codes == set(table(read("protocol/support.md"))) & codes
    assert set(table(read("troubleshooting.md"))) < codes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_page_documents_every_public_function_and_op(family):
    """Signatures and support matrices are complete."""
    module = importlib.import_module(f"longctx.ops.{family}")
    text = read(f"ops/{family}.md")
    functions = set(re.findall(r"auto(?:function|class):: longctx\.(\w+)", text))
    assert functions >= set(module.__all__)
    (ops,) = re.findall(r"\{support-matrix\} (.+)", text)
    assert ops.split() == list(FAMILIES[family])


def test_the_matrix_has_every_backend_without_loading_any_gpu_library(monkeypatch):
    """A backend that cannot run here still shows what it declares."""
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    before = set(sys.modules)
    declared = importlib.import_module("declared")
    for op in OPS:
        cells = [dict(zip(declared.COLUMNS, row, strict=False)) for row in declared.matrix(op)]
        rows = {row["backend"]: row for row in cells}
        assert set(rows) >= set(longctx.registry().backends) | {"torch", "triton", "cupy", "numba"}
        assert "cpu" in rows["torch"]["devices"]
        assert rows["torch"]["gradient"] == ("yes" if op in GRADIENT_PRIMITIVES else "no")
    if not torch.cuda.is_available():
        assert not {"triton", "cupy", "numba"} & (set(sys.modules) - before)


OPTION = re.compile(r"^\| `([\w-]+)` \| `(\w+)` \| `([^`]+)` \|", re.MULTILINE)


def test_methods_options_and_defaults():
    """models.md has every method with all its options and their defaults."""
    from longctx_models.methods import METHODS
    from longctx_models.selectors import parse_layers

    declared = {
        (name, field.name): field.default_factory() if field.name == "layers" else field.default
        for name, method in METHODS.items()
        for field in dataclasses.fields(method)
    }
    shown = {(method, option): text for method, option, text in OPTION.findall(read("models.md"))}
    assert set(shown) == set(declared)
    for key, default in declared.items():
        text = shown[key]
        assert parse_layers(text) == default if key[1] == "layers" else text == str(default)
    first_column = {name for name in METHODS if f"| `{name}` |" in read("models.md")}
    assert first_column == set(METHODS)


CONSOLE = re.compile(r"^(% [^\n]*\n)?```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[tuple[str, str, str]]:
    """Return command, output and mark of every console block of command-line.md."""
    found = []
    for mark, block in CONSOLE.findall(read("command-line.md")):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output, mark.strip("% \n")))
    return found


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Return a function that runs a ``longctx`` command: its exit code and what it printed."""
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(cli, "_OUT", cli.Console(width=100))

    def command(line, *more):
        program, *arguments = shlex.split(line)
        assert program == "longctx"
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, *more])
        captured = capsys.readouterr()
        return stop.value.code, captured.out + captured.err

    return command


@pytest.mark.parametrize(
    ("command", "output", "mark"), examples(), ids=[command for command, *_ in examples()]
)
def test_commands_of_the_page(run, command, output, mark):
    """Commands exist with their options; what they print is what the page shows.

    ``% differs``: only the column titles are the same on every machine. ``% slow``: not run.
    """
    if mark == "slow":
        code, printed = run(command, "--help")
        assert code == 0, printed
        return
    code, printed = run(command)
    assert code == (2 if "longctx: error:" in output else 0), printed
    if mark == "differs":
        titles = re.findall(r"[\w\"]+", " ".join(re.findall("^[┃{\\[].*$", output, re.MULTILINE)))
        assert set(titles) <= set(re.findall(r"[\w\"]+", printed))
    else:
        assert printed.split() == output.split()
