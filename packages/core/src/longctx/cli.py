"""The ``longctx`` command: doctor, backends, explain, bench, and what distributions join to it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longctx.errors import nearest_name

__all__ = ["build_app", "main"]

ENTRY_POINT_GROUP = "longctx.cli"
"""Entry points of this group name typer apps whose commands are joined to ``longctx``."""

_OUT = Console()
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def doctor(
    smoke: Annotated[bool, typer.Option(help="Run a small attention on each backend.")] = True,
    as_json: _JSON = False,
) -> None:
    """Show what is installed, what works, and what the rest is missing."""
    from longctx.doctor import diagnose

    report = diagnose(smoke=smoke)
    if as_json:
        _print_json(report.as_dict())
        return
    table = _table("", "", title="environment", show_header=False)
    for key, value in report.environment.items():
        table.add_row(key, value)
    _OUT.print(table)
    columns = ("backend", "version", "from", "state", "why not, and what to do")
    table = _table(*columns, title="backends")
    for backend in report.backends:
        notes = [f"{r.message}" + (f": {r.hint}" if r.hint else "") for r in backend.reasons]
        if backend.smoke is not None:
            smoke_result = backend.smoke
            notes.append(
                smoke_result.error
                or f"smoke test on {smoke_result.device}: max error {smoke_result.max_error:.1e}"
            )
        state = f"[green]yes[/], {len(backend.ops)} ops" if backend.usable else "[red]no[/]"
        table.add_row(
            backend.name, backend.version, backend.source, state, escape("\n".join(notes))
        )
    _OUT.print(table)
    if report.failures:
        table = _table("plugin", "from", "code", "why it is not used", title="plugins not used")
        for failure in report.failures:
            reason = failure.reason
            hint = f": {reason.hint}" if reason.hint else ""
            dist = f"{failure.dist} {failure.version}".strip()
            table.add_row(failure.source, dist, reason.code, escape(reason.message + hint))
        _OUT.print(table)
    _OUT.print("selectors:", ", ".join(report.selectors) or "none")
    _OUT.print("kv caches:", ", ".join(report.kv_caches) or "none")


def backends(as_json: _JSON = False) -> None:
    """List the installed backends and the support that each declares, op by op."""
    from longctx.plugins import registry

    found = registry()
    rows = []
    for name, info in found.backends.items():
        loaded = found.load_backend(name)
        support = {} if isinstance(loaded, tuple) else loaded.support()
        rows.append(
            {
                "name": name,
                "version": info.version,
                "description": info.description,
                "protocol": info.protocol,
                "ops": {op: table.as_dict() for op, table in support.items()},
                "missing": [r.as_dict() for r in loaded] if isinstance(loaded, tuple) else [],
            }
        )
    if as_json:
        _print_json(rows)
        return
    table = _table(
        "backend", "op", "devices", "dtypes", "head dims", "features", "gradient", "prio"
    )
    for row in rows:
        ops = row["ops"]
        assert isinstance(ops, dict)
        if not ops:
            table.add_row(str(row["name"]), "-", "", "", "", str(row["description"]), "", "")
        for position, (op, declared) in enumerate(ops.items()):
            head_dims = declared["head_dims"]
            table.add_row(
                str(row["name"]) if position == 0 else "",
                op,
                " ".join(declared["devices"]),
                " ".join(declared["dtypes"]),
                "any" if head_dims is None else " ".join(map(str, head_dims)),
                " ".join(declared["features"]),
                "yes" if declared["gradient"] else "",
                str(declared["priority"]),
            )
    _OUT.print(table)


def explain(
    op: Annotated[str, typer.Argument(help="Op name, such as flash_attention.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda; default: cuda if any.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, fp64 or fp8_e4m3.")] = "bf16",
    head_dim: int = 128,
    value_dim: int | None = None,
    q_heads: int = 32,
    kv_heads: int = 8,
    feature: Annotated[
        list[str] | None, typer.Option(help="An optional feature, such as window; repeatable.")
    ] = None,
    gradient: Annotated[bool, typer.Option(help="A backward pass is wanted.")] = False,
    backend: Annotated[str | None, typer.Option(help="Ask for a backend by name.")] = None,
    as_json: _JSON = False,
) -> None:
    """Show which backend would run an op, and why the others would not."""
    from longctx.dispatch import explain as explain_op
    from longctx.protocols.families import FEATURES
    from longctx.support import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"no dtype is called {dtype!r}: {nearest_name(dtype, DTYPES)}")
    for name in feature or ():
        if name not in FEATURES:
            raise ValueError(f"no feature is called {name!r}: {nearest_name(name, FEATURES)}")
    explanation = explain_op(
        op,
        device=device,
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        value_dim=value_dim,
        q_heads=q_heads,
        kv_heads=kv_heads,
        features=tuple(feature or ()),
        gradient=gradient,
        backend=backend,
    )
    if as_json:
        _print_json(explanation.as_dict())
        return
    _OUT.print(f"{op} for {explanation.request.describe()}", highlight=False)
    if explanation.asked:
        _OUT.print(f"{explanation.asked} was asked for by {explanation.asked_by}", highlight=False)
    table = _table("backend", "verdict", "priority", "code", "why not", "what to do")
    for candidate in explanation.candidates:
        chosen = candidate.backend == explanation.chosen
        verdict = "[green]chosen[/]" if chosen else "can" if candidate.can_run else "[red]no[/]"
        priority = "" if candidate.priority is None else str(candidate.priority)
        first = [candidate.backend, verdict, priority]
        for reason in candidate.reasons or (None,):
            tail = ["", "", ""]
            if reason is not None:
                tail = [reason.code.value, escape(reason.message), escape(reason.hint)]
            table.add_row(*first, *tail)
            first = ["", "", ""]
    _OUT.print(table)


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="OP...", help="Ops, such as flash_attention.")
    ] = None,
    all_ops: Annotated[bool, typer.Option("--all", help="Every op.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Show the shapes, run none.")] = False,
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend, or none; repeatable.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Only this peer, or none; repeatable.")
    ] = None,
    shapes: Annotated[
        str,
        typer.Option(
            help="Words that a shape must have, such as 'fa3 D128 causal'; 'call': the small "
            "shapes for the host's time of a call."
        ),
    ] = "",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; default: cuda if any.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32 for all shapes.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time for each row.")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="The backward pass.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write JSON lines to this file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw PNG files into this folder.")] = None,
    recorded: Annotated[
        Path | None, typer.Option("--from", help="Draw this file of JSON lines, measure nothing.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two files of JSON lines.")
    ] = None,
) -> None:
    """Time backends and peers in turns on the standard shapes; a wrong result has no time."""
    from longctx.bench import command

    if compare is not None:
        command.compare_files(*compare, _OUT)
        return
    if recorded is not None:
        if plot is None:
            raise ValueError("--from draws what was recorded: give a folder with --plot")
        command.plot_file(recorded, plot, _OUT)
        return
    if not (ops or all_ops or list_only or shapes):
        raise ValueError("name an op, such as flash_attention, or shapes, or give --all or --list")
    if ops and all_ops:
        raise ValueError("--all is every op: leave out the names, or --all")
    request = command.Request(
        ops=tuple(ops or ()),
        shapes=shapes,
        device=device,
        dtype=dtype,
        backward=backward,
        backends=tuple(backend or ()),
        peers=tuple(peer or ()),
        seconds=seconds,
    )
    if list_only:
        command.list_shapes(request, _OUT)
    else:
        command.run_bench(request, _OUT, json=json_file, plot=plot)


def _table(*columns: str, title: str | None = None, show_header: bool = True) -> Table:
    """Return a table that folds long words: a name or command that is cut cannot be used."""
    table = Table(title=title, title_justify="left", show_header=show_header)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def build_app() -> typer.Typer:
    """Return the command with its own sub-commands and those of other distributions."""
    app = typer.Typer(
        name="longctx",
        help="Long-context attention: backends, selectors and models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
        verbose: Annotated[bool, typer.Option("--verbose", help="Log the choices made.")] = False,
    ) -> None:
        logging.basicConfig(level=logging.INFO if verbose or debug else logging.ERROR)

    for command in (doctor, backends, explain, bench):
        app.command()(command)
    for point in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        try:
            joined = point.load()
        except Exception as error:  # a broken distribution must not take the command down
            typer.echo(f"longctx: commands of {point.value} are missing: {error}", err=True)
            continue
        app.registered_commands.extend(joined.registered_commands)
        app.registered_groups.extend(joined.registered_groups)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error is one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    command = typer.main.get_command(build_app())
    try:
        code = command.main(args=arguments, prog_name="longctx", standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("longctx: stopped", err=True)
        code = 130
    except Exception as error:
        if debug:
            raise
        # the option parser's errors carry their own wording; everything else is a sentence already
        format_message = getattr(error, "format_message", None)
        message = format_message() if format_message else str(error) or type(error).__name__
        if message:  # empty when the help was printed because nothing was asked
            typer.echo(f"longctx: error: {message}", err=True)
        code = 2
    sys.exit(code or 0)
