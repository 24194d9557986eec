"""The tensors that a plan says a file has, and what is wrong with those it has instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from ..layers.quantized import SCALES, VALUES, packed_shapes, why_not_packed
from ..layers.seal import DENSE_NAME
from ..layers.two_stage import BASE, UNITS
from ..linalg import Grid
from ..planning.plan import LayerPlan, RankPlan


def missing_factors(plan: RankPlan, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of weights of planned layers that a checkpoint lacks or holds in another shape than the plan says."""
    return [name for layer in plan.changed for name in _missing(layer, shapes)]


def packed_problems(plan: RankPlan, state: Mapping[str, Tensor]) -> list[str]:
    """A line for every weight on a grid in this state that is none; those that are not there are not told."""
    return [
        f"{name}: {reason}"
        for layer in plan.changed
        for name, _, columns, grid in _on_grid(layer, state)
        if (name + VALUES in state and name + SCALES in state)
        and (reason := why_not_packed(state[name + VALUES], state[name + SCALES], columns, grid))
    ]


def _missing(layer: LayerPlan, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, rows, columns, grid in _on_grid(layer, shapes):
        for part, shape in zip((VALUES, SCALES), packed_shapes(rows, columns, grid), strict=True):
            if shapes.get(name + part) != shape:
                yield name + part
    if layer.rank is None or layer.storage.of_factors is not None:
        return
    unit = _unit(layer.fqn, shapes)
    down, up = (shapes.get(f"{unit}.{stage}.{DENSE_NAME}", ()) for stage in (0, 1))
    if down[:1] != (layer.rank,):
        yield f"{unit}.0.{DENSE_NAME}"
    outputs = layer.shape.out_features - (layer.rank if layer.shape.pivoted else 0)
    if up[:2] != (outputs, layer.rank // layer.shape.up_groups):
        yield f"{unit}.1.{DENSE_NAME}"
    if layer.shape.pivoted and shapes.get(f"{unit}.2.order") != (layer.shape.out_features,):
        yield f"{unit}.2.order"


def _on_grid(layer: LayerPlan, names: Collection[str]) -> Iterator[tuple[str, int, int, Grid]]:
    """(name, rows, columns, grid) of every weight of a layer that is on a grid."""
    shape, storage, prefix = layer.shape, layer.storage, f"{layer.fqn}." if layer.fqn else ""
    if storage.grid is not None and (layer.rank is None or storage.corrected):
        base = f"{prefix}{BASE}." if storage.corrected else prefix
        yield f"{base}{DENSE_NAME}", shape.out_features, shape.in_features, storage.grid
    if layer.rank is None or (grid := storage.of_factors) is None:
        return
    unit = _unit(layer.fqn, names)
    yield f"{unit}.0.{DENSE_NAME}", layer.rank, shape.in_features, grid
    yield f"{unit}.1.{DENSE_NAME}", shape.out_features, layer.rank, grid


def _unit(fqn: str, names: Collection[str]) -> str:
    """The name of the stages of a layer."""
    prefix = f"{fqn}." if fqn else ""
    return prefix + next((u for u in UNITS if any(name.startswith(f"{prefix}{u}.") for name in names)), UNITS[0])
