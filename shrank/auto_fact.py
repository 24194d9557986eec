"""The front door: calibrate, plan, apply."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from .apply import apply
from .budget import Budget
from .calibration import Calibration
from .calibration import calibrate as run_calibration
from .fitting import PlanOptions, members
from .linalg import BudgetTooSmall
from .plan import RankPlan
from .planning import eligible, make_plan
from .progress import track

# The options of `calibrate` that come with `calibrate=`.
_DATA_OPTIONS = ("loss", "tokenizer", "mask", "cache", "max_memory", "seed", "batch_size", "max_length")
_TRIALS = 7  # halvings of the share kept: to within 1 / 128


def auto_fact(module: nn.Module, rank: object, groups_out: bool = False, skip_high_groups: bool = True,
              submodules: Iterable[nn.Module] | None = None, deepcopy: bool = False, fact_led_unit: bool = False, *,
              calibrate: Iterable[object] | Calibration | None = None, **options: object) -> nn.Module:
    """Replace the linear and convolution layers of a model by low-rank twins initialised from their weights.

    rank: an int (for every layer), a float in (0, 1) (that fraction of each layer's break-even rank), a rule such as
    Energy(0.9), a dict of glob pattern -> rule, a function (fqn, module) -> rank | None, a Budget for all layers
    together, or a RankPlan. groups_out: the second stage of a grouped convolution is grouped too. skip_high_groups:
    leave a grouped convolution dense if its groups exceed the rank; False gives it min(rank, groups) groups. deepcopy:
    leave `module` untouched and change a copy. calibrate: data, as `shrank.calibrate` takes it with its options, or
    what that found; the twins then keep what the layers do to that data. Further keywords: the fields of PlanOptions.
    Returns the model, or the twin if `module` itself is a layer; what was done, and why not more, is in its
    `shrank_plan`. Raises TypeError or ValueError on bad arguments.
    """
    if submodules is not None:
        submodules = list(submodules)
    if deepcopy:
        submodules = _counterparts(module, submodules, module := copy.deepcopy(module))
    data_options = {name: options.pop(name) for name in _DATA_OPTIONS if name in options}
    if data_options and (calibrate is None or isinstance(calibrate, Calibration)):
        raise TypeError(f"{', '.join(data_options)}: only together with calibrate=data")
    if isinstance(rank, RankPlan):
        if options or submodules is not None or groups_out or fact_led_unit or not skip_high_groups:
            raise TypeError("a RankPlan already says what to do: give it without further options")
        plan, layers = rank, [layer.fqn for layer in rank.low_rank]
        calibration = _calibration(module, calibrate, layers, data_options)
    else:
        # Errors come with the factors; computing the spectra first would decompose every layer twice.
        options |= {"groups_out": groups_out, "skip_high_groups": skip_high_groups, "submodules": submodules,
                    "fact_led_unit": fact_led_unit, "errors": options.get("errors", False)}
        layers = [] if calibrate is None else eligible(module, PlanOptions(**options))
        calibration = _calibration(module, calibrate, layers, data_options)
        if isinstance(rank, Budget) and rank.eval_fn is not None:
            return _smallest_good_enough(module, rank, calibration, options)
        plan = make_plan(module, rank, calibration=calibration, **options)
    if not plan.low_rank:
        warnings.warn("no layer was replaced; print(make_plan(...)) shows the reasons", stacklevel=2)
    return apply(module, plan, calibration)


def _calibration(module: nn.Module, data: Iterable[object] | Calibration | None, layers: list[str],
                 options: dict[str, object]) -> Calibration | None:
    if data is None or isinstance(data, Calibration):
        return data
    return run_calibration(module, data, layers=layers, **options)


def _smallest_good_enough(module: nn.Module, budget: Budget, calibration: Calibration | None,
                          options: dict[str, object]) -> nn.Module:
    """The model at the smallest share of its weights that loses at most `tolerated_drop`, found by bisection."""
    wanted = budget.eval_fn(module) - budget.tolerated_drop
    low, high, best = 0.0, 1.0, None
    for _ in track(range(_TRIALS), "bisecting"):
        keep = (low + high) / 2
        try:
            trial = replace(budget, eval_fn=None, keep_params=keep)
            plan = make_plan(module, trial, calibration=calibration, **options)
        except BudgetTooSmall:
            low = keep
            continue
        if plan.low_rank and budget.eval_fn(apply(copy.deepcopy(module), plan, calibration)) >= wanted:
            high, best = keep, plan
        else:
            low = keep
    if best is None:
        raise ValueError(f"no model that keeps less than {high:.3f} of the layers stays within tolerated_drop="
                         f"{budget.tolerated_drop:g}; the model is as it was")
    return apply(module, best, calibration)


def _counterparts(original: nn.Module, submodules: Iterable[nn.Module] | None, copied: nn.Module):
    """The modules of the copy that stand where `submodules` stand in the original."""
    if submodules is None:
        return None
    wanted = {id(m) for m in members(submodules, original)}
    return [twin for old, twin in zip(original.modules(), copied.modules(), strict=True) if id(old) in wanted]
