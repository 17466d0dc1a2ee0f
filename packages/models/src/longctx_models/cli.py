"""``longctx generate`` and ``longctx demo``, joined to the ``longctx`` command of core."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from longctx_models.engine import LongContextLLM

__all__ = ["app"]

app = typer.Typer()
_ERR = Console(stderr=True)

_BACKEND = Annotated[str | None, typer.Option(help="Attention backend; default: the best.")]
_DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda; default: cuda if any.")]
_DTYPE = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: by device.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(help="Checkpoint directory, or a packaged one such as needle.")
    ],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the text from a file.")] = None,
    question: Annotated[str | None, typer.Option(help="Ask this about the text.")] = None,
    method: Annotated[
        str, typer.Option(help="dense, a-shape, streaming-llm, star, ...")
    ] = "dense",
    option: Annotated[
        list[str] | None, typer.Option(help="name=value of the method; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample within this mass.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    cache: Annotated[str, typer.Option(help="contiguous or paged.")] = "contiguous",
    prefill_chunk: Annotated[int | None, typer.Option(help="Tokens read at once.")] = None,
    backend: _BACKEND = None,
    device: _DEVICE = None,
    dtype: _DTYPE = None,
    as_json: _JSON = False,
) -> None:
    """Continue a text, or answer a question about it."""
    from longctx_models.evaluation.needle import question_prompt
    from longctx_models.methods import make_method

    text = _prompt_text(prompt, prompt_file)
    options = _method_options(option)
    make_method(method, **options)  # a bad name or option is refused before the weights are read
    llm = load_with_progress(
        model, backend=backend, device=device, dtype=dtype, cache=cache,
        prefill_chunk=prefill_chunk,
    )  # fmt: skip
    query = None if question is None else question_prompt(question).decode()
    with progress_bar("reading") as on_prefill:
        stream = llm.stream(
            text,
            query=query,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop or (),
            seed=seed,
            method=llm.make_method(method, **options),
            on_prefill=on_prefill,
        )
        first = next(stream, "")
    if as_json:
        typer.echo(json.dumps(stream.result.as_dict(), indent=2))
        return
    sys.stdout.write(first.lstrip() if question is not None else first)
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    stats = stream.result.stats
    _ERR.print(
        f"[dim]{stats.method}: {stats.prompt_tokens} tokens read in {stats.prefill_seconds:.2f} s "
        f"(density {stats.density:.3f}), {stats.generated_tokens} written at "
        f"{stats.decode_tokens_per_second:.0f} tokens/s, "
        f"cache {stats.cache_bytes / 2**20:.1f} MiB[/]",
        highlight=False,
    )


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(help="A long text; default: the bundled Jargon File.")
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(help="Ask this about the text instead of planting facts; repeatable."),
    ] = None,
    length: Annotated[
        str, typer.Option(help="Lengths in tokens, comma-separated; K is 1024.")
    ] = "2K,4K,8K,16K",
    method: Annotated[
        list[str] | None, typer.Option(help="Methods to compare; repeatable; default: all five.")
    ] = None,
    model: Annotated[str, typer.Option(help="Checkpoint to ask.")] = "needle",
    plot: Annotated[Path, typer.Option(help="Where the heat map goes.")] = Path("out/demo.png"),
    backend: _BACKEND = None,
    device: _DEVICE = None,
    dtype: _DTYPE = None,
    as_json: _JSON = False,
) -> None:
    """Hide facts in a long text, ask for them by each method, compare answers and costs."""
    from longctx_models.demo import DEFAULT_METHODS, Demo, parse_lengths, read_text
    from longctx_models.methods import make_method

    names = method or DEFAULT_METHODS
    for name in names:
        make_method(name)
    lengths = parse_lengths(length)
    source = read_text(text)
    llm = load_with_progress(model, backend=backend, device=device, dtype=dtype)
    methods = [llm.make_method(name) for name in names]
    run = Demo(llm, source, methods=methods, lengths=lengths, questions=tuple(question or ()))
    with progress_bar("demo") as on_step:
        report = run.run(on_step)
    if not question:
        report.plot(plot)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    console = Console()
    report.show(console)
    if not question:
        console.print(f"heat map: {plot}", highlight=False)


def load_with_progress(model: str, *, dtype: str | None, **options: Any) -> LongContextLLM:
    """Load a model, with a progress bar on a terminal."""
    from longctx.errors import nearest_name
    from longctx.support import DTYPES
    from longctx_models.engine import LongContextLLM

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"no dtype is called {dtype!r}: {nearest_name(dtype, DTYPES)}")
    kind = None if dtype is None else DTYPES[dtype]
    with progress_bar("loading") as on_tensor:
        return LongContextLLM.load(model, dtype=kind, progress=on_tensor, **options)


@contextmanager
def progress_bar(label: str) -> Iterator[Any]:
    """Give a ``(done, total)`` callback that draws a bar on a terminal and nothing elsewhere."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_ERR,
        transient=True,
        disable=not _ERR.is_terminal,
    )
    with bar:
        task = bar.add_task(label, total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the text by --prompt or by --prompt-file, one of the two")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    try:
        return prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt_file} is not UTF-8 text: {error.reason}") from error


def _method_options(options: list[str] | None) -> dict[str, str]:
    parsed = {}
    for option in options or ():
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise ValueError(f"a method's option is name=value, got {option!r}")
        parsed[name.replace("-", "_")] = value
    return parsed
