"""A plan as a table for terminals."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .narrowed import NarrowedBlock
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
        made.add_row(*_cells(layer), style=None if layer.changes or layer.narrowed else "dim")
    for block in plan.narrowed:
        made.add_row(*_block_cells(block, plan), style="dim" if block.width is None else None)
    return made


def text(plan: RankPlan) -> str:
    """The table as lines of plain text."""
    lines = io.StringIO()
    Console(file=lines, width=_WIDTH).print(table(plan))
    return "\n".join(line.rstrip() for line in lines.getvalue().splitlines())


def _block_cells(block: NarrowedBlock, plan: RankPlan) -> tuple[str, ...]:
    layers = [layer for layer in plan if layer.fqn in block.modules]
    return (
        block.name,
        "block",
        f"{block.units} units",
        "all" if block.width is None else str(block.width),
        f"{sum(x.size for x in layers):,}",
        f"{sum(x.params_after for x in layers):,}",
        "" if block.error is None else f"{block.error:.4f}",
        block.reason,
    )


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    shape = layer.shape
    size = f"{shape.out_features}x{shape.in_features}" if shape else ""
    groups = f"/{shape.groups}" if shape and shape.groups > 1 else ""
    pivots = "p" if shape and shape.pivoted else ""
    rank = "dense" if layer.rank is None else f"{layer.rank}{pivots}"
    stored = f" {layer.storage}" if layer.changes and str(layer.storage) else ""
    rank = "narrow" if layer.narrowed and layer.rank is None else rank
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
