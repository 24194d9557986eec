"""The blocks that a budget may narrow, and what they lose at every width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..calibration.metric_source import LayerStatistics, columns_of
from ..linalg import FactorizationError, eliminate
from ..model.survey import Site
from ..model.unit_blocks import OfUnits, UnitBlock
from ..util.parallel import dealt, workers_for
from .budget import Budget, MaxError
from .costs import Cost, Latency
from .losses import Candidate
from .narrowed import NarrowedBlock, narrowed_shape
from .narrower import Narrower
from .options import PlanOptions
from .plan import LayerPlan, narrowed_layer
from .spectra import Spectra
from .spending import BY_BUDGET

# Of its units, what a block may keep where its layers get ranks or few bits besides.
_SHARES = (0.375, 0.5, 0.625, 0.75, 0.875)


@dataclass(frozen=True)
class BlockCandidate:
    """A block that the budget may narrow: its layers as candidates for ranks, the consumer last; by width the squared
    error of the consumer's outputs, for one token; and at some widths the layers as candidates again, whose errors come
    on top of that one. carried: the layers between them, which follow its width."""

    block: UnitBlock
    layers: tuple[Candidate, ...]
    errors: tuple[float, ...]
    narrower: dict[int, tuple[Candidate, ...]] = field(default_factory=dict)
    carried: tuple[LayerPlan, ...] = ()

    @property
    def consumer(self) -> Candidate:
        return self.layers[-1]

    def at(self, width: int | None, reason: str) -> NarrowedBlock:
        """The plan of the block."""
        known = width is not None and self.errors[0] > 0
        error = math.sqrt(self.errors[width] / self.errors[0]) if known else None
        return replace(NarrowedBlock.of(self.block).with_width(width, reason), error=error)

    def layers_at(self, width: int) -> list[LayerPlan]:
        """The plans of its layers where it is narrowed."""
        return [self.narrowed(x.draft, width) for x in self.layers] + self.carried_at(width)

    def carried_at(self, width: int) -> list[LayerPlan]:
        """The plans of the layers between them."""
        return [self.narrowed(layer, width) for layer in self.carried]

    def narrowed(self, layer: LayerPlan, width: int) -> LayerPlan:
        """The plan of one of its layers, dense, where it is narrowed."""
        return narrowed_layer(layer, self.at(width, BY_BUDGET), BY_BUDGET)


@dataclass(frozen=True)
class Others:
    """The layers that are no candidates, with what is decided of them; and of all layers those that the options leave
    out, with the reasons."""

    decided: Mapping[str, LayerPlan]
    left_out: Mapping[str, str]


def width_options(block: BlockCandidate, cost: Cost, options: PlanOptions) -> dict[int, tuple[float, float]]:
    """What a block costs and loses at every width that it could have, its layers dense: width -> (cost, error), in the
    units of the costs and errors of ranks."""
    plan, found = NarrowedBlock.of(block.block), {}
    for width in widths(plan, options):
        at = replace(plan, width=width)
        shapes = [narrowed_shape(at, x.site.fqn, x.draft.shape) for x in block.layers]
        price = sum(cost.of(x.priced, None, shape) for x, shape in zip(block.layers, shapes, strict=True))
        found[width] = price, block.errors[width] * block.consumer.weight
    return found


def widths(block: OfUnits, options: PlanOptions) -> range:
    """All widths that a block may have whose layers stay as they are."""
    multiple = _multiple(block, options.round_to or (8 if block.units >= 128 else 1))
    return range(multiple, block.units, multiple)


def _some_widths(block: OfUnits, options: PlanOptions) -> list[int]:
    """A few, of which the larger ones are multiples of the groups that share a scale."""
    units = block.units
    multiple = _multiple(block, options.round_to or (64 if units >= 512 else 8 if units >= 128 else 1))
    found = {round(share * units / multiple) * multiple for share in _SHARES}
    return sorted(width for width in found if 0 < width < units)


def _multiple(block: OfUnits, size: int) -> int:
    """Of how many units the layers' sizes are multiples of this one."""
    return size // math.gcd(size, *block.rows) if block.rows else size


def require_narrowable(statistics: LayerStatistics | None, rule: object) -> None:
    """ValueError where `narrow` was asked for and cannot be done."""
    if not isinstance(rule, Budget):
        raise ValueError(
            "narrow: only a budget decides on the widths of blocks: give a Budget, or with data the share of weights "
            "to keep as a number"
        )
    if isinstance(rule.goal, Latency):
        raise ValueError("narrow: the table of keep_latency has no times of narrowed layers; use keep_flops")
    known_only = "narrow: what units are worth is known only of data and a loss"
    if statistics is None:
        raise ValueError(f"{known_only}: give calibrate=data")
    if statistics.unit_blocks is None:
        raise ValueError("narrow: this calibration did not look for blocks; make it with calibrate(..., narrow=True)")
    if statistics.unit_blocks and not statistics.has_gradients:
        raise ValueError(f"{known_only}, and this calibration is of none: not loss='none'")


