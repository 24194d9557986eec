"""What the layers of a model see, and what they do to its loss, found out unit by unit: once forward, once back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from ..calibration.batches import Batch, bound
from ..calibration.calibration import Calibration, warn_of_unseen
from ..calibration.losses import Sensitivity, as_sensitivity
from ..calibration.observer import Accumulator
from ..calibration.passes import LEAST_MEMORY, moment_files, run_pass
from ..calibration.request import Calibrate
from ..calibration.sharing import Sides, observe_calls
from ..calibration.streams import Masking, warn_of_masks_that_fit_nothing
from ..model.hooks import hooked
from ..model.survey import Site
from ..util.files import size_on_disk, write_text
from ..util.progress import track
from .course import END, Course
from .cut import Cut
from .gradients import SentBack, forget_behind
from .mapped import MappedModel, bytes_of
from .room import expected, moments_of, require_room
from .values import Unstreamable
from .visits import Note, Visit, call_of, needed, thinned_before


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
        self._apart = max(math.isqrt(len(units)), 1)
        self._written = 0  # bytes that the last unit returned
        largest = max(map(bytes_of, self.cut.modules().values()), default=0)
        # Of moments as much is held at a time as the largest unit takes, if nothing else was asked.
        self.max_memory = request.max_memory or max(largest, LEAST_MEMORY)

    def expected(self, anchored: bool) -> dict[str, int]:
        """About how many bytes the sweeps write at most; see `expected`."""
        has_loss = as_sensitivity(self.request.loss) is not None
        kept = len(self.units) // self._apart + self._apart if has_loss else 2
        sites = [site for sites in self.units.values() for site in sites if site.fqn in self._wanted]
        return expected(self.cut, self.batches, sites, max(kept, 6 if anchored else 2), has_loss, self.request.inputs)

    def forward(self, measure: bool) -> None:
        """Run all data through all units; measure: note the moments of what their layers see."""
        self._look_ahead()
        # To go back, what every few units returned is kept, and the others run again from there.
        kept = set() if measure else set(list(self.units)[:: self._apart])
        nexts = {batch.number: self.cut.next(batch) for batch in self.batches}
        for unit in track(self._order(nexts), "forward, block by block", total=len(self.units)):
            numbers = sorted(number for number, there in nexts.items() if there == unit)
            is_new = not self._note(unit).exists()
            if is_new:
                require_room(self.folder, {f"what {unit} returns": self._written})
            visit = self._visited(unit, numbers)
            nexts |= visit.nexts
            if measure:
                visit.files = self._moments(visit, self._through(visit), None)
            if is_new:
                waiting = ((there or END, number) for number, there in nexts.items())
                self.cut.thin_out(kept.union(*(self.cut.needed(there, number) for there, number in waiting)))
                self._written = size_on_disk(self.cut.file(unit, 0).parent)
            self.mapped.release(self.mapped.model)
        warn_of_masks_that_fit_nothing(self.batches)

    def back(self, loss: Sensitivity) -> None:
        """Send the gradients of a loss back through all units, and note what their layers see and get of them."""
        first = next((i for i, visit in enumerate(self.visits) if visit.sites), len(self.visits))
        for visit in track(self.visits[first:][::-1], "backward, block by block"):
            sent = SentBack(self.cut, visit.unit, loss, self.request.seed, self.folder / "gradients")
            batches = self._through(visit, graph=True)
            passed = self.folder / "gradients" / f"{self.cut.place(visit.unit)}.json"
            if is_new := not passed.exists():
                require_room(
                    self.folder, {f"the moments of {visit.unit}": moments_of(visit.sites, self.request.inputs)}
                )
                self.restore(visit)
            if visit.sites:
                visit.files = self._moments(visit, batches, sent)
            elif is_new:
                run_pass(Accumulator([], True, self.masking), batches, sent, self.request, f"through {visit.unit}")
            if is_new:
                write_text(passed, "{}")
                self.cut.thin_out(needed(self.cut, self.visits[: self.visits.index(visit)]))
            forget_behind(self.folder / "gradients", self.cut, [v.unit for v in self.visits], visit.unit)
            self.mapped.release(self.mapped.model)

    def restore(self, visit: Visit) -> None:
        """Have what a unit depends on, unit by unit."""
        for unit, numbers in thinned_before(self.cut, self.visits, visit):
            for number in numbers:
                self.cut.again(unit, self.batches[number])
            self.mapped.release(self.mapped.model)

    def needed_from(self, visit: Visit) -> set[str]:
        """The units that this one and later ones depend on."""
        return needed(self.cut, self.visits[self.visits.index(visit) :])

    def calibration(self) -> Calibration:
        """What was found, after the sweeps."""
        seen = {site.fqn for visit in self.visits for site in visit.sites}
        unseen = [site.fqn for sites in self.units.values() for site in sites if site.fqn in self._wanted - seen]
        warn_of_unseen(unseen)
        return Calibration(self.folder, [file for visit in self.visits for file in visit.files], unseen)

    def _moments(self, visit: Visit, batches: list[Batch], loss: Sensitivity | None) -> list[Path]:
        """The files with the moments of a unit's layers."""
        how = replace(self.request, max_memory=self.max_memory)
        return moment_files(
            self.folder / "moments", visit.sites, visit.calls, batches, self.masking, loss, how, Sides(how.inputs)
        )

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
        sites = [site for site in self.units[unit] if site.fqn in self._wanted]
        file = self._note(unit)
        if file.exists():
            note = Note.read(file)
            note.take_up(self.course, self.batches)
            self._go_on(unit, numbers)
        else:
            note = self._seen(unit, sites, numbers)
            note.write(file, unit)
        seen = [site for site in sites if site.fqn not in note.calls.unseen]
        visit = Visit(unit, numbers, note.calls, seen, dict(zip(numbers, note.nexts, strict=True)))
        self.visits.append(visit)
        return visit

    def _seen(self, unit: str, sites: list[Site], numbers: list[int]) -> Note:
        """Take these batches through a unit."""
        masks = {number: self.batches[number].masks for number in numbers}
        before = {number: len(held.derived) for number, held in masks.items()}
        others = [site for site in self.units[unit] if site not in sites]
        batches = [call_of(self.batches[number], partial(self._kept, unit)) for number in numbers]
        calls = observe_calls(self.mapped.model, sites, batches, self.masking, others)
        self._go_on(unit, numbers)
        nexts = [self.cut.next(self.batches[number]) for number in numbers]
        for number in (n for n, there in zip(numbers, nexts, strict=True) if there is None):
            self.cut.forget(unit, number)  # the last runs again with what comes after it
        needs = {key: sorted(self.course.of(key)) for key in {unit, END, *filter(None, nexts)}}
        return Note(calls, nexts, needs, {n: held.derived[before[n] :] for n, held in masks.items()})

    def _go_on(self, unit: str, numbers: list[int]) -> None:
        for number in numbers:
            self.course.orders[number].append(unit)

    def _note(self, unit: str) -> Path:
        """Where it is noted what was found in a unit."""
        return self.folder / "visits" / f"{self.cut.place(unit)}.json"

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
