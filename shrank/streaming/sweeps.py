"""What the layers of a model see, and what they do to its loss, found out unit by unit: once forward, once back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn

from ..calibration.batches import Batch, bound
from ..calibration.calibration import Calibration, warn_of_unseen
from ..calibration.losses import Sensitivity
from ..calibration.observer import Accumulator
from ..calibration.passes import LEAST_MEMORY, moment_files, run_pass
from ..calibration.request import Calibrate
from ..calibration.sharing import LayerCalls, observe_calls
from ..calibration.streams import Masking, warn_of_masks_that_fit_nothing
from ..model.hooks import hooked
from ..model.survey import Site
from ..util.files import write_text
from ..util.progress import track
from .cut import END, Course, Cut
from .gradients import SentBack
from .mapped import MappedModel, bytes_of
from .values import Unstreamable, read_masks, write_masks


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


class Sweeps:
    """The data on its way through a model.

    Args:
        mapped: The model.
        units: The layers of every unit, by its name, in the model's order.
        wanted: Names of the layers to look at.
        request: The data, as the model takes it, and how.
        folder: Of what is found, which is not looked for again.
    """

    def __init__(
        self, mapped: MappedModel, units: dict[str, list[Site]], wanted: set[str], request: Calibrate, folder: Path
    ) -> None:
        self.mapped, self.units, self.request, self.folder = mapped, units, request, folder
        self._wanted = wanted
        batches = bound(request.data, mapped.model)
        self.batches = [replace(batch, number=number) for number, batch in enumerate(batches)]
        self.course = Course([[] for _ in self.batches])
        names = {unit: [site.fqn for site in sites] for unit, sites in units.items()}
        self.cut = Cut(mapped.model, names, folder / "outputs", self.course)
        layers = {site.fqn: site.module for sites in units.values() for site in sites}
        self.masking = Masking(mapped.model, self.cut.modules() | layers)
        self.visits: list[Visit] = []

    def forward(self, measure: bool) -> None:
        """Run all data through all units; measure: note the moments of what their layers see."""
        self._look_ahead()
        nexts = {batch.number: self.cut.next(batch) for batch in self.batches}
        for unit in track(self._order(nexts), "forward, block by block", total=len(self.units)):
            visit = self._visited(unit, sorted(number for number, there in nexts.items() if there == unit))
            nexts |= visit.nexts
            if measure:
                visit.files = self._moments(visit, self._through(visit), None)
            self.mapped.release(self.mapped.model)
        warn_of_masks_that_fit_nothing(self.batches)

    def back(self, loss: Sensitivity) -> None:
        """Send the gradients of a loss back through all units, and note what their layers see and get of them."""
        first = next((i for i, visit in enumerate(self.visits) if visit.sites), len(self.visits))
        for visit in track(self.visits[first:][::-1], "backward, block by block"):
            sent = SentBack(self.cut, visit.unit, loss, self.request.seed, self.folder / "gradients")
            batches = self._through(visit, graph=True)
            passed = self.folder / "gradients" / f"{self.cut.place(visit.unit)}.json"
            if visit.sites:
                visit.files = self._moments(visit, batches, sent)
            elif not passed.exists():
                run_pass(Accumulator([], True, self.masking), batches, sent, self.request, f"through {visit.unit}")
                write_text(passed, "{}")
            self._forget_behind(visit)
            self.mapped.release(self.mapped.model)

    def calibration(self) -> Calibration:
        """What was found, after the sweeps."""
        seen = {site.fqn for visit in self.visits for site in visit.sites}
        unseen = [site.fqn for sites in self.units.values() for site in sites if site.fqn in self._wanted - seen]
        warn_of_unseen(unseen)
        return Calibration(self.folder, [file for visit in self.visits for file in visit.files], unseen)

    def _moments(self, visit: Visit, batches: list[Batch], loss: Sensitivity | None) -> list[Path]:
        """The files with the moments of a unit's layers, of which as much is held at a time as the largest unit takes,
        if nothing else was asked."""
        how = self.request
        if how.max_memory is None:
            largest = max(map(bytes_of, self.cut.modules().values()))
            how = replace(how, max_memory=max(largest, LEAST_MEMORY))
        return moment_files(self.folder / "moments", visit.sites, visit.calls, batches, self.masking, loss, how)

    def _look_ahead(self) -> None:
        """Find out what masks there are for, where that needs runs of the whole model."""

        def let_go(module: nn.Module, *_: object) -> None:
            self.mapped.release(module)

        with hooked((module, let_go) for module in self.cut.modules().values()):
            self.masking.prepare(self.batches)

    def _order(self, nexts: dict[int, str | None]) -> Iterator[str]:
        """The units as batches reach them; of several that batches wait at, the first in the model."""
        done: set[str] = set()
        while waiting := {unit for unit in nexts.values() if unit is not None}:
            unit = next(unit for unit in self.units if unit in waiting)
            if unit in done:
                raise Unstreamable(f"some batches reach {unit} only through what others reach after it")
            done.add(unit)
            yield unit

    def _visited(self, unit: str, numbers: list[int]) -> Visit:
        """Take these batches through a unit, or read what was noted of that."""
        file = self.folder / "visits" / f"{self.cut.place(unit)}.json"
        sites = [site for site in self.units[unit] if site.fqn in self._wanted]
        noted = json.loads(file.read_text()) if file.exists() else None
        masks = {number: self.batches[number].masks for number in numbers}
        before = {number: len(held.derived) for number, held in masks.items()}
        if noted is None:
            others = [site for site in self.units[unit] if site not in sites]
            batches = [call_of(self.batches[number], partial(self._kept, unit)) for number in numbers]
            calls = observe_calls(self.mapped.model, sites, batches, self.masking, others)
        else:
            calls = LayerCalls(**noted["calls"])
            for number, derived in read_masks(file.with_suffix(".safetensors")).items():
                masks[number].restore(derived)
            for key, leaves in noted["needs"].items():
                self.course.of(key).update(map(tuple, leaves))
        for number in numbers:
            self.course.orders[number].append(unit)
        if noted is None:
            nexts = [self.cut.next(self.batches[number]) for number in numbers]
            for number in (n for n, there in zip(numbers, nexts, strict=True) if there is None):
                self.cut.forget(unit, number)  # the last runs again with what comes after it
            needs = {key: sorted(self.course.of(key)) for key in (unit, END)}
            write_masks(file.with_suffix(".safetensors"), {n: held.derived[before[n] :] for n, held in masks.items()})
            noted = {"unit": unit, "calls": asdict(calls), "needs": needs, "nexts": nexts}
            write_text(file, json.dumps(noted))
        seen = [site for site in sites if site.fqn not in calls.unseen]
        visit = Visit(unit, numbers, calls, seen, dict(zip(numbers, noted["nexts"], strict=True)))
        self.visits.append(visit)
        return visit

    def _kept(self, unit: str, model: nn.Module, batch: Batch) -> object:
        output = self.cut.through(batch, unit)
        self.cut.keep(unit, batch.number, output)
        return output

    def _through(self, visit: Visit, graph: bool = False) -> list[Batch]:
        """The batches of a visit, as calls that run that unit alone; graph: for a backward pass, from the end of the
        model where the batch goes there next."""

        def run(model: nn.Module, batch: Batch) -> object:
            to_end = graph and self.course.is_last(visit.unit, batch.number)
            return self.cut.through(batch, visit.unit, graph, to_end)

        return [call_of(self.batches[number], run) for number in visit.numbers]

    def _forget_behind(self, visit: Visit) -> None:
        """Delete gradients that only this unit and later ones needed."""
        order = [v.unit for v in self.visits]
        before = set(order[: order.index(visit.unit)])
        for later in order[order.index(visit.unit) :]:
            needed = {unit for unit, _ in self.course.of(later) | self.course.of(END)}
            if not needed & before:
                for file in (self.folder / "gradients" / self.cut.place(later)).glob("*.safetensors"):
                    file.unlink()


def call_of(batch: Batch, run: Callable[[nn.Module, Batch], object]) -> Batch:
    """A batch that is run by a function, which gets it as it was."""
    return replace(batch, forward=lambda model, moved: run(model, replace(moved, forward=batch.forward)))
