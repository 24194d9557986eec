"""The command line: parse, call, print.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 nothing to replace, 4 damaged file.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ._native import build_info
from .apply import describe, merge
from .auto_fact import auto_fact
from .checkpoint import inspect_file
from .files import is_empty_or_absent, size_on_disk
from .ops.api import why_not
from .plan import RankPlan
from .planning import make_plan
from .rank import Energy
from .version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Low-rank twins for the linear and convolution layers of PyTorch models.")
FAILED, USAGE, NOTHING, DAMAGED = 1, 2, 3, 4

Source = Annotated[str, typer.Argument(help="Folder or hub name of a transformers model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty, unless --force.")]
Force = Annotated[bool, typer.Option(help="Replace the output folder.")]
Rank = Annotated[int | None, typer.Option(help="The same rank for every layer.")]
Keep = Annotated[float | None, typer.Option(help="Share of each replaced layer's parameters to keep, in (0, 1).")]
EnergyOption = Annotated[float | None, typer.Option(help="Share of the squared singular values to keep, in (0, 1].")]
Include = Annotated[list[str] | None, typer.Option(help="Only layers whose name matches this glob; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Not layers whose name matches this glob; repeatable.")]
RoundTo = Annotated[int | None, typer.Option(help="Ranks become multiples of this.")]
AllowSlower = Annotated[bool, typer.Option(help="Also convolutions that a CPU computes no faster than before.")]
PerDimension = Annotated[str, typer.Option(help="Of a convolution: one number, or one for each dimension: 2x1.")]
Padding = Annotated[str, typer.Option(help="Of a convolution: likewise, or before:after: 3:0x1:1.")]


@app.command()
def plan(source: Source, rank: Rank = None, keep: Keep = None, energy: EnergyOption = None, include: Include = None,
         exclude: Exclude = None, round_to: RoundTo = None, allow_slower: AllowSlower = False,
         save: Annotated[Path | None, typer.Option(help="Write the plan to this JSON file.")] = None,
         as_json: Json = False) -> None:
    """Show what would happen to every layer and why; changes nothing."""
    with _errors():
        from .hf import load_model

        rule = _one_of(rank=rank, keep=keep, energy=energy)
        made = make_plan(load_model(source), rule, include=include, exclude=exclude, round_to=round_to,
                         allow_slower=allow_slower)
        if save:
            made.save(save)
    _show(made.to_dict(), made.table(), as_json, made.summary)
    _require_layers(made)


@app.command()
def compress(source: Source, out: Out, rank: Rank = None, keep: Keep = None, energy: EnergyOption = None,
             plan: Annotated[Path | None, typer.Option(help="A plan as JSON, from `shrank plan --save`.")] = None,
             include: Include = None, exclude: Exclude = None, round_to: RoundTo = None,
             allow_slower: AllowSlower = False, force: Force = False, as_json: Json = False) -> None:
    """Write a low-rank copy of a model that from_pretrained loads after `import shrank`."""
    _require_free(out, force)
    with _errors():
        from .hf import load_model, save_model

        rule = _one_of(rank=rank, keep=keep, energy=energy, plan=plan)
        model = load_model(source)
        made = RankPlan.load(plan) if plan else make_plan(
            model, rule, include=include, exclude=exclude, round_to=round_to, allow_slower=allow_slower, errors=False)
    _require_layers(made)
    with _errors():
        model = auto_fact(model, made)
        save_model(model, source, out)
    done = model.shrank_plan
    _show({**done.to_dict(), "bytes": size_on_disk(out)}, done.table(), as_json,
          f"{done.summary}\nwrote {out}: {size_on_disk(out):,} bytes")


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="Folder or .safetensors file that shrank wrote.")],
            as_json: Json = False) -> None:
    """Show the low-rank layers of a saved model and verify its weights."""
    with _errors(code=DAMAGED):
        if path.is_dir():
            from .hf import inspect_folder

            found, problems = inspect_folder(path)
        else:
            found, problems = inspect_file(path)
    facts = {"path": str(path), "bytes": size_on_disk(path), "problems": problems, **found.to_dict()}
    _show(facts, found.table(), as_json, f"{found.summary}\n{path}: {facts['bytes']:,} bytes")
    if problems:
        _fail("; ".join(problems), DAMAGED)


@app.command(name="merge")
def merge_command(source: Source, out: Out, force: Force = False, as_json: Json = False) -> None:
    """Write a dense model: every low-rank layer multiplied out."""
    _require_free(out, force)
    with _errors():
        from .hf import load_model, save_model

        model = load_model(source)
        before = describe(model)
        _require_layers(before)
        save_model(merge(model), source, out)
    _show({"path": str(out), "merged": len(before.low_rank), "bytes": size_on_disk(out)}, None, as_json,
          f"wrote {out}: {len(before.low_rank)} layers merged, {size_on_disk(out):,} bytes")


@app.command()
def bench(source: Annotated[str | None, typer.Argument(help="Folder or hub name of a transformers model.")] = None,
          other: Annotated[str | None, typer.Argument(help="A second model to compare with.")] = None,
          batch: int = 8, length: int = 128, rounds: int = 7, threads: int | None = None, device: str = "cpu",
          plot: Annotated[Path | None, typer.Option(help="Measure nothing: show these results of benchmarks/ "
                                                         "as a table, and draw them beside the file.")] = None,
          as_json: Json = False) -> None:
    """Throughput and peak memory of one model, or of two in turns, on this machine."""
    if (source is None) == (plot is None):
        _fail("give a model to measure, or --plot with results to show", USAGE)
    if plot:
        _plot(plot, as_json)
        return
    with _errors():
        from .bench import Workload, compare

        results = compare([s for s in (source, other) if s], Workload(batch, length, rounds, threads, device))
    table = Table(title=f"batch {batch}, length {length}, {device}, median of {rounds} rounds", title_justify="left")
    for column in ("model", "parameters", "throughput", "relative", "peak memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for x in results:
        table.add_row(x.source, f"{x.parameters:,}", f"{x.throughput:,.1f} {x.unit}",
                      f"{x.throughput / results[0].throughput:.2f}x", f"{x.peak_memory / 2**20:,.0f} MiB")
    _show([asdict(x) for x in results], table, as_json)


def _plot(path: Path, as_json: bool) -> None:
    with _errors():
        from .bench_plot import draw, load, table

        results, picture = load(path), path.with_suffix(".png")
        draw(results, picture)
    _show(results.rows, table(results), as_json, f"wrote {picture}")


@app.command()
def explain(shape: Annotated[str | None, typer.Option(help="M,K,N,R: tokens, in_features, out_features, rank.")] = None,
            conv: Annotated[str | None, typer.Option(help="B,C,INPUT,KERNEL,N,R: 32,64,56x56,3x3,64,16.")] = None,
            stride: PerDimension = "1", padding: Padding = "0", dilation: PerDimension = "1", groups: int = 1,
            up_groups: int = 1, dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp64.")] = "bf16",
            gpu: Annotated[str | None, typer.Option(help="Such as H200; without it, the one in this machine.")] = None,
            activation: Annotated[str, typer.Option(help="none, relu, gelu, gelu_tanh or silu.")] = "none",
            bias: bool = True, residual: bool = False, training: bool = False, as_json: Json = False) -> None:
    """Which kernel a low-rank layer takes on a GPU, why, and its predicted time; needs no GPU."""
    with _errors():
        from .explain import explain, parse_conv, parse_shape, table

        _one_of(shape=shape, conv=conv)
        layer = parse_shape(shape) if conv is None else parse_conv(conv, stride, padding, dilation, groups, up_groups)
        facts = explain(layer, dtype, gpu, activation, bias, residual, training)
    _show(facts, table(facts), as_json)


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, the backend in use, and why the native kernels are off."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"shrank": __version__}
    for name in ("torch", "transformers", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    reasons, built = why_not(), build_info()
    table = Table(show_header=False)
    for name, value in versions.items():
        table.add_row(name, value)
    table.add_row("backend", "native" if not reasons else "torch")
    if built:
        table.add_row("native extension", f"CUDA {built['cuda']}, {built['archs']}; built with torch {built['torch']}")
        table.add_row("driver", f"CUDA up to {built['driver']}" if built["driver"] else "none")
    table.add_row("why not native", "\n".join(reasons))
    facts = {**versions, "backend": "native" if not reasons else "torch", "built": built, "why_not_native": reasons}
    _show(facts, table, as_json)


def _show(data: object, table: Table | None, as_json: bool, note: str = "") -> None:
    console = Console(width=None if Console().is_terminal else 160)
    if as_json:
        typer.echo(json.dumps(data, indent=1))
        return
    if table is not None:
        console.print(table)
    if note:
        console.print(note, highlight=False)


def _one_of(**given: object) -> object:
    """The rank rule of the one option that was given."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        _fail(f"give exactly one of {', '.join('--' + n for n in given)}; got {len(chosen)}", USAGE)
    (name, value), = chosen.items()
    return Energy(value) if name == "energy" else value


def _require_layers(made: RankPlan) -> None:
    if not made.low_rank:
        _fail("no layer can be replaced; `shrank plan` shows the reasons", NOTHING)


def _require_free(out: Path, force: bool) -> None:
    if not force and not is_empty_or_absent(out):
        _fail(f"{out} exists and is not empty; --force replaces it", FAILED)


@contextmanager
def _errors(code: int = FAILED):
    """Turn the errors that a user can cause into a line on standard error and an exit code."""
    try:
        yield
    except typer.Exit:
        raise  # a RuntimeError by inheritance
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        _fail(str(error), code)


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)
