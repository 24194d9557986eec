"""The second way through a model: the layers of every unit are fitted, and the unit is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.calibration import Calibration
from ..calibration.metric_source import MetricSource
from ..compression.anchored import carried_out, groups_in, warn_of_few_tokens
from ..compression.anchored_moments import anchored_at
from ..linalg import FactorizationError, Shape
from ..model.survey import Site, Survey
from ..planning.plan import RankPlan
from ..planning.spectra import Spectra
from ..util import tensor_file
from ..util.cache import name_of
from ..util.progress import track
from .cut import Cut
from .mapped import MappedModel
from .shards import write_rest, write_shard
from .sweeps import Sweeps, call_of

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

    def run(self, order: list[str], metric: Callable[[str], MetricSource | None], after: Callable[[str], None]) -> None:
        """Fit and write units in this order, each in the norms that `metric` gives of it; `after`: before one is
        written."""
        for unit in track(order, "fitting, block by block"):
            if self._shard(unit).exists():
                continue
            names = {site.fqn for site in self.units[unit]}
            done = carried_out(self.survey, self.plan, names, metric(unit), workers=1)
            after(unit)
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
        share: See `shrank.apply_anchored`.
    """

    def __init__(self, dense: Sweeps, fit: Fit, share: float) -> None:
        self._dense, self._fit, self._share = dense, fit, share
        names = {unit: [site.fqn for site in sites] for unit, sites in fit.units.items()}
        self._cut = Cut(fit.mapped.model, names, fit.folder / "compressed", dense.course)
        self._visits = {visit.unit: visit for visit in dense.visits}
        sites = [s for ss in fit.units.values() for s in ss if s.fqn in fit.calibration and fit.plan[s.fqn].rank]
        warn_of_few_tokens(fit.plan, fit.calibration, sites)

    def metric(self, unit: str) -> MetricSource:
        """Of a unit that comes next in the order of execution."""
        if (visit := self._visits.get(unit)) is None:
            return self._fit.calibration
        sites = {site.fqn: site for site in self._fit.units[unit]}
        shared = [[sites[name] for name in names if self._is_anchored(name)] for names in visit.calls.shared]
        groups = [group for sharing in shared if sharing for group in groups_in(sharing, self._fit.calibration)]
        if not groups:
            return self._fit.calibration
        batches = [call_of(self._dense.batches[number], partial(self._through, unit)) for number in visit.numbers]
        model, masking = self._fit.mapped.model, self._dense.masking
        found = anchored_at(self._fit.calibration, model, masking, groups, batches, visit.calls.calls, self._share)
        self._dense.mapped.release(self._dense.mapped.model)
        return found

    def run_on(self, unit: str) -> None:
        """Run the data through the unit, now that its layers are fitted."""
        if visit := self._visits.get(unit):
            for number in visit.numbers:
                if visit.nexts[number] is not None:
                    self._cut.keep(unit, number, self._cut.through(self._dense.batches[number], unit))

    def _is_anchored(self, name: str) -> bool:
        return name in self._fit.calibration and self._fit.plan[name].rank is not None

    def _through(self, unit: str, model: nn.Module, batch: Batch) -> object:
        cut = self._cut if model is self._fit.mapped.model else self._dense.cut
        return cut.through(batch, unit)
