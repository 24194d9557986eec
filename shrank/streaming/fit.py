"""The second way through a model: the layers of every unit are fitted, and the unit is written."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.calibration import Calibration
from ..calibration.metric_source import MetricSource
from ..calibration.moment_files import write_results
from ..calibration.sharing import Group, anchored_entries, in_passes
from ..compression.anchored import carried_out, groups_in, warn_of_few_tokens
from ..compression.anchored_moments import AnchoredMetrics, observed
from ..compression.anchored_options import Anchored
from ..compression.refine import Example, example_of, noted, refined, trainable_sites
from ..linalg import FactorizationError, Shape
from ..model.survey import Site, Survey
from ..planning.plan import LayerPlan, RankPlan
from ..planning.spectra import Spectra
from ..util import nested, tensor_file
from ..util.cache import name_of
from ..util.progress import track
from .cut import Cut
from .mapped import MappedModel, bytes_of
from .room import require_room
from .shards import write_rest, write_shard
from .sweeps import Sweeps
from .visits import Visit, call_of

_SPECTRUM, _REASON = "spectrum", "stays dense"


class KeptSpectra(Spectra):
    """Spectra of a mapped model, one after another, kept in files."""

    def __init__(self, calibration: Calibration | None, mapped: MappedModel, folder: Path) -> None:
        super().__init__(calibration)
        self._mapped, self._folder = mapped, folder

    def workers(self, weights: Iterable[Tensor]) -> int:
        return 1

    def of(self, site: Site, shape: Shape) -> Tensor:
        file = self._folder / f"{name_of({'layer': site.fqn, 'shape': asdict(shape)})}.safetensors"
        if not file.exists():
            tensor_file.write(file, *self._computed(site, shape))
        if reason := tensor_file.read_table(file)[1].get(_REASON):
            raise FactorizationError(reason)
        return tensor_file.read(file, [_SPECTRUM])[_SPECTRUM]

    def _computed(self, site: Site, shape: Shape) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            return {_SPECTRUM: super().of(site, shape)}, {}
        except FactorizationError as error:
            return {}, {_REASON: str(error)}
        finally:
            self._mapped.release(site.module)


class Fit:
    """A plan carried out on a model, unit by unit.

    Args:
        mapped: The model, whose layers are replaced.
        units: The layers of every unit, by its name.
        plan: What to do.
        calibration: What the layers see, if that is known.
        folder: Of what is written.
    """

    def __init__(
        self,
        mapped: MappedModel,
        units: dict[str, list[Site]],
        plan: RankPlan,
        calibration: Calibration | None,
        folder: Path,
    ) -> None:
        self.mapped, self.units, self.plan, self.calibration = mapped, units, plan, calibration
        self.folder, self.survey = folder, Survey(mapped.model)
        self._places = {unit: f"{number:05d}" for number, unit in enumerate(units)}

    def shards(self) -> list[Path]:
        """The files with the weights, the rest of the model last."""
        return [*(self._shard(unit) for unit in self.units), self.folder / "shards" / "rest.safetensors"]

    def run(
        self,
        order: list[str],
        metric: Callable[[str], MetricSource | None],
        after: Callable[[str, dict[str, LayerPlan]], dict[str, LayerPlan]],
    ) -> None:
        """Fit and write units in this order, each in the norms that `metric` gives of it; `after`: what becomes of it
        and of its plan before it is written."""
        for unit in track(order, "fitting, block by block"):
            if self._shard(unit).exists():
                continue
            require_room(self.folder, {unit: bytes_of(self.mapped.model.get_submodule(unit))})
            names = {site.fqn for site in self.units[unit]}
            done = carried_out(self.survey, self.plan, names, metric(unit), workers=1)
            done = after(unit, done)
            RankPlan(tuple(done.values())).save(self._notes(unit))
            write_shard(self._shard(unit), unit, self.mapped.model)
            self.mapped.model.get_submodule(unit).to("meta")
            self.mapped.release(self.mapped.model)

    def write_rest(self) -> None:
        if not (rest := self.shards()[-1]).exists():
            write_rest(rest, self.mapped.model, self.units)
            self.mapped.release(self.mapped.model)

    def done(self) -> RankPlan:
        """The plan as it was carried out, with the errors found."""
        found = {x.fqn: x for unit in self.units for x in RankPlan.load(self._notes(unit))}
        return replace(self.plan, layers=tuple(found.get(layer.fqn, layer) for layer in self.plan))

    def _shard(self, unit: str) -> Path:
        return self.folder / "shards" / f"{self._places[unit]}.safetensors"

    def _notes(self, unit: str) -> Path:
        return self.folder / "fitted" / f"{self._places[unit]}.json"


class AnchoredFit:
    """The norms of units at what they see in the model that is compressed before them, which runs beside the dense one.

    Args:
        dense: The data on its way through the dense model.
        fit: Of the other model.
        how: Of the blocks.
    """

    def __init__(self, dense: Sweeps, fit: Fit, how: Anchored) -> None:
        self._dense, self._fit, self._how = dense, fit, how
        names = {unit: [site.fqn for site in sites] for unit, sites in fit.units.items()}
        self._cut = Cut(fit.mapped.model, names, fit.folder / "compressed", dense.course, lasting=False)
        self._visits = {visit.unit: visit for visit in dense.visits}
        sites = [s for ss in fit.units.values() for s in ss if s.fqn in fit.calibration and fit.plan[s.fqn].rank]
        warn_of_few_tokens(fit.plan, fit.calibration, sites)

    def metric(self, unit: str) -> MetricSource:
        """Of a unit that comes next in the order of execution."""
        if (visit := self._visits.get(unit)) is None:
            return self._fit.calibration
        self._dense.restore(visit)
        sites = {site.fqn: site for site in self._fit.units[unit]}
        shared = [[sites[name] for name in names if self._is_anchored(name)] for names in visit.calls.shared]
        groups = [group for sharing in shared if sharing for group in groups_in(sharing, self._fit.calibration)]
        if not groups:
            return self._fit.calibration
        passes = in_passes(groups, visit.calls.rows, anchored_entries, self._dense.max_memory)
        files = [self._folder(unit) / f"{number:05d}.safetensors" for number in range(len(passes))]
        for file, part in zip(files, passes, strict=True):
            if not file.exists():
                self._write(file, part, visit)
        moments = Calibration(self._folder(unit), files)
        return AnchoredMetrics(self._fit.calibration, moments)

    def _write(self, file: Path, groups: list[Group], visit: Visit) -> None:
        """Write the moments of some layers of a unit."""
        batches = [call_of(self._dense.batches[number], partial(self._through, visit.unit)) for number in visit.numbers]
        model, masking = self._fit.mapped.model, self._dense.masking
        found = observed(model, masking, groups, batches, visit.calls.calls, self._how.share)
        firsts = {site.fqn: group.sites[0].fqn for group in groups for site in group.sites}
        write_results(file, ((name, moments, firsts[name]) for name, moments in found.items()), reached=False)
        self._dense.mapped.release(self._dense.mapped.model)

    def _folder(self, unit: str) -> Path:
        return self._fit.folder / "anchored" / self._cut.place(unit)

    def run_on(self, unit: str, done: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
        """Train the unit, now that its layers are fitted, if that is wanted, and run the data through it; its plan."""
        if visit := self._visits.get(unit):
            shutil.rmtree(self._folder(unit), ignore_errors=True)
            if self._how.steps:
                done = self._trained(visit, done)
            for number in visit.numbers:
                if visit.nexts[number] is not None:
                    self._cut.keep(unit, number, self._cut.through(self._dense.batches[number], unit))
            for cut in (self._cut, self._dense.cut):
                cut.thin_out(self._dense.needed_from(visit))
        return done

    def _trained(self, visit: Visit, done: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
        survey, unit = self._fit.survey, visit.unit
        sites = trainable_sites(survey, self._dense.mapped.model, unit, done)
        if not sites:
            return done
        found = refined(survey, unit, sites, visit.numbers, partial(self._example, unit), self._how)
        self._dense.mapped.release(self._dense.mapped.model)
        if isinstance(found, str):
            warnings.warn(f"fitted, but not trained further: {unit}: {found}", stacklevel=2)
        return done | {site.fqn: noted(done[site.fqn], unit, found) for site in sites}

    def _example(self, unit: str, number: int) -> Example:
        """What the compressed unit is called with in a batch, beside what the dense one returns."""
        batch, calls = self._dense.batches[number], []

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append(nested.mapped(Tensor.detach, (args, kwargs)))

        handle = self._fit.mapped.model.get_submodule(unit).register_forward_pre_hook(note, with_kwargs=True)
        try:
            self._cut.through(batch, unit)
        finally:
            handle.remove()
        output = self._dense.cut.through(batch, unit)
        self._dense.masking.begin(batch)
        return example_of(calls[-1], output, self._dense.masking.call(unit))

    def _is_anchored(self, name: str) -> bool:
        return name in self._fit.calibration and self._fit.plan[name].rank is not None

    def _through(self, unit: str, model: nn.Module, batch: Batch) -> object:
        cut = self._cut if model is self._fit.mapped.model else self._dense.cut
        return cut.through(batch, unit)
