"""The same low-rank layers in other storage: pivoted ones with plain factors, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..layers.low_rank import LowRankLayer
from ..layers.two_stage import merged_bias
from ..linalg import Factors, PivotedFactors, pivoted, unpivoted
from . import surgery
from .adapters import target
from .dense import dense_twin, require_plain
from .survey import Site, Survey

Stored = Factors | PivotedFactors


def unpivot(model: nn.Module) -> nn.Module:
    """Store pivoted layers with plain factors, in place.

    The matrices stay the same, and take R (K + N) numbers instead of R (K + N - R). Plain factors can be quantized,
    trained and split between processes.

    Args:
        model: Any model.

    Returns:
        The root of the model.

    Raises:
        ValueError: Another tool changed a pivoted layer. The model is then as it was.
    """
    return with_plain_factors(model)[0]


def with_plain_factors(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model, changed in place, with plain factors in its pivoted layers, and the names of these."""
    survey = Survey(model)
    sites = [site for site in survey.low_rank() if not site.inside and site.module.pivoted]
    unpivot_at(survey, sites)
    return survey.model, [site.fqn for site in sites]


def plain_factors_of(layer: LowRankLayer) -> Factors:
    """The plain factors of a low-rank layer, which is not changed."""
    factors = layer.factors()
    return unpivoted(factors) if isinstance(factors, PivotedFactors) else factors


def with_pivots(model: nn.Module, names: list[str]) -> nn.Module:
    """The model, changed in place, with pivots in these low-rank layers."""
    survey = Survey(model)
    pivot_at(survey, [site for site in survey.low_rank() if not site.inside and site.fqn in names])
    return survey.model


def unpivot_at(survey: Survey, sites: list[Site]) -> None:
    """Store these pivoted layers with plain factors; ValueError as `unpivot` raises it."""
    _store_otherwise(survey, sites, unpivoted)


def pivot_at(survey: Survey, sites: list[Site]) -> None:
    """Store these low-rank layers with pivots."""
    _store_otherwise(survey, sites, pivoted)


@torch.no_grad()
def _store_otherwise(survey: Survey, sites: list[Site], convert: Callable[[Stored], Stored]) -> None:
    require_plain(sites, "stored otherwise")
    for site in sites:
        layer = site.module
        factors = convert(layer.factors())
        pivots = isinstance(factors, PivotedFactors)
        twin = target(dense_twin(layer), vouched=True).twin(layer.rank, replace(layer.shape, pivoted=pivots))
        twin.take(factors, merged_bias(layer.stages))
        surgery.replace(survey, site, twin)
