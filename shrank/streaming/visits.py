"""Batches on their way through one unit, and what was found there, in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from ..calibration.batches import Batch
from ..calibration.masks import Mask
from ..calibration.sharing import LayerCalls
from ..model.survey import Site
from ..util.files import write_text
from .course import Course
from .cut import Cut
from .values import read_masks, write_masks


@dataclass
class Visit:
    """What was found as batches of these numbers went through a unit: how its layers are called, those that saw
    anything, the unit that every batch reaches next, None for the end; and the files with the layers' moments."""

    unit: str
    numbers: list[int]
    calls: LayerCalls
    sites: list[Site]
    nexts: dict[int, str | None]
    files: list[Path] = field(default_factory=list)


@dataclass
class Note:
    """What was found of a unit: how its layers are called, the unit that every batch reaches next, the needs of units,
    and masks behind its convolutions, by batch."""

    calls: LayerCalls
    nexts: list[str | None]
    needs: dict[str, list]
    masks: dict[int, list[Mask]]

    def write(self, file: Path, unit: str) -> None:
        write_masks(file.with_suffix(".safetensors"), self.masks)
        noted = {"unit": unit, "calls": asdict(self.calls), "needs": self.needs, "nexts": self.nexts}
        write_text(file, json.dumps(noted))

    @staticmethod
    def read(file: Path) -> Note:
        noted = json.loads(file.read_text())
        masks = read_masks(file.with_suffix(".safetensors"))
        return Note(LayerCalls(**noted["calls"]), noted["nexts"], noted["needs"], masks)

    def take_up(self, course: Course, batches: list[Batch]) -> None:
        """Let what was noted be known."""
        for number, derived in self.masks.items():
            batches[number].masks.restore(derived)
        for key, leaves in self.needs.items():
            course.of(key).update(map(tuple, leaves))


def call_of(batch: Batch, run: Callable[[nn.Module, Batch], object]) -> Batch:
    """A batch that is run by a function, which gets it as it was."""
    return replace(batch, forward=lambda model, moved: run(model, replace(moved, forward=batch.forward)))


def needed(cut: Cut, visits: Iterable[Visit]) -> set[str]:
    """The units that these depend on."""
    return {u for v in visits for n in v.numbers for u in cut.needed(v.unit, n, v.nexts[n] is None)}


def thinned_before(cut: Cut, visits: list[Visit], visit: Visit) -> list[tuple[str, list[int]]]:
    """The units, with the numbers of their batches, that must run again, in this order, before a unit can."""
    wanted, found = needed(cut, [visit]), []
    for earlier in visits[: visits.index(visit)][::-1]:
        numbers = [number for number in earlier.numbers if earlier.nexts[number] is not None]
        if earlier.unit in wanted and not all(cut.is_kept(earlier.unit, number) for number in numbers):
            found.append((earlier.unit, numbers))
            wanted |= needed(cut, [earlier])
    return found[::-1]
