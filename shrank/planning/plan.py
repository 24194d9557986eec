"""The plan: what happens to every layer and why, decided before anything is changed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..layers.two_stage import UNITS
from ..linalg import AS_IT_IS, Grid, Shape, Storage
from ..util.files import write_text
from .narrowed import NarrowedBlock, narrowed_from_dict, narrowed_shape
from .plan_checks import FORMAT, check_plan
from .tables import text


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer, and why.

    Args:
        fqn: Its dotted name.
        kind: Its type, such as "Linear".
        size: Its weights now.
        shape: The layer as a matrix; None for layers of unsupported types.
        rank: None to stay dense.
        error: The expected relative error of the weight in Frobenius norm, or with a calibration that of the outputs;
            None if it was not computed.
        reason: Why this rank, or why dense.
        measured: The relative error of the outputs on other data; None if it was not measured.
        spectrum: Singular values over the largest, at evenly spaced ranks from the first to the last.
        storage: How its weights are stored: in their dtype, or in fewer bits.
        narrowed: Whether its block is narrowed; `shape` is then that with fewer units.
    """

    fqn: str
    kind: str
    size: int
    shape: Shape | None = None
    rank: int | None = None
    error: float | None = None
    reason: str = ""
    measured: float | None = None
    spectrum: tuple[float, ...] = ()
    storage: Storage = AS_IT_IS
    narrowed: bool = False

    @property
    def params_after(self) -> int:
        """Its weights at the planned rank and width."""
        if self.rank is None:
            return self.shape.dense_params if self.narrowed else self.size
        return self.shape.stored_params(self.rank, self.storage)

    @property
    def changes(self) -> bool:
        """Whether anything is done to it: it gets a rank, or fewer bits."""
        return self.rank is not None or self.storage.grid is not None

    def bytes(self, itemsize: int = 2) -> int:
        """Those of its weights on disk as planned, with `itemsize` for a number that has no grid."""
        if not self.changes:
            return self.params_after * itemsize
        return self.shape.bytes(self.rank, self.storage, itemsize)

    @property
    def grows(self) -> bool:
        """Whether it stores more as planned than now; of weights on a grid bytes count, against those of 16 bits."""
        return self.params_after > self.size if self.storage.grid is None else self.bytes() > 2 * self.size


