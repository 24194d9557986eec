"""The plan: what happens to every layer and why, decided before anything is changed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..linalg import Shape
from ..util.files import replacing
from .plan_checks import FORMAT, check_plan
from .tables import text


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
        check_plan(data, LayerPlan.__dataclass_fields__, Shape.__dataclass_fields__)
        spent = data.get("spent")
        return cls(tuple(map(_layer_from_dict, data["layers"])), data.get("other_params", 0),
                   tuple(map(tuple, data.get("trade_off", []))), None if spent is None else tuple(spent))

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON; an older file is replaced in one step."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

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

    def __str__(self) -> str:
        return "\n".join([self.summary, *text(self).splitlines()])


def _layer_from_dict(entry: dict) -> LayerPlan:
    shape = entry.get("shape")
    return LayerPlan(**{**entry, "spectrum": tuple(entry.get("spectrum", ())),
                        "shape": None if shape is None else Shape(**shape)})
