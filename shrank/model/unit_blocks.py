"""Blocks that can do with fewer units: layers whose outputs meet, unit by unit, before the one layer that sees them.

A unit is a hidden unit of a feed-forward block, a channel between two convolutions, or a head of keys and values with
the heads of queries that look at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..linalg import Kept
from .adapters import target
from .notes import NARROWED, noted

PRODUCER, CARRIER, CONSUMER = "producer", "carrier", "consumer"


class OfUnits:
    """Which rows and columns of a block's layers belong to which unit: what a block of a model and its plan share.

    Those of one unit follow each other, in `rows` and `columns`; or there is one in every `units`, where the producer
    is `stacked`, or the consumer `strided`.
    """

    producers: tuple[str, ...]
    consumer: str
    units: int
    stacked: bool
    rows: tuple[int, ...]
    columns: int
    strided: bool
    carriers: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The producers and the consumer."""
        return (*self.producers, self.consumer)

    @property
    def modules(self) -> tuple[str, ...]:
        """All that changes with the number of units: the producers, the carriers and the consumer."""
        return (*self.producers, *self.carriers, self.consumer)

    def rows_of(self, producer: str) -> int:
        """How many outputs of a producer belong to one unit."""
        if self.stacked:
            return 2
        return self.rows[self.producers.index(producer)] if self.rows else 1

    def outputs_of(self, producer: str, kept: Tensor) -> Tensor:
        """The outputs of a producer that these units need, ascending."""
        return places(kept, self.units, self.rows_of(producer), self.stacked).flatten().sort().values

    def columns_of(self, kept: Tensor, columns: int) -> Tensor:
        """The columns of these units (units, columns of each), where all units have so many: those of the consumer's
        matrix, or of its inputs, which are fewer where a kernel has several taps."""
        return places(kept, self.units, columns // self.units, self.strided)

    def columns_left(self, kept: Tensor, columns: int) -> Tensor:
        """As `columns_of`, all of them, ascending."""
        return self.columns_of(kept, columns).flatten().sort().values


@dataclass(frozen=True)
class UnitBlock(OfUnits):
    """One block of a model.

    Args:
        name: What its layers' names have in common, or the consumer's.
        producers: Names of the layers whose outputs are its units: one, a gate and what it multiplies, or those of
            queries, keys and values.
        consumer: Name of the layer that sees the units.
        units: How many there are.
        stacked: Whether the producer has two outputs for each unit, those of the gate and the others one after the
            other.
        reason: Why it must be left as it is; "" if it may be narrowed.
        rows: Of each producer, how many outputs belong to one unit; () for one of each.
        columns: Columns of the consumer's matrix for each unit.
        strided: Whether the columns of a unit are one in every `units`, else they follow each other.
        carriers: Names of what has numbers for each unit in between: batch norms, depthwise convolutions.
    """

    name: str
    producers: tuple[str, ...]
    consumer: str
    units: int
    stacked: bool = False
    reason: str = ""
    rows: tuple[int, ...] = ()
    columns: int = 1
    strided: bool = False
    carriers: tuple[str, ...] = ()


@dataclass(eq=False)
class Narrowed:
    """What the layers of one narrowed block have in common: their model tells by it what they were."""

    units: int
    width: int
    stacked: bool
    columns: int = 1
    strided: bool = False


def places(units: Tensor, of: int, each: int, strided: bool) -> Tensor:
    """Where these units, of so many, are (units, each): next to each other, or one in every `of`."""
    offsets = torch.arange(each, device=units.device)
    return units[:, None] + of * offsets if strided else units[:, None] * each + offsets


def kept_of(block: OfUnits, kept: Tensor) -> dict[str, Kept]:
    """What is left of its layers, by name, with these units."""
    producers = {
        fqn: Kept(block.outputs_of(fqn, kept), outputs=block.units * block.rows_of(fqn)) for fqn in block.producers
    }
    return {**producers, block.consumer: Kept(columns=block.columns_left(kept, block.units * block.columns))}


def narrowed_producer(module: nn.Module, rows: Tensor) -> dict[str, object]:
    """The attributes of a producer with some of its rows."""
    adapter, rows = target(module, vouched=True), rows.to(module.weight.device)
    bias = None if module.bias is None else module.bias.detach()[rows]
    return adapter.resized(adapter.matrices(adapter.shape())[0][rows], bias)


def narrowed_consumer(module: nn.Module, matrix: Tensor, shift: Tensor | None = None) -> dict[str, object]:
    """The attributes of a consumer with another matrix (N, columns), and what its bias gains."""
    bias = None if module.bias is None else module.bias.detach()
    if bias is not None and shift is not None:
        bias = bias + shift.to(bias.device)
    return target(module, vouched=True).resized(matrix.to(module.weight.device), bias)


def note_narrowed(block: OfUnits, width: int, modules: dict[str, nn.Module]) -> None:
    """Leave word on the modules of a block."""
    common = Narrowed(block.units, width, block.stacked, block.columns, block.strided)
    for name in block.modules:
        role = PRODUCER if name in block.producers else CONSUMER if name == block.consumer else CARRIER
        rows = block.rows_of(name) if role == PRODUCER else 1
        vars(modules[name])[NARROWED] = (common, role, rows)


def narrowed_in(model: nn.Module) -> Iterator[tuple[UnitBlock, int]]:
    """The narrowed blocks of a model, as they were, and how many units each has."""
    found: dict[int, tuple[Narrowed, dict[str, list[tuple[str, int]]]]] = {}
    layer = None
    for fqn, module in model.named_modules():
        if layer is not None and fqn.startswith(f"{layer}."):
            continue  # the weight that it corrects, which was the layer
        if (note := noted(module, NARROWED)) is not None:
            (block, role, rows), layer = note, fqn
            roles = found.setdefault(id(block), (block, {PRODUCER: [], CARRIER: [], CONSUMER: []}))[1]
            roles[role].append((fqn, rows))
    for block, roles in found.values():
        if roles[PRODUCER] and len(roles[CONSUMER]) == 1:
            producers, rows = zip(*roles[PRODUCER], strict=True)
            consumer, carriers = roles[CONSUMER][0][0], tuple(fqn for fqn, _ in roles[CARRIER])
            yield (
                UnitBlock(
                    block_name((*producers, consumer)),
                    producers,
                    consumer,
                    block.units,
                    block.stacked,
                    rows=() if block.stacked or set(rows) == {1} else rows,
                    columns=block.columns,
                    strided=block.strided,
                    carriers=carriers,
                ),
                block.width,
            )


def block_name(layers: tuple[str, ...]) -> str:
    """What the names of these layers have in common; the last one's if that is nothing."""
    parts, common = [name.split(".") for name in layers], []
    for part in zip(*parts, strict=False):
        if len(set(part)) > 1:
            break
        common.append(part[0])
    return ".".join(common) or layers[-1]
