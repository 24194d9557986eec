"""The plan: what happens to every layer and why, decided before anything is changed."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..linalg import Shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 2
_READABLE = (1, 2)


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its rank, or None to stay dense, and the reason.

    `size` counts its weights now, `error` is the expected relative error of the weight in Frobenius norm, or with a
    calibration of the outputs (None: not computed), `measured` that of the outputs on other data. `spectrum`: singular
    values over the largest, at evenly spaced ranks. `shape` is None for layers of unsupported types.
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

    @property
    def params_after(self) -> int:
        return self.size if self.rank is None else self.shape.low_rank_params(self.rank)

    @property
    def grows(self) -> bool:
        return self.params_after > self.size


@dataclass(frozen=True)
class RankPlan:
    """Every layer of a model that owns a weight matrix, with its decision; `other_params` counts everything else.

    `trade_off`: where a budget was spent, what else it could have bought: (share of the cost of the layers it decides
    on, share of their squared error), from the least to all of it; `spent`: what this plan is there.
    """

    layers: tuple[LayerPlan, ...]
    other_params: int = 0
    trade_off: tuple[tuple[float, float], ...] = ()
    spent: tuple[float, float] | None = None

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
    def low_rank(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.rank is not None)

    @property
    def outermost(self) -> RankPlan:
        """The plan without layers that are stages of other layers in it."""
        inner = {x.fqn for layer in self.low_rank for x in self.inside(layer.fqn, relative=False)}
        return replace(self, layers=tuple(x for x in self.layers if x.fqn not in inner))

    def inside(self, fqn: str, relative: bool = True) -> RankPlan:
        """The layers that are stages of this low-rank layer, named from it on if `relative`."""
        prefix = f"{fqn}." if fqn else ""
        inner = [x for x in self.low_rank if x.fqn.startswith((f"{prefix}led_unit.", f"{prefix}ced_unit."))]
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
        """The plan with one layer's rank changed; None keeps it dense."""
        chosen = self[fqn]
        if rank is not None and rank < 1:
            raise ValueError(f"{fqn!r}: rank must be at least 1, got {rank}; None keeps it dense")
        if rank is not None and chosen.shape is None:
            raise ValueError(f"{fqn!r} cannot be low-rank: {chosen.reason}")
        changed = replace(chosen, rank=rank, error=None, reason=reason)
        return replace(self, layers=tuple(changed if x is chosen else x for x in self.layers))

    def diff(self, other: RankPlan) -> dict[str, tuple[int | None, int | None]]:
        """fqn -> (rank here, rank there) where the two differ; a layer missing on one side counts as dense there."""
        here, there = ({x.fqn: x.rank for x in plan} for plan in (self, other))
        return {fqn: (here.get(fqn), there.get(fqn)) for fqn in here | there if here.get(fqn) != there.get(fqn)}

    def to_dict(self) -> dict:
        return {"format": FORMAT, "other_params": self.other_params, "layers": [asdict(x) for x in self.layers],
                "trade_off": [list(point) for point in self.trade_off],
                "spent": None if self.spent is None else list(self.spent)}

    @classmethod
    def from_dict(cls, data: object) -> RankPlan:
        """The plan that `to_dict` wrote; ValueError names what is wrong with anything else."""
        if not isinstance(data, dict) or "layers" not in data:
            raise ValueError("not a shrank plan: expected an object with the key 'layers'")
        if data.get("format") not in _READABLE:
            raise ValueError(f"plan of format {data.get('format')!r}; this version of shrank reads format "
                             f"{' and '.join(map(str, _READABLE))}")
        if not isinstance(data["layers"], list):
            raise ValueError(f"'layers' must be a list, got {type(data['layers']).__name__}")
        layers = tuple(_layer_from_dict(entry) for entry in data["layers"])
        names = [layer.fqn for layer in layers]
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"the plan lists layers twice: {', '.join(repeated)}")
        trade_off, spent = data.get("trade_off", []), data.get("spent")
        points = [*trade_off, *([] if spent is None else [spent])] if isinstance(trade_off, list) else [None]
        if not all(isinstance(p, list) and len(p) == 2 and _are_numbers(p) for p in points):
            raise ValueError(f"'trade_off' must be a list of pairs of numbers and 'spent' one, got {points!r:.80}")
        return cls(layers, _count(data.get("other_params", 0), "other_params"), tuple(map(tuple, trade_off)),
                   None if spent is None else tuple(spent))

    def report(self, path: str | os.PathLike) -> None:
        """Write one self-contained HTML page: totals, trade-off, ranks, spectra, errors and every layer's reason."""
        from .report import write_report

        write_report(self, path)

    def plot(self) -> dict[str, Figure]:
        """Matplotlib figures by title, of everything that this plan knows; ImportError without matplotlib."""
        from .report import figures

        return figures(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> RankPlan:
        """The plan in a JSON file; ValueError names the file and what is wrong with it."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def summary(self) -> str:
        """One line: layers and parameters, before and after."""
        before, after = self.params_before, self.params_after
        touched, kept = sum(x.size for x in self.low_rank), sum(x.params_after for x in self.low_rank)
        parts = [f"{len(self.low_rank)} of {len(self)} layers low-rank",
                 f"their weights {touched:,} -> {kept:,}" + (f" ({kept / touched:.1%})" if touched else ""),
                 f"whole model {before:,} -> {after:,}" + (f" ({after / before:.1%})" if before else "")]
        if grown := [x.fqn for x in self.low_rank if x.grows]:
            parts.append(f"{len(grown)} grow")
        return "; ".join(parts)

    def why_dense(self, most: int = 5) -> str:
        """The most frequent reasons for which layers stay dense, with numbers of layers."""
        counted = Counter(layer.reason for layer in self.layers if layer.rank is None).most_common()
        told = [f"{reason} ({number} layer{'s' * (number > 1)})" for reason, number in counted[:most]]
        return "; ".join(told + ["..."] * (len(counted) > most)) or "no layer owns a weight matrix"

    def table(self) -> Table:
        """The layers as a rich table."""
        table = Table()
        for column, justify in (("layer", "left"), ("kind", "left"), ("shape", "right"), ("rank", "right"),
                                ("params", "right"), ("after", "right"), ("error", "right"), ("reason", "left")):
            table.add_column(column, justify=justify, overflow="fold", no_wrap=column != "reason")
        for x in self.layers:
            shape = f"{x.shape.out_features}x{x.shape.in_features}" if x.shape else ""
            pivots = "p" if x.shape and x.shape.pivoted else ""
            groups = f"/{x.shape.groups}" if x.shape and x.shape.groups > 1 else ""
            table.add_row(x.fqn or "(root)", x.kind, shape + groups, "dense" if x.rank is None else f"{x.rank}{pivots}",
                          f"{x.size:,}", f"{x.params_after:,}", "" if x.error is None else f"{x.error:.4f}",
                          x.reason, style="dim" if x.rank is None else None)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160).print(self.table())
        return "\n".join([self.summary, *(line.rstrip() for line in text.getvalue().splitlines())])


def _layer_from_dict(entry: object) -> LayerPlan:
    if not isinstance(entry, dict) or not isinstance(entry.get("fqn"), str):
        raise ValueError(f"a layer of the plan must be an object with a string 'fqn', got {entry!r:.80}")
    name = f"layer {entry['fqn']!r}"
    if unknown := entry.keys() - LayerPlan.__dataclass_fields__.keys():
        raise ValueError(f"{name}: unknown keys {', '.join(sorted(unknown))}")
    rank, shape, spectrum = entry.get("rank"), entry.get("shape"), entry.get("spectrum", [])
    if rank is not None and _count(rank, f"{name}: rank") < 1:
        raise ValueError(f"{name}: rank must be at least 1, got {rank}")
    if rank is not None and shape is None:
        raise ValueError(f"{name}: has a rank but no shape")
    for key in ("error", "measured"):
        if (value := entry.get(key)) is not None and not _are_numbers([value]):
            raise ValueError(f"{name}: {key} must be a number or null, got {value!r}")
    if not isinstance(spectrum, list | tuple) or not _are_numbers(spectrum):
        raise ValueError(f"{name}: spectrum must be a list of numbers, got {spectrum!r:.80}")
    if not isinstance(entry.get("kind"), str) or not isinstance(entry.get("reason", ""), str):
        raise ValueError(f"{name}: 'kind' and 'reason' must be strings")
    return LayerPlan(**{**entry, "size": _count(entry.get("size"), f"{name}: size"), "spectrum": tuple(spectrum),
                        "shape": None if shape is None else _shape_from_dict(shape, name)})


def _shape_from_dict(shape: object, name: str) -> Shape:
    if not isinstance(shape, dict) or {"pivoted": False, **shape}.keys() != Shape.__dataclass_fields__.keys():
        raise ValueError(f"{name}: shape must have exactly the keys {', '.join(Shape.__dataclass_fields__)}")
    if not isinstance(pivoted := shape.get("pivoted", False), bool):
        raise ValueError(f"{name}: pivoted must be true or false, got {pivoted!r}")
    sizes = {key: value for key, value in shape.items() if key != "pivoted"}
    if wrong := [k for k, v in sizes.items() if _count(v, f"{name}: {k}") < 1]:
        raise ValueError(f"{name}: {', '.join(wrong)} must be at least 1")
    return Shape(**shape)


def _are_numbers(values: Iterable[object]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _count(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return value
