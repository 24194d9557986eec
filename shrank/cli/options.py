"""What the commands share: their options, how they answer and how they fail."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from torch import nn

from ..model.subclasses import subclasses_in, treat_as_base
from ..planning.budget import Budget
from ..planning.plan import RankPlan
from ..planning.rank import Energy
from ..util.files import is_empty_or_absent
from ..util.processes import Processes
from . import launched

FAILED, USAGE, NOTHING, DAMAGED = 1, 2, 3, 4

Source = Annotated[str, typer.Argument(help="Folder or hub name of a transformers model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist or be empty, unless --force.")]
Force = Annotated[bool, typer.Option(help="Replace the output folder.")]
Rank = Annotated[int | None, typer.Option(help="The same rank for every layer.")]
Keep = Annotated[float | None, typer.Option(help="Share of each replaced layer's parameters to keep, in (0, 1).")]
KeepBytes = Annotated[
    float | None,
    typer.Option(
        help="Share of the bytes of the replaced layers' weights to keep, in (0, 1): by low rank, by few bits, or both."
    ),
]
EnergyOption = Annotated[float | None, typer.Option(help="Share of the squared singular values to keep, in (0, 1].")]
Include = Annotated[list[str] | None, typer.Option(help="Only layers whose name matches this glob; repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Not layers whose name matches this glob; repeatable.")]
RoundTo = Annotated[int | None, typer.Option(help="Ranks become multiples of this.")]
AllowSlower = Annotated[bool, typer.Option(help="Also convolutions that a CPU computes no faster than before.")]
Pivot = Annotated[
    bool | None,
    typer.Option(
        "--pivot/--no-pivot",
        help="Store factors in fewer numbers, or never; without either, where a budget gains by it.",
    ),
]
Bits = Annotated[int | None, typer.Option(help="3, 4 or 8, for the weights of all linear layers that may change.")]
GroupSize = Annotated[int | None, typer.Option(help="Weights of a row with one scale; without it, each row has one.")]
Narrow = Annotated[
    str | None,
    typer.Option(
        metavar="each|uniform",
        help="Let --keep take units, channels or heads out of blocks, of each its own number or of all the same.",
    ),
]
TreatAsBase = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CLASS",
        help=(
            "Treat this subclass of a layer as the layer itself: a dotted name such as whisper.model.Linear, or all; "
            "repeatable."
        ),
    ),
]
PerDimension = Annotated[str, typer.Option(help="Of a convolution: one number, or one for each dimension: 2x1.")]
Padding = Annotated[str, typer.Option(help="Of a convolution: likewise, or before:after: 3:0x1:1.")]


def show(data: object, table: RenderableType | None, as_json: bool, note: str = "") -> None:
    if not launched.is_first():
        return
    console = Console(width=None if Console().is_terminal else 160)
    if as_json:
        typer.echo(json.dumps(data, indent=1))
        return
    if table is not None:
        console.print(table)
    if note:
        console.print(note, highlight=False)


_RULES = {"energy": Energy, "keep_bytes": lambda share: Budget(keep_bytes=share)}


def one_of(bits: int | None = None, **given: object) -> object:
    """The rank rule of the one option that was given; with bits there may be none, and all layers stay dense."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if bits and not chosen:
        return _dense
    if len(chosen) != 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        fail(f"give exactly one of {names}; got {len(chosen)}", USAGE)
    ((name, value),) = chosen.items()
    return _RULES[name](value) if name in _RULES else value


def _dense(fqn: str, module: nn.Module) -> None:
    """A rule that gives no layer a rank."""


def plan_options(pivot: bool | None, narrow: str | None = None, **given: object) -> dict[str, object]:
    """The fields of PlanOptions that options were given for."""
    options = {name: value for name, value in given.items() if value}
    if narrow not in (None, "each", "uniform"):
        fail(f"--narrow must be each or uniform, got {narrow}", USAGE)
    if narrow:
        options["narrow"] = "uniform" if narrow == "uniform" else True
    if pivot is not None:
        options["pivot"] = pivot
    return options


def trust(model: nn.Module, names: list[str] | None) -> None:
    """Treat these subclasses of supported layers, or all that the model has, as their base."""
    if names:
        treat_as_base(*(subclasses_in(model) if names == ["all"] else map(module_class, names)))


def module_class(name: str) -> type[nn.Module]:
    """The class of modules of this dotted name; ValueError if there is none."""
    path, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(path), attribute, None) if path and attribute else None
    except ImportError as error:
        raise ValueError(f"--treat-as-base {name}: {path} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"--treat-as-base {name}: is no class of modules; give its dotted name, such as "
            "whisper.model.Linear, or only: all"
        )
    return found


def require_layers(made: RankPlan) -> None:
    """End with the most frequent reasons where nothing is to be done."""
    if not made.does_nothing:
        return
    fail(f"no layer can be replaced: {made.why_dense()}", NOTHING)


def require_compressed(made: RankPlan, source: str) -> None:
    if not made.changed:
        fail(f"{source} has no low-rank layer and no weights of few bits", NOTHING)


def require_free(out: Path, force: bool) -> None:
    if not force and not is_empty_or_absent(out):
        fail(f"{out} exists and is not empty; --force replaces it", FAILED)


@contextmanager
def errors(code: int = FAILED, across: bool = False) -> Iterator[Processes]:
    """Turn the errors that a user can cause into a line on standard error and an exit code, and warnings into lines.

    across: the processes that torchrun started do together what is inside; without it, they are an error.
    """
    if not across and launched.count() > 1:
        fail(f"this command runs in one process, and torchrun started {launched.count()}: leave torchrun out", USAGE)
    with launched.group(across):
        try:
            with warnings.catch_warnings(), launched.together(across) as here:
                warnings.showwarning = _show_warning
                yield here
        except typer.Exit:
            raise  # a RuntimeError by inheritance
        except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            fail(str(error), code)


def _show_warning(message: Warning | str, *_: object) -> None:
    if launched.is_first():
        _tell(f"[bold yellow]warning:[/] {escape(str(message))}")


def fail(message: str, code: int) -> None:
    if launched.is_first():  # what another process failed of, this one knows
        _tell(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(code)


def _tell(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
