"""A plan as a table for terminals."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .plan import LayerPlan, RankPlan

_COLUMNS = {
    "layer": "left",
    "kind": "left",
    "shape": "right",
    "rank": "right",
    "params": "right",
    "after": "right",
    "error": "right",
    "reason": "left",
}
_WIDTH = 160


def table(plan: RankPlan) -> Table:
    """A row for every layer of the plan."""
    made = Table()
    for column, justify in _COLUMNS.items():
        made.add_column(column, justify=justify, overflow="fold", no_wrap=column != "reason")
    for layer in plan:
        made.add_row(*_cells(layer), style=None if layer.changes else "dim")
    return made


def text(plan: RankPlan) -> str:
    """The table as lines of plain text."""
    lines = io.StringIO()
    Console(file=lines, width=_WIDTH).print(table(plan))
    return "\n".join(line.rstrip() for line in lines.getvalue().splitlines())


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    shape = layer.shape
    size = f"{shape.out_features}x{shape.in_features}" if shape else ""
    groups = f"/{shape.groups}" if shape and shape.groups > 1 else ""
    pivots = "p" if shape and shape.pivoted else ""
    rank = "dense" if layer.rank is None else f"{layer.rank}{pivots}"
    stored = f" {layer.storage}" if layer.changes and str(layer.storage) else ""
    error = "" if layer.error is None else f"{layer.error:.4f}"
    return (
        layer.fqn or "(root)",
        layer.kind,
        size + groups,
        rank + stored,
        f"{layer.size:,}",
        f"{layer.params_after:,}",
        error,
        layer.reason,
    )
