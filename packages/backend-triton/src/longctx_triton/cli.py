"""``longctx tune``, joined to the ``longctx`` command of core."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["app"]

app = typer.Typer()
_OUT = Console()


@app.command()
def tune(
    kernels: Annotated[
        list[str] | None,
        typer.Argument(metavar="KERNEL...", help="Such as flash_forward; all when left out."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each call that is timed.")] = 0.15,
    list_only: Annotated[
        bool, typer.Option("--list", help="Show kernels and the tables in use, tune nothing.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write every attempt to this file, as JSON lines."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write this table instead of the one in your cache.")
    ] = None,
) -> None:
    """Find faster tiles of the Triton kernels for this GPU and keep them in your cache."""
    from longctx_triton.tune import command

    if list_only:
        command.list_tables(_OUT)
        return
    command.run_tune(kernels or (), _OUT, seconds=seconds, json=json_file, output=output)
