"""What happens to one block of units as a whole: how many of them stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..linalg import Shape
from ..model.unit_blocks import OfUnits, UnitBlock
from .checking import are_numbers, check_count

_LISTS = ("producers", "rows", "carriers")


@dataclass(frozen=True)
class NarrowedBlock(OfUnits):
    """What happens to one block of units, and why: hidden units of a feed-forward block, channels between convolutions,
    or heads of attention.

    Args:
        name: What its layers' names have in common, or the consumer's.
        producers: Names of the layers whose outputs are its units.
        consumer: Name of the layer that sees the units.
        units: How many there are.
        width: How many stay; None for all, where each layer has its own decision.
        stacked: Whether the producer has two outputs for each unit, one half after the other.
        error: The expected relative error of the consumer's outputs; None if it was not computed.
        reason: Why this width, or why none.
        able: Whether it may be narrowed at all.
        rows: Of each producer, how many outputs belong to one unit; () for one of each.
        columns: Columns of the consumer's matrix for each unit.
        strided: Whether the columns of a unit are one in every `units`, else they follow each other.
        carriers: Names of what has numbers for each unit in between: batch norms, depthwise convolutions.
    """

    name: str
    producers: tuple[str, ...]
    consumer: str
    units: int
    width: int | None = None
    stacked: bool = False
    error: float | None = None
    reason: str = ""
    able: bool = True
    rows: tuple[int, ...] = ()
    columns: int = 1
    strided: bool = False
    carriers: tuple[str, ...] = ()

    @classmethod
    def of(cls, block: UnitBlock, reason: str = "") -> NarrowedBlock:
        """A block that keeps its units; reason: why it must."""
        reason, common = reason or block.reason, {field: getattr(block, field) for field in OfUnits.__annotations__}
        return cls(block.name, **common, reason=reason, able=not reason)

    def with_width(self, width: int | None, reason: str) -> NarrowedBlock:
        """The block with another width; ValueError where it cannot have it."""
        if width is not None and not self.able:
            raise ValueError(f"{self.name!r} cannot be narrowed: {self.reason}")
        if width is not None and not 1 <= width < self.units:
            raise ValueError(f"{self.name!r}: width must lie in 1..{self.units - 1}, got {width}; None keeps all units")
        return replace(self, width=width, error=None, reason=reason)


def narrowed_shape(block: NarrowedBlock, fqn: str, shape: Shape) -> Shape:
    """The shape of one of its layers, dense, at its width."""
    width, shape = block.units if block.width is None else block.width, replace(shape, pivoted=False)
    if fqn == block.consumer:
        return replace(shape, in_features=width * block.columns)
    if fqn in block.carriers:  # a depthwise convolution
        taps = shape.in_features // shape.out_features
        return Shape(width, width * taps, width, down_groups=width)
    return replace(shape, out_features=width * block.rows_of(fqn))


def narrowed_from_dict(entry: dict) -> NarrowedBlock:
    """Read what `dataclasses.asdict` made of a block."""
    return NarrowedBlock(**{**entry, **{name: tuple(entry.get(name, ())) for name in _LISTS}})


def check_narrowed(blocks: object, layers: Mapping[str, dict]) -> None:
    """Raise ValueError, which names the block and the entry, unless this is a plan's list of blocks.

    layers: what the plan has of each layer, by name.
    """
    if not isinstance(blocks, list):
        raise ValueError(f"'narrowed' must be a list, got {type(blocks).__name__}")
    taken: set[str] = set()
    consumers: set[str] = set()
    for entry in blocks:
        _check_block(entry)
        block = narrowed_from_dict(entry)
        if missing := [name for name in block.layers if name not in layers]:
            raise ValueError(f"block {block.name!r}: the plan lists no layer {', '.join(missing)}")
        if block.consumer in consumers or len(set(block.modules)) < len(block.modules):
            raise ValueError(f"block {block.name!r}: listed twice, or one of its layers is in two of its places")
        consumers.add(block.consumer)
        if block.width is not None:
            if not taken.isdisjoint(block.modules):
                raise ValueError(f"block {block.name!r}: one of its layers is in another narrowed block")
            taken.update(block.modules)
            for name in block.modules:
                if name in layers:  # not a batch norm
                    _check_layer_of(block, name, layers[name])
    if stray := sorted(name for name, entry in layers.items() if entry.get("narrowed", False) and name not in taken):
        raise ValueError(f"narrowed layers of which no block is narrowed: {', '.join(stray)}")


def _check_layer_of(block: NarrowedBlock, name: str, entry: dict) -> None:
    if not entry.get("narrowed", False):
        raise ValueError(f"layer {name!r}: its block {block.name!r} is narrowed, and it is not")
    shape = entry.get("shape")
    found = shape and replace(Shape(**shape), pivoted=False)
    if shape is None or found != narrowed_shape(block, name, found):
        raise ValueError(f"layer {name!r}: its block is {block.width} wide, and it is {shape and found}")


def _check_block(entry: object) -> None:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "consumer")):
        raise ValueError(f"a block of the plan must be an object with strings 'name' and 'consumer', got {entry!r:.80}")
    name, producers, width = f"block {entry['name']!r}", entry.get("producers"), entry.get("width")
    if unknown := entry.keys() - NarrowedBlock.__dataclass_fields__.keys():
        raise ValueError(f"{name}: unknown keys {', '.join(sorted(unknown))}")
    if not _are_names(producers) or not producers:
        raise ValueError(f"{name}: producers must be a list of names, got {producers!r:.80}")
    if not _are_names(carriers := entry.get("carriers", [])):
        raise ValueError(f"{name}: carriers must be a list of names, got {carriers!r:.80}")
    check_count(entry.get("units"), f"{name}: units", least=1)
    if width is not None:
        check_count(width, f"{name}: width", least=1)
        if width >= entry["units"]:
            raise ValueError(f"{name}: width must be below its {entry['units']} units, got {width}")
    if not isinstance(entry.get("stacked", False), bool) or not isinstance(entry.get("reason", ""), str):
        raise ValueError(f"{name}: 'stacked' must be true or false and 'reason' a string")
    if not isinstance(entry.get("strided", False), bool):
        raise ValueError(f"{name}: strided must be true or false, got {entry['strided']!r}")
    if not isinstance(entry.get("able", True), bool):
        raise ValueError(f"{name}: able must be true or false, got {entry['able']!r}")
    if (error := entry.get("error")) is not None and not are_numbers([error]):
        raise ValueError(f"{name}: error must be a number or null, got {error!r}")
    _check_structure(entry, name)


def _check_structure(entry: dict, name: str) -> None:
    """What belongs to one unit."""
    rows, producers = entry.get("rows", []), entry["producers"]
    if not isinstance(rows, list | tuple) or len(rows) not in (0, len(producers)):
        raise ValueError(f"{name}: rows must be a list of {len(producers)} numbers or of none, got {rows!r:.80}")
    for number in rows:
        check_count(number, f"{name}: rows", least=1)
    check_count(entry.get("columns", 1), f"{name}: columns", least=1)
    if entry.get("stacked", False) and (rows or len(producers) > 1):
        raise ValueError(f"{name}: 'stacked' says which outputs of one producer belong to a unit, and 'rows' as well")


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)
