"""The front door: plan, then apply."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

from torch import nn

from .apply import apply
from .plan import RankPlan
from .planning import make_plan, members


def auto_fact(module: nn.Module, rank: object, groups_out: bool = False, skip_high_groups: bool = True,
              submodules: Iterable[nn.Module] | None = None, deepcopy: bool = False, fact_led_unit: bool = False,
              **options: object) -> nn.Module:
    """Replace the linear and convolution layers of a model by low-rank twins initialised from their weights.

    rank: an int (for every layer), a float in (0, 1) (that fraction of each layer's break-even rank), a rule such as
    Energy(0.9), a dict of glob pattern -> rule, a function (fqn, module) -> rank | None, or a RankPlan.
    groups_out: the second stage of a grouped convolution is grouped too. skip_high_groups: leave a grouped convolution
    dense if its groups exceed the rank; False gives it min(rank, groups) groups. deepcopy: leave `module` untouched and
    change a copy. Further keywords: the fields of PlanOptions. Returns the model, or the twin if `module` itself is a
    layer; what was done, and why not more, is in its `shrank_plan`. Raises TypeError or ValueError on bad arguments.
    """
    if deepcopy:
        submodules = _counterparts(module, submodules, module := copy.deepcopy(module))
    if isinstance(rank, RankPlan):
        if options or submodules is not None or groups_out or fact_led_unit or not skip_high_groups:
            raise TypeError("a RankPlan already says what to do: give it without further options")
        plan = rank
    else:
        # Errors come with the factors; computing the spectra first would decompose every layer twice.
        plan = make_plan(module, rank, groups_out=groups_out, skip_high_groups=skip_high_groups, submodules=submodules,
                         fact_led_unit=fact_led_unit, **{"errors": False, **options})
    if not plan.low_rank:
        warnings.warn("no layer was replaced; print(make_plan(...)) shows the reasons", stacklevel=2)
    return apply(module, plan)


def _counterparts(original: nn.Module, submodules: Iterable[nn.Module] | None, copied: nn.Module):
    """The modules of the copy that stand where `submodules` stand in the original."""
    if submodules is None:
        return None
    wanted = {id(m) for m in members(submodules, original)}
    return [twin for old, twin in zip(original.modules(), copied.modules(), strict=True) if id(old) in wanted]
