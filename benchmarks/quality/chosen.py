"""What a user may choose beside the size, and what models are worth that are compressed so."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import nn

import shrank
from benchmarks.provenance import provenance
from benchmarks.quality import baselines
from benchmarks.quality.tasks import Task
from shrank import Batch

OURS = "shrank"
_MEMORY = 4 << 30  # bytes of moments: the data runs through each of these models once
DEFAULT = f"+ bias = {OURS}"
_BLOCK = re.compile(r"the error of (\S+ on held-out data \S+ -> \S+)")


@dataclass(frozen=True)
class Chosen:
    """Options of `auto_fact` and `Calibrate`, given as `probe steps=100 share=0.5`.

    Args:
        loss: By which gradients errors are weighted; "" for the task's own.
        batches: How many of those of healing are calibrated on; 0 for those of calibration.
    """

    loss: str = ""
    batches: int = 0
    probe: bool = False
    narrow: bool = False
    anchored: bool = False
    share: float = 0.25
    steps: int = 0

    @classmethod
    def of(cls, words: str) -> Chosen:
        """ValueError for what is no option."""
        types = {field.name: type(field.default) for field in fields(cls)}
        given = {name: value if equals else "True" for name, equals, value in (w.partition("=") for w in words.split())}
        if unknown := [name for name in given if name not in types]:
            raise ValueError(f"options are {', '.join(types)}, got {', '.join(unknown)}")
        for name, value in given.items():
            if types[name] is bool and value not in ("True", "False"):
                raise ValueError(f"{name} is True or False, got {value!r}")
        return cls(**{n: value == "True" if types[n] is bool else types[n](value) for n, value in given.items()})

    def __str__(self) -> str:
        named = [(field, getattr(self, field.name)) for field in fields(self)]
        changed = [(field.name, value) for field, value in named if value != field.default]
        return " ".join(name if value is True else f"{name}={value}" for name, value in changed)

    def compressed(self, task: Task, dense: nn.Module, keep: float, cache: str | None) -> nn.Module:
        """A copy that keeps this share of the weights."""
        anchored = shrank.Anchored(share=self.share, steps=self.steps)
        return shrank.auto_fact(
            dense,
            keep,
            deepcopy=True,
            calibrate=shrank.Calibrate(
                self._data(task), self._loss(task), cache=cache, probe=self.probe, max_memory=_MEMORY
            ),
            anchored=anchored if self.anchored or anchored != shrank.Anchored() else False,
            exclude=task.exclude,
            narrow=self.narrow,
        )

    def _data(self, task: Task) -> list[Batch]:
        found = task.healing_batches() if self.batches else task.batches()
        return shrank.batches(found[:: max(1, len(found) // (self.batches or len(found)))][: self.batches or None])

    def _loss(self, task: Task):
        return self.loss or task.own_loss


def chosen_rows(
    task: Task, choices: dict[str, Chosen], keeps: tuple[float, ...], cache: str | None = None
) -> Iterator[dict]:
    """Models that were compressed with these options, by the names of their rows.

    cache: a folder for calibrations, so that what has the same data and loss is calibrated once."""
    dense = task.model()
    names = list(baselines.layers(dense, task.exclude))
    for keep in keeps:
        for method, chosen in choices.items():
            started = time.perf_counter()
            small = chosen.compressed(task, dense, keep, cache)
            taken = round(time.perf_counter() - started)
            yield {
                "method": method,
                "keep": keep,
                **task.evaluate(small),
                "kept": round(weights(small, names) / weights(dense, names), 4),
                "compressed in s": taken,
                "blocks": sorted({found[1] for x in small.shrank_plan if (found := _BLOCK.search(x.reason))}),
                "measured": provenance("cpu"),
            }


def refinements(steps: int) -> dict[str, Chosen]:
    """What it gains to probe layers, and then to train each block."""
    return {
        f"{OURS}, probed": Chosen(probe=True),
        f"{OURS}, probed and refined {steps} steps": Chosen(probe=True, steps=steps),
    }


def weights(model: nn.Module, names: list[str]) -> int:
    """Numbers in the matrices of these layers."""
    layers = [model.get_submodule(name) for name in names]
    return sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