@dataclass(frozen=True)
class RankPlan:
    """Every layer of a model that owns a weight matrix, with its decision.

    A value that can be printed, edited, compared and saved.

    Args:
        layers: The decisions, in the model's order.
        other_params: Parameters of the model outside these layers' weights.
        trade_off: Where a budget was spent, what else it could have bought: (share of the cost of the layers it decides
            on, share of their squared error), from the least to all of it.
        spent: What this plan is there.
        narrowed: The blocks of units that were looked at for narrowing, with what happens to each as a whole.
    """

    layers: tuple[LayerPlan, ...]
    other_params: int = 0
    trade_off: tuple[tuple[float, float], ...] = ()
    spent: tuple[float, float] | None = None
    narrowed: tuple[NarrowedBlock, ...] = ()

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, fqn: str) -> LayerPlan:
        for layer in self.layers:
            if layer.fqn == fqn:
                return layer
        raise KeyError(f"the plan has no layer {fqn!r}")

    @property
    def changed(self) -> tuple[LayerPlan, ...]:
        """The layers to which something is done."""
        return tuple(layer for layer in self.layers if layer.changes)

    @property
    def low_rank(self) -> tuple[LayerPlan, ...]:
        """The layers that get a rank."""
        return tuple(layer for layer in self.layers if layer.rank is not None)

    @property
    def narrower(self) -> tuple[NarrowedBlock, ...]:
        """The blocks that lose units."""
        return tuple(block for block in self.narrowed if block.width is not None)

    @property
    def does_nothing(self) -> bool:
        """Whether it leaves the model as it is."""
        return not (self.changed or self.narrower)

    @property
    def outermost(self) -> RankPlan:
        """The plan without layers that are stages of other layers in it."""
        inner = {x.fqn for layer in self.low_rank for x in self.inside(layer.fqn, relative=False)}
        return replace(self, layers=tuple(x for x in self.layers if x.fqn not in inner))

    def inside(self, fqn: str, relative: bool = True) -> RankPlan:
        """The layers that are stages of this low-rank layer, named from it on if `relative`."""
        prefix = f"{fqn}." if fqn else ""
        inner = [x for x in self.low_rank if x.fqn.startswith(tuple(f"{prefix}{unit}." for unit in UNITS))]
        return RankPlan(tuple(replace(x, fqn=x.fqn.removeprefix(prefix)) if relative else x for x in inner))

    @property
    def params_before(self) -> int:
        """All parameters of the model, planned or not."""
        return self.other_params + sum(layer.size for layer in self.outermost)

    @property
    def params_after(self) -> int:
        outer = self.outermost
        saved_inside = sum(x.size - x.params_after for x in self.layers) - sum(x.size - x.params_after for x in outer)
        return self.other_params + sum(layer.params_after for layer in outer) - saved_inside

    def with_rank(self, fqn: str, rank: int | None, reason: str = "set by hand") -> RankPlan:
        """Change one layer's rank.

        Args:
            fqn: The layer's dotted name.
            rank: At least 1; None keeps it dense.
            reason: What the plan says about it.

        Returns:
            A new plan.

        Raises:
            KeyError: There is no such layer.
            ValueError: The layer cannot be low-rank, or the rank is below 1.
        """
        chosen = self[fqn]
        if rank is not None and rank < 1:
            raise ValueError(f"{fqn!r}: rank must be at least 1, got {rank}; None keeps it dense")
        if rank is not None and chosen.shape is None:
            raise ValueError(f"{fqn!r} cannot be low-rank: {chosen.reason}")
        storage = Storage(chosen.storage.grid) if rank is None else chosen.storage  # there is nothing left to correct
        changed = replace(chosen, rank=rank, error=None, reason=reason, storage=storage)
        return replace(self, layers=tuple(changed if x is chosen else x for x in self.layers))

    def with_width(self, name: str, width: int | None, reason: str = "set by hand") -> RankPlan:
        """Change the number of units of one block (hidden units, channels, heads), whose layers are then dense.

        Args:
            name: The name of the block, or of its consumer.
            width: At least 1 and below its units; None keeps them all.
            reason: What the plan says about it.

        Returns:
            A new plan.

        Raises:
            KeyError: There is no such block.
            ValueError: The block cannot be narrowed, or the width is out of its range.
        """
        block = next((x for x in self.narrowed if name in (x.name, x.consumer)), None)
        if block is None:
            raise KeyError(f"the plan has no block of units {name!r}")
        changed = block.with_width(width, reason)
        layers = tuple(narrowed_layer(x, changed, reason) if x.fqn in block.modules else x for x in self.layers)
        return replace(self, layers=layers, narrowed=tuple(changed if x is block else x for x in self.narrowed))

    def diff(self, other: RankPlan) -> dict[str, tuple[int | None, int | None]]:
        """Compare two plans.

        Args:
            other: Another plan.

        Returns:
            fqn -> (rank here, rank there) where the two differ; a layer missing on one side counts as dense there. The
            same with the widths of blocks, as "NAME: width".
        """
        here, there = ({x.fqn: x.rank for x in plan} | plan._widths() for plan in (self, other))
        return {fqn: (here.get(fqn), there.get(fqn)) for fqn in here | there if here.get(fqn) != there.get(fqn)}

    def _widths(self) -> dict[str, int | None]:
        return {f"{block.name}: width": block.width for block in self.narrowed}

    def to_dict(self) -> dict:
        """The plan as plain data, for JSON."""
        return {
            "format": FORMAT,
            "other_params": self.other_params,
            "layers": [asdict(x) for x in self.layers],
            "trade_off": [list(point) for point in self.trade_off],
            "spent": None if self.spent is None else list(self.spent),
            "narrowed": [asdict(x) for x in self.narrowed],
        }

    @classmethod
    def from_dict(cls, data: object) -> RankPlan:
        """Read what `to_dict` wrote.

        Args:
            data: Plain data.

        Returns:
            The plan.

        Raises:
            ValueError: It is no plan; the text names the layer and what is wrong.
        """
        check_plan(data, LayerPlan.__dataclass_fields__, Shape.__dataclass_fields__)
        spent = data.get("spent")
        return cls(
            tuple(map(_layer_from_dict, data["layers"])),
            data.get("other_params", 0),
            tuple(map(tuple, data.get("trade_off", []))),
            None if spent is None else tuple(spent),
            tuple(map(narrowed_from_dict, data.get("narrowed", []))),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON.

        Args:
            path: The file; an older one is replaced in one step.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> RankPlan:
        """Read the plan in a JSON file.

        Args:
            path: A file that `save` wrote.

        Returns:
            The plan.

        Raises:
            ValueError: The file holds no plan; the text names it and what is wrong.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def summary(self) -> str:
        """One line: layers and parameters, before and after."""
        before, after = self.params_before, self.params_after
        touched, kept = sum(x.size for x in self.low_rank), sum(x.params_after for x in self.low_rank)
        parts = [
            f"{len(self.low_rank)} of {len(self)} layers low-rank",
            f"their weights {touched:,} -> {kept:,}" + (f" ({kept / touched:.1%})" if touched else ""),
            f"whole model {before:,} -> {after:,}" + (f" ({after / before:.1%})" if before else ""),
        ]
        if self.narrower:
            parts.insert(1, f"{len(self.narrower)} of {len(self.narrowed)} blocks narrowed")
        if on_grid := [x for x in self.layers if x.storage.grid is not None]:
            before, after = (sum(b) for b in zip(*((x.size * 2, x.bytes()) for x in on_grid), strict=True))
            parts.append(f"{len(on_grid)} in few bits, bytes {before:,} in 16 bits -> {after:,}")
        if grown := [x.fqn for x in self.low_rank if x.grows]:
            parts.append(f"{len(grown)} grow")
        return "; ".join(parts)

    def why_dense(self, most: int = 5) -> str:
        """The most frequent reasons for which layers stay dense, with numbers of layers."""
        counted = Counter(layer.reason for layer in self.layers if layer.rank is None).most_common()
        told = [f"{reason} ({number} layer{'s' * (number > 1)})" for reason, number in counted[:most]]
        return "; ".join(told + ["..."] * (len(counted) > most)) or "no layer owns a weight matrix"

    def __str__(self) -> str:
        return "\n".join([self.summary, *text(self).splitlines()])


def narrowed_layer(layer: LayerPlan, block: NarrowedBlock, reason: str) -> LayerPlan:
    """One layer of a block, dense, as its width has it."""
    return replace(
        layer,
        rank=None,
        shape=narrowed_shape(block, layer.fqn, layer.shape),
        error=None,
        reason=reason if block.width is None else f"narrowed with {block.name}: {reason}",
        storage=Storage(layer.storage.grid),
        narrowed=block.width is not None,
    )


def _layer_from_dict(entry: dict) -> LayerPlan:
    shape, storage = entry.get("shape"), entry.get("storage")
    made = {
        "spectrum": tuple(entry.get("spectrum", ())),
        "shape": None if shape is None else Shape(**shape),
        "storage": AS_IT_IS if storage is None else storage_from_dict(storage),
    }
    return LayerPlan(**{**entry, **made})


def storage_from_dict(entry: dict) -> Storage:
    """The value that `dataclasses.asdict` made this of."""
    grids = {key: None if entry.get(key) is None else Grid(**entry[key]) for key in ("grid", "factor_grid")}
    return Storage(corrected=entry.get("corrected", False), activations=entry.get("activations"), **grids)
