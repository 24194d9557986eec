"""The commands that are about the card at hand: check its kernels, find the fastest ones for a model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .options import FAILED, Json, Source, errors, show

Device = Annotated[str, typer.Option(help="Such as cuda:1.")]


def check(device: Device = "cuda:0", as_json: Json = False) -> None:
    """Run every kernel family on a GPU and compare it with PyTorch; exit code 1 if one is wrong."""
    with errors():
        from ..ops import self_check

        results = self_check.check_again(device)
    table = Table(title=f"kernels on {device}, beside PyTorch in fp64", title_justify="left")
    for column in ("op", "family", "dtype", "result"):
        table.add_column(column)
    for name, wrong in results.items():
        op, *family, dtype = name.split()
        table.add_row(op, " ".join(family), dtype, wrong or "right")
    wrong = sum(map(bool, results.values()))
    show(results, table, as_json, f"{len(results) - wrong} of {len(results)} right")
    if wrong:
        raise typer.Exit(FAILED)


def tune(
    source: Source,
    batch: int = 8,
    length: int = 128,
    device: Device = "cuda:0",
    graphs: Annotated[bool, typer.Option(help="Also as it runs in a CUDA graph.")] = False,
    as_json: Json = False,
) -> None:
    """Run a compressed model on a GPU and measure the fastest kernel for each of its layers; kept for next time."""
    with errors():
        from ..measuring.throughput import Workload, example_inputs
        from ..measuring.tuning import run_in_graph, tune
        from ..saving.transformers_folder import load_model

        model = load_model(source)
        with tune(device) as done:
            model = model.to(device).eval()
            inputs, _, _ = example_inputs(model, Workload(batch, length, device=device))
            model(**inputs)
            if graphs:
                run_in_graph(lambda: model(**inputs))
    table = Table(title=f"measured on {device}, batch {batch}, length {length}", title_justify="left")
    for column in ("problem", "kernel", "microseconds", "PyTorch's own"):
        table.add_column(column, justify="right" if column[0] in "mP" else "left")
    for each in done:
        kernel = " ".join([each.kernel, "x".join(map(str, each.grid))]).strip()
        table.add_row(each.key, kernel, f"{each.microseconds:.1f}", f"{each.library_us:.1f}")
    show([vars(each) for each in done], table, as_json, f"{len(done)} problems measured")


COMMANDS = {"check": check, "tune": tune}
