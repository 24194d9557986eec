"""Feed-forward blocks: linear layers whose outputs meet, unit by unit, before the one layer that sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..linalg import Kept
from .adapters import target
from .notes import NARROWED, noted

PRODUCER, CONSUMER = "producer", "consumer"


@dataclass(frozen=True)
class FeedForward:
    """One block of a model.

    Args:
        name: What its layers' names have in common, or the consumer's.
        producers: Names of the layers whose outputs are its hidden units: one, or a gate and what it multiplies.
        consumer: Name of the layer that sees the units.
        units: How many there are.
        stacked: Whether the producer has two outputs for each unit, those of the gate and the others one after the
            other.
        reason: Why it must be left as it is; "" if it may be narrowed.
    """

    name: str
    producers: tuple[str, ...]
    consumer: str
    units: int
    stacked: bool = False
    reason: str = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """The producers and the consumer."""
        return (*self.producers, self.consumer)


@dataclass(eq=False)
class Narrowed:
    """What the layers of one narrowed block have in common: their model tells by it what they were."""

    units: int
    width: int
    stacked: bool


def outputs_of(kept: Tensor, units: int, stacked: bool) -> Tensor:
    """The outputs of a producer that these units need."""
    return torch.cat((kept, kept + units)) if stacked else kept


def kept_of(block: FeedForward, kept: Tensor) -> dict[str, Kept]:
    """What is left of its layers, by name, with these units."""
    rows = outputs_of(kept, block.units, block.stacked)
    producer = Kept(rows, outputs=block.units * (2 if block.stacked else 1))
    return {**dict.fromkeys(block.producers, producer), block.consumer: Kept(columns=kept)}


def narrowed_producer(module: nn.Module, kept: Tensor, units: int, stacked: bool) -> dict[str, object]:
    """The attributes of a producer with some of its units."""
    adapter, rows = target(module, vouched=True), outputs_of(kept, units, stacked).to(module.weight.device)
    bias = None if module.bias is None else module.bias.detach()[rows]
    return adapter.resized(adapter.matrices(adapter.shape())[0][rows], bias)


def narrowed_consumer(module: nn.Module, matrix: Tensor, shift: Tensor | None = None) -> dict[str, object]:
    """The attributes of a consumer with another matrix (N, width), and what its bias gains."""
    bias = None if module.bias is None else module.bias.detach()
    if bias is not None and shift is not None:
        bias = bias + shift.to(bias.device)
    return target(module, vouched=True).resized(matrix.to(module.weight.device), bias)


def note_narrowed(block: Narrowed, producers: list[nn.Module], consumer: nn.Module) -> None:
    """Leave word on the layers of a block."""
    for role, modules in ((PRODUCER, producers), (CONSUMER, [consumer])):
        for module in modules:
            vars(module)[NARROWED] = (block, role)


def narrowed_in(model: nn.Module) -> Iterator[tuple[FeedForward, int]]:
    """The narrowed blocks of a model, as they were, and how many units each has."""
    found: dict[int, tuple[Narrowed, dict[str, list[str]]]] = {}
    layer = None
    for fqn, module in model.named_modules():
        if layer is not None and fqn.startswith(f"{layer}."):
            continue  # the weight that it corrects, which was the layer
        if (note := noted(module, NARROWED)) is not None:
            (block, role), layer = note, fqn
            found.setdefault(id(block), (block, {PRODUCER: [], CONSUMER: []}))[1][role].append(fqn)
    for block, layers in found.values():
        if layers[PRODUCER] and len(layers[CONSUMER]) == 1:
            producers, consumer = tuple(layers[PRODUCER]), layers[CONSUMER][0]
            yield (
                FeedForward(block_name((*producers, consumer)), producers, consumer, block.units, block.stacked),
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
