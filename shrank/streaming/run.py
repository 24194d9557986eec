"""A checkpoint compressed from its files into others, from the first look at it to the folder in its place."""

from __future__ import annotations

import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..calibration.calibration import Calibration
from ..calibration.losses import as_sensitivity
from ..calibration.request import Calibrate
from ..compression.resolve import resolve
from ..model import notes
from ..model.blocks import blocks_of
from ..model.survey import Site, Survey
from ..planning.budget import Budget
from ..planning.make_plan import eligible_in, plan_of
from ..planning.options import PlanOptions
from ..planning.plan import RankPlan
from ..planning.rank import Rank
from ..saving.folders import transformer_of
from ..saving.transformers_folder import complete
from ..saving.transformers_saving import save_config
from ..saving.transformers_widths import configs_in
from ..util.fingerprint import fingerprint
from ..version import __version__
from .fit import AnchoredFit, Fit, KeptSpectra
from .journal import put_in_place, taken_up, work_folder
from .mapped import MappedModel
from .shards import assembled, bare
from .sweeps import Sweeps
from .values import Unstreamable


class Run:
    """One run; see `Checkpoint.compressed`.

    Args:
        mapped: The model, whose layers are replaced.
        source: Where it is from.
        target: The folder to write.
        how: What to calibrate on, if anything.
        share: Of the dense outputs in what layers are fitted to, 0 to fit each alone.
    """

    def __init__(self, mapped: MappedModel, source: str, target: Path, how: Calibrate | None, share: float) -> None:
        self.mapped, self.source, self.target, self.how, self.share = mapped, source, target, how, share
        self.work = work_folder(target)

    def carry_out(self, rank: Rank | Budget | RankPlan, options: PlanOptions) -> nn.Module:
        """The compressed model, mapped from the files that were written; or the dense one, if nothing was to be
        done."""
        survey = Survey(self.mapped.model)
        if isinstance(rank, RankPlan):
            resolve(survey, rank)
        taken_up(self.work, self._about(rank, options))
        try:
            return self._carried_out(survey, rank, options)
        except Unstreamable:
            shutil.rmtree(self.work)
            raise

    def _carried_out(self, survey: Survey, rank: Rank | Budget | RankPlan, options: PlanOptions) -> nn.Module:
        mapped, work = self.mapped, self.work
        with torch.inference_mode(False), torch.no_grad(), _without_cache(mapped.model):
            wanted = {x.fqn for x in rank.low_rank} if isinstance(rank, RankPlan) else eligible_in(survey, options)
            sweeps = Sweeps(mapped, _units(survey), set(wanted), self.how, work) if self.how else None
            calibration = _swept(sweeps) if sweeps else None
            plan = self._plan(survey, rank, calibration, options)
            if not plan.low_rank:
                warnings.warn(f"no layer was replaced: {plan.why_dense()}", stacklevel=4)
                shutil.rmtree(work)
                return _noted(mapped.model, plan)
            fit = self._fitted(plan, calibration, sweeps if self.share else None)
        done = fit.done()
        self._put_in_place(fit.shards(), done)
        return _noted(MappedModel(str(self.target)).model, done)

    def _put_in_place(self, shards: list[Path], done: RankPlan) -> None:
        """Make a folder of what was written."""
        result = self.work / "result"
        shutil.rmtree(result, ignore_errors=True)
        place = transformer_of(self.source)
        assembled(shards, result / place)
        save_config(self.mapped.model, bare(done), result / place)
        complete(MappedModel(str(result)).model, self.source, result, self.target.name)
        put_in_place(result, self.target)
        shutil.rmtree(self.work)

    def _plan(
        self,
        survey: Survey,
        rank: Rank | Budget | RankPlan,
        calibration: Calibration | None,
        options: PlanOptions,
    ) -> RankPlan:
        """What to do, as it was decided once."""
        if isinstance(rank, RankPlan):
            return rank
        file = self.work / "plan.json"
        if not file.exists():
            plan_of(survey, rank, KeptSpectra(calibration, self.mapped, self.work / "spectra"), options).save(file)
        return RankPlan.load(file)

    def _fitted(self, plan: RankPlan, calibration: Calibration | None, sweeps: Sweeps | None) -> Fit:
        """The plan carried out; sweeps: of the dense model, if layers are fitted to its outputs."""
        mapped = MappedModel(self.source) if sweeps else self.mapped
        units = _units(Survey(mapped.model))
        fit = Fit(mapped, units, plan, calibration, self.work)
        if sweeps is None:
            shutil.rmtree(self.work / "outputs", ignore_errors=True)
            fit.run(list(units), lambda unit: calibration, lambda unit: None)
        else:
            anchored = AnchoredFit(sweeps, fit, self.share)
            visited = [visit.unit for visit in sweeps.visits]
            with _without_cache(mapped.model):
                fit.run([*visited, *(u for u in units if u not in visited)], anchored.metric, anchored.run_on)
        fit.write_rest()
        return fit

    def _about(self, rank: Rank | Budget | RankPlan, options: PlanOptions) -> dict[str, object]:
        """All that the result depends on."""
        how = self.how
        stats = {file.name: file.stat() for file in self.mapped.files}
        return {
            "version of shrank": __version__,
            "version of torch": torch.__version__,
            "source": str(Path(self.source).resolve()),
            "state of the source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "rank": fingerprint(rank),
            "option": fingerprint(options),
            "data": how and fingerprint([batch.content() for batch in how.data]),
            "loss": how and fingerprint([how.loss, how.seed]),
            "share of dense outputs": self.share,
        }


def _units(survey: Survey) -> dict[str, list[Site]]:
    """The layers of a model by the blocks that they are in, or by their own names outside of blocks."""
    blocks, units = blocks_of(survey.model), defaultdict(list)
    for site in survey.sites():
        if site.fqn in blocks:
            units[blocks[site.fqn]].append(site)
    return dict(units)


def _swept(sweeps: Sweeps) -> Calibration:
    """What the layers see, and with a loss what gradients come to them."""
    loss = as_sensitivity(sweeps.request.loss)
    sweeps.forward(measure=loss is None)
    if loss:
        with torch.enable_grad():
            sweeps.back(loss)
    found = sweeps.calibration()
    if loss:
        found.require_gradients()
    return found


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a model keeps no keys and values: through these its blocks would know of each other."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]  # with configs of their own
    configs = [c for part in parts for c in configs_in(part.config) if getattr(c, "use_cache", False)]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config in configs:
            config.use_cache = True


def _noted(model: nn.Module, plan: RankPlan) -> nn.Module:
    notes.note(model, notes.PLAN, plan)
    return model
