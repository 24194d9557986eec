"""The command line: parse, call, print.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 nothing to replace, 4 damaged file.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..ops import host
from ..ops.availability import why_not
from ..ops.native import build_info
from ..version import __version__
from . import eval_command, gpu_commands, model_commands
from .options import Json, Padding, PerDimension, Source, errors, one_of, show

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Low-rank twins for the linear and convolution layers of PyTorch models.",
)
for name, command in (model_commands.COMMANDS | {"eval": eval_command.eval_command} | gpu_commands.COMMANDS).items():
    app.command(name)(command)


@app.command()
def bench(
    source: Source,
    other: Annotated[str | None, typer.Argument(help="A second model to compare with.")] = None,
    batch: int = 8,
    length: int = 128,
    rounds: int = 7,
    threads: int | None = None,
    device: str = "cpu",
    layers: Annotated[
        Path | None,
        typer.Option(
            help="Time every layer of one model, and write the table that "
            "Budget(keep_latency=) reads to this JSON file."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Throughput and peak memory of one model, or of two in turns, on this machine."""
    if layers:
        _time_layers(source, layers, batch, length, rounds, device, as_json)
        return
    with errors():
        from ..measuring.throughput import Workload, compare

        results = compare([s for s in (source, other) if s], Workload(batch, length, rounds, threads, device))
    table = Table(title=f"batch {batch}, length {length}, {device}, median of {rounds} rounds", title_justify="left")
    for column in ("model", "parameters", "throughput", "relative", "peak memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for x in results:
        table.add_row(
            x.source,
            f"{x.parameters:,}",
            f"{x.throughput:,.1f} {x.unit}",
            f"{x.throughput / results[0].throughput:.2f}x",
            f"{x.peak_memory / 2**20:,.0f} MiB",
        )
    show([asdict(x) for x in results], table, as_json)


def _time_layers(source: str, path: Path, batch: int, length: int, rounds: int, device: str, as_json: bool) -> None:
    with errors():
        from ..measuring.layer_times import measure_layers
        from ..measuring.throughput import Workload, example_inputs
        from ..saving.transformers_folder import load_model

        model = load_model(source).to(device).eval()
        inputs, _, _ = example_inputs(model, Workload(batch, length, device=device))
        found = measure_layers(model, lambda: model(**inputs), rounds)
        found.save(path)
    table = Table(title=f"microseconds per call, batch {batch}, length {length}, {device}", title_justify="left")
    for column in ("layer", "dense", "low-rank, by rank", "with pivots"):
        table.add_column(column, justify="right" if column == "dense" else "left")
    for fqn, entry in found.layers.items():
        times = [entry["plain"], entry["pivoted"]]
        cells = ("  ".join(f"{rank}: {1e6 * seconds:.0f}" for rank, seconds in part.items()) for part in times)
        table.add_row(fqn, f"{1e6 * entry['dense']:.0f}", *cells)
    show({"layers": found.layers, "about": found.about}, table, as_json, f"wrote {path}")


@app.command()
def explain(
    shape: Annotated[str | None, typer.Option(help="M,K,N,R: tokens, in_features, out_features, rank.")] = None,
    conv: Annotated[str | None, typer.Option(help="B,C,INPUT,KERNEL,N,R: 32,64,56x56,3x3,64,16.")] = None,
    stride: PerDimension = "1",
    padding: Padding = "0",
    dilation: PerDimension = "1",
    groups: int = 1,
    up_groups: int = 1,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp64.")] = "bf16",
    gpu: Annotated[str | None, typer.Option(help="Such as H200; without it, the one in this machine.")] = None,
    activation: Annotated[str, typer.Option(help="none, relu, gelu, gelu_tanh or silu.")] = "none",
    bias: bool = True,
    residual: bool = False,
    training: bool = False,
    gate: Annotated[int, typer.Option(help="The rank of the gate of a gated layer, whose R is the value's.")] = 0,
    pivoted: Annotated[bool, typer.Option(help="Whether the factors of a linear layer are pivoted.")] = False,
    sibling: Annotated[
        list[str] | None,
        typer.Option(help="N,R of another layer of the same input, N,Rp of a pivoted one; once for each of them."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Which kernel a low-rank layer takes on a GPU, why, and its predicted time; needs no GPU."""
    with errors():
        from ..measuring.explain import explain, parse_conv, parse_shape, table
        from ..measuring.explain_siblings import explain_siblings, parse_sibling, siblings_table

        one_of(shape=shape, conv=conv)
        if sibling:
            if conv or residual or training or gate or activation != "none":
                raise ValueError("--sibling: of linear layers in inference, with nothing after them")
            facts = explain_siblings(parse_shape(shape), list(map(parse_sibling, sibling)), dtype, gpu, bias, pivoted)
            show(facts, siblings_table(facts), as_json)
            return
        layer = parse_shape(shape) if conv is None else parse_conv(conv, stride, padding, dilation, groups, up_groups)
        facts = explain(layer, dtype, gpu, activation, bias, residual, training, gate, pivoted)
    show(facts, table(facts), as_json)


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
    table.add_row("kernels for a CPU", "; ".join(host.problems()) or "loaded")
    facts = {
        **versions,
        "backend": "native" if not reasons else "torch",
        "built": built,
        "why_not_native": reasons,
        "why_no_kernels_for_a_cpu": list(host.problems()),
    }
    show(facts, table, as_json)