def block_candidates(
    statistics: LayerStatistics,
    budget: Budget,
    candidates: list[Candidate],
    others: Others,
    options: PlanOptions,
) -> tuple[list[BlockCandidate], list[NarrowedBlock]]:
    """The blocks that the budget may narrow, and those that it may not, with the reasons.

    others: the layers that are no candidates.
    """
    by_name = {x.site.fqn: x for x in candidates}
    tied = {fqn for group in budget.groups(by_name) for fqn in group}
    able, unable = [], []
    for block in statistics.unit_blocks:
        reasons = [
            f"{fqn}: {others.decided[fqn].reason if fqn in others.decided else 'not in the plan'}"
            for fqn in block.layers
            if fqn not in by_name
        ]
        reasons += [f"{fqn}: same_rank ties it to others" for fqn in block.layers if fqn in tied]
        # A depthwise convolution has no ranks to choose from, and is no candidate, but may follow its neighbours.
        reasons += [f"{fqn}: {others.left_out[fqn]}" for fqn in block.carriers if fqn in others.left_out]
        if options.narrow == "uniform" and block.rows:
            reasons.append("configs have no number for how many heads are left, which uniform widths are for")
        if reason := block.reason or "; ".join(reasons):
            unable.append(NarrowedBlock.of(block, reason))
        else:
            able.append(block)
    sites = {fqn: x.site for fqn, x in by_name.items()}
    with_ranks = not isinstance(budget.goal, MaxError)

    def look(block: UnitBlock) -> _Found | str:
        try:
            return _look(block, sites, statistics, _some_widths(block, options) if with_ranks else [])
        except FactorizationError as reason:
            return str(reason)

    workers = workers_for(by_name[block.consumer].site.module.weight for block in able)
    found = dealt(look, able, [float(block.units * block.columns) ** 3 for block in able], workers, "narrowing")
    pairs = list(zip(able, found, strict=True))
    unable += [NarrowedBlock.of(block, x) for block, x in pairs if isinstance(x, str)]
    return [_candidate(block, x, by_name, others, statistics) for block, x in pairs if not isinstance(x, str)], unable


@dataclass(frozen=True)
class _Found:
    """Of a block: by width the squared error, and at some widths the units that stay and by layer the squares of a
    candidate."""

    errors: tuple[float, ...]
    at: dict[int, tuple[Tensor, dict[str, Tensor]]]


def _look(block: UnitBlock, sites: dict[str, Site], statistics: LayerStatistics, widths: list[int]) -> _Found | str:
    """What can be told of a block, or why nothing; raises FactorizationError as its parts do."""
    columns = columns_of(statistics, sites[block.consumer])
    if columns is None:
        return "the calibration did not observe its units one by one"
    size = len(columns.data)
    order = eliminate(columns, units=block.columns_of(torch.arange(block.units), size))
    # Least squares on so many columns err more on other tokens than on those that they are of: of all-MiniLM-L6-v2 with
    # 3524 tokens the squared error held out is 2.5 and 1.9 times as large at keep 0.8 and 0.6, that of ranks 1.4 and
    # 1.35 times.
    columns_per_token = size // block.units / statistics.tokens(block.consumer)
    errors = tuple(e * (1 + width * columns_per_token) for width, e in enumerate(order.errors.tolist()))
    at = {}
    for width in widths:
        units = order.kept(width)
        narrower = Narrower(block, sites, statistics, units)
        spectra = Spectra(narrower.statistics)
        layers = [narrower.site(fqn, columns) for fqn in block.layers]
        at[width] = units.cpu(), {x.fqn: spectra.of(x, x.shape).square().cpu() for x in layers}
    return _Found(errors, at)


def _candidate(
    block: UnitBlock,
    found: _Found,
    by_name: dict[str, Candidate],
    others: Others,
    statistics: LayerStatistics,
) -> BlockCandidate:
    layers = tuple(by_name[fqn] for fqn in block.layers)
    carried = tuple(others.decided[fqn] for fqn in block.carriers if fqn in others.decided)
    made = BlockCandidate(block, layers, found.errors, carried=carried)
    for width, (units, squares) in found.at.items():
        narrower = Narrower(block, {x.site.fqn: x.site for x in layers}, statistics, units)
        made.narrower[width] = tuple(
            replace(x, draft=made.narrowed(x.draft, width), squares=squares[x.site.fqn], narrower=narrower)
            for x in layers
        )
    return made
