"""Plans of corrections, for tests."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

import shrank
from shrank import RankPlan
from shrank.linalg import Grid, Storage

RANK = 4
STORAGES = {
    "int4": Storage(Grid(4, 16), corrected=True),
    "int4-factors-int8": Storage(Grid(4, 16), corrected=True, factor_grid=Grid(8)),
    "int8-activations-int8": Storage(Grid(8), corrected=True, factor_grid=Grid(8), activations="int8"),
}


def corrections(model: nn.Module, storage: Storage, rank: int = RANK) -> RankPlan:
    """The same correction of every layer that a plan may change."""
    names, plan = set(shrank.eligible(model)), shrank.make_plan(model, {"*": None})
    layers = (replace(x, rank=rank, storage=storage) if x.fqn in names else x for x in plan)
    return replace(plan, layers=tuple(layers))


def corrected(model: nn.Module, storage: Storage = STORAGES["int4"], calibration: object = None) -> nn.Module:
    """A copy with these corrections."""
    return shrank.apply(copy.deepcopy(model), corrections(model, storage), calibration)
