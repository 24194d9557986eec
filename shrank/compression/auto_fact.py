"""The front door: calibrate, plan, apply."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from ..calibration.batches import Batch, as_batches
from ..calibration.calibration import Calibration
from ..calibration.calibration import calibrate as run_calibration
from ..linalg import BudgetTooSmall
from ..planning.budget import Budget
from ..planning.make_plan import eligible, make_plan
from ..planning.options import PlanOptions, members, options_of
from ..planning.plan import RankPlan
from ..util.progress import track
from .anchored import SHARE, apply_anchored
from .apply import apply

# The options of `calibrate` and of `as_batches` that come with `calibrate=`.
_DATA_OPTIONS = ("loss", "cache", "max_memory", "spill", "seed")
_BATCH_OPTIONS = ("tokenizer", "mask", "batch_size", "max_length", "forward")
_WITH_DATA = _DATA_OPTIONS + _BATCH_OPTIONS
_KEYWORDS = ("module", "rank", "deepcopy", "calibrate", "anchored", *_WITH_DATA)
_TRIALS = 7  # halvings of the share kept: to within 1 / 128


def auto_fact(module: nn.Module, rank: object, groups_out: bool = False, skip_high_groups: bool = True,
              submodules: Iterable[nn.Module] | None = None, deepcopy: bool = False, fact_led_unit: bool = False, *,
              calibrate: Iterable[object] | Calibration | None = None, anchored: float | bool = False,
              **options: object) -> nn.Module:
    """Replace the linear and convolution layers of a model by low-rank twins initialised from their weights.

    rank: an int (for every layer), a float in (0, 1) (that fraction of each layer's break-even rank; with data, the
    share of all weights that a Budget keeps), a rule such as Energy(0.9), a dict of glob pattern -> rule, a function
    (fqn, module) -> rank | None, a Budget for all layers together, or a RankPlan. groups_out: the second stage of a
    grouped convolution is grouped too. skip_high_groups: leave a grouped convolution dense if its groups exceed the
    rank; False gives it min(rank, groups) groups. deepcopy: leave `module` untouched and change a copy. calibrate:
    data, as `shrank.calibrate` takes it with its options, or what that found; the twins then keep what the layers do to
    that data. anchored: compress block by block, each fitted at the inputs that the compressed blocks before it give to
    a mixture of the outputs there and those of the dense model, whose share it is, in (0, 1], or a quarter for True;
    needs the data itself, two runs of it for each block. Further keywords: the fields of PlanOptions.
    Returns the model, or the twin if `module` itself is a layer; what was done, and why not more, is in its
    `shrank_plan`. Raises TypeError or ValueError on bad arguments.
    """
    options_of("auto_fact", {name: value for name, value in options.items() if name not in _WITH_DATA}, _KEYWORDS)
    if submodules is not None:
        submodules = list(submodules)
    if deepcopy:
        submodules = _counterparts(module, submodules, module := copy.deepcopy(module))
    data = _data(calibrate, anchored, options)
    if isinstance(rank, RankPlan):
        if options or submodules is not None or groups_out or fact_led_unit or not skip_high_groups:
            raise TypeError("a RankPlan already says what to do: give it without further options")
        plan, data = rank, data.seen_by(module, [layer.fqn for layer in rank.low_rank])
    else:
        # Errors come with the factors; computing the spectra first would decompose every layer twice.
        options |= {"groups_out": groups_out, "skip_high_groups": skip_high_groups, "submodules": submodules,
                    "fact_led_unit": fact_led_unit, "errors": options.get("errors", False)}
        data = data.seen_by(module, [] if data.batches is None else eligible(module, PlanOptions(**options)))
        search = isinstance(rank, Budget) and rank.eval_fn is not None
        plan = (_smallest_good_enough if search else _plan)(module, rank, data, options)
    if not plan.low_rank:
        warnings.warn(f"no layer was replaced: {plan.why_dense()}", stacklevel=2)
    return data.carry_out(module, plan)


@dataclass(frozen=True)
class _Data:
    """What the caller gave to calibrate on, how, and what was found."""

    batches: list[Batch] | None
    calibration: Calibration | None
    options: dict[str, object]
    anchored: float

    def seen_by(self, module: nn.Module, layers: list[str]) -> _Data:
        """With the calibration of these layers, if there is data."""
        if self.batches is None:
            return self
        return replace(self, calibration=run_calibration(module, self.batches, layers=layers, **self.options))

    def carry_out(self, module: nn.Module, plan: RankPlan) -> nn.Module:
        if self.anchored:
            return apply_anchored(module, plan, self.batches, self.calibration, self.anchored)
        return apply(module, plan, self.calibration)


def _data(given: Iterable[object] | Calibration | None, anchored: float | bool, options: dict[str, object]) -> _Data:
    """What was given, with those of the options that are for it, which are removed from there."""
    own, of_batches = ({name: options.pop(name) for name in names if name in options}
                       for names in (_DATA_OPTIONS, _BATCH_OPTIONS))
    if given is not None and not isinstance(given, Calibration):
        return _Data(as_batches(given, **of_batches), None, own, SHARE if anchored is True else float(anchored))
    if useless := [*own, *of_batches, *["anchored"] * bool(anchored)]:
        raise TypeError(f"{', '.join(useless)}: only together with calibrate=data")
    return _Data(None, given, own, 0.0)


def _plan(module: nn.Module, rank: object, data: _Data, options: dict[str, object]) -> RankPlan:
    return make_plan(module, rank, calibration=data.calibration, **options)


def _smallest_good_enough(module: nn.Module, budget: Budget, data: _Data, options: dict[str, object]) -> RankPlan:
    """The plan of the smallest share of weights whose model loses at most `tolerated_drop`, found by bisection."""
    wanted = budget.eval_fn(module) - budget.tolerated_drop
    low, high, best, plan = 0.0, 1.0, None, None
    nothing = True
    for _ in track(range(_TRIALS), "bisecting"):
        keep = (low + high) / 2
        try:
            plan = _plan(module, replace(budget, eval_fn=None, keep_params=keep), data, options)
        except BudgetTooSmall:
            low = keep
            continue
        nothing = nothing and not plan.low_rank
        if plan.low_rank and budget.eval_fn(data.carry_out(copy.deepcopy(module), plan)) >= wanted:
            high, best = keep, plan
        else:
            low = keep
    if plan is not None and nothing:
        return plan  # it has the reasons
    if best is None:
        raise ValueError(f"no model that keeps less than {high:.3f} of the layers stays within tolerated_drop="
                         f"{budget.tolerated_drop:g}; the model is as it was")
    return best


def _counterparts(original: nn.Module, submodules: Iterable[nn.Module] | None, copied: nn.Module):
    """The modules of the copy that stand where `submodules` stand in the original."""
    if submodules is None:
        return None
    wanted = {id(m) for m in members(submodules, original)}
    return [twin for old, twin in zip(original.modules(), copied.modules(), strict=True) if id(old) in wanted]
