"""How a budget is spent where feed-forward blocks may lose hidden units: on ranks or widths, whichever saves more."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

from ..calibration.metric_source import LayerStatistics, columns_of
from ..linalg import Allocation, FactorizationError, Options, combined, eliminate
from ..model.feed_forward import FeedForward
from ..util.parallel import dealt, workers_for
from .budget import Budget, MaxError
from .costs import Cost, Latency
from .losses import Candidate
from .narrowed import NarrowedBlock, narrowed_shape
from .options import PlanOptions
from .plan import LayerPlan, narrowed_layer
from .spectra import Spectra
from .spending import MOST_ROUNDS, Item, Market, Paid, Purse, TradeOff, spend, within

_BY_BUDGET = "chosen by the budget"


@dataclass(frozen=True)
class BlockCandidate:
    """A feed-forward block that the budget may narrow: its layers as candidates for ranks, the consumer last, and by
    width the squared error of the consumer's outputs, for one token."""

    block: FeedForward
    layers: tuple[Candidate, ...]
    errors: tuple[float, ...]

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
        block = self.at(width, _BY_BUDGET)
        return [narrowed_layer(x.draft, block, _BY_BUDGET) for x in self.layers]


def width_options(block: BlockCandidate, cost: Cost, options: PlanOptions) -> dict[int, tuple[float, float]]:
    """What a block costs and loses at every width that it could have, its layers dense: width -> (cost, error), in the
    units of the costs and errors of ranks."""
    plan, found = NarrowedBlock.of(block.block), {}
    for width in _widths(plan.units, options):
        at = replace(plan, width=width)
        shapes = [narrowed_shape(at, x.site.fqn, x.draft.shape) for x in block.layers]
        price = sum(cost.of(x.priced, None, shape) for x, shape in zip(block.layers, shapes, strict=True))
        found[width] = price, block.errors[width] * block.consumer.weight
    return found


def _widths(units: int, options: PlanOptions) -> range:
    multiple = options.round_to or (8 if units >= 128 else 1)
    return range(multiple, units, multiple)


def require_narrowable(statistics: LayerStatistics | None, rule: object) -> None:
    """ValueError where `narrow` was asked for and cannot be done."""
    if not isinstance(rule, Budget):
        raise ValueError(
            "narrow: only a budget decides on the widths of blocks: give a Budget, or with data the share of weights "
            "to keep as a number"
        )
    if isinstance(rule.goal, Latency):
        raise ValueError("narrow: the table of keep_latency has no times of narrowed layers; use keep_flops")
    if statistics is None or not statistics.has_gradients:
        raise ValueError("narrow: what hidden units are worth is known only of data and a loss: give calibrate=data")
    if statistics.feed_forward is None:
        raise ValueError("narrow: this calibration did not look for blocks; make it with calibrate(..., narrow=True)")


def block_candidates(
    statistics: LayerStatistics, budget: Budget, candidates: list[Candidate], others: dict[str, LayerPlan]
) -> tuple[list[BlockCandidate], list[NarrowedBlock]]:
    """The blocks that the budget may narrow, and those that it may not, with the reasons.

    others: the layers that are no candidates, with the reasons.
    """
    by_name = {x.site.fqn: x for x in candidates}
    tied = {fqn for group in budget.groups(by_name) for fqn in group}
    able, unable = [], []
    for block in statistics.feed_forward:
        reasons = [
            f"{fqn}: {others[fqn].reason if fqn in others else 'not in the plan'}"
            for fqn in block.layers
            if fqn not in by_name
        ]
        reasons += [f"{fqn}: same_rank ties it to others" for fqn in block.layers if fqn in tied]
        if reason := block.reason or "; ".join(reasons):
            unable.append(NarrowedBlock.of(block, reason))
        else:
            able.append(block)

    def errors(block: FeedForward) -> tuple[float, ...] | str:
        try:
            columns = columns_of(statistics, by_name[block.consumer].site)
            if columns is None:
                return "the calibration did not observe its hidden units one by one"
            # Least squares on so many columns err more on other tokens than on those that they are of: of
            # all-MiniLM-L6-v2 with 3524 tokens the squared error held out is 2.5 and 1.9 times as large at keep 0.8 and
            # 0.6, that of ranks 1.4 and 1.35 times.
            tokens = statistics.tokens(block.consumer)
            return tuple(e * (1 + width / tokens) for width, e in enumerate(eliminate(columns).errors.tolist()))
        except FactorizationError as reason:
            return str(reason)

    workers = workers_for(by_name[block.consumer].site.module.weight for block in able)
    found = dealt(errors, able, [float(block.units) ** 3 for block in able], workers, "narrowing")
    pairs = list(zip(able, found, strict=True))
    unable += [NarrowedBlock.of(block, x) for block, x in pairs if isinstance(x, str)]
    return [
        BlockCandidate(block, tuple(by_name[fqn] for fqn in block.layers), x)
        for block, x in pairs
        if not isinstance(x, str)
    ], unable


def spend_on_blocks(
    budget: Budget,
    candidates: list[Candidate],
    fixed: list[Paid],
    options: PlanOptions,
    blocks: list[BlockCandidate],
    spectra: Spectra,
) -> tuple[list[LayerPlan], list[NarrowedBlock], TradeOff]:
    """As `spend`, with blocks that may be narrowed instead of getting ranks.

    Decided twice: first of each block whether it is narrowed, against the best that its layers could be together; then
    the widths and, of all other layers, every single rank.
    """
    if not candidates or not blocks:
        planned, trade_off = spend(budget, candidates, fixed, options, True, spectra)
        return planned, [], trade_off
    if isinstance(budget.goal, MaxError):
        return (*_within(candidates, blocks, budget.goal.error, options), TradeOff())
    market = Market(budget, candidates, options, True, spectra)
    purse, groups = Purse(market, fixed), _groups(blocks, options)
    for _ in range(MOST_ROUNDS):
        items, bought, tried = _bought(market, purse, groups, options)
        if not market.settle(items, bought):
            break
    planned = [x for item, chosen in zip(items, bought.chosen, strict=True) for x in item.decided(chosen)]
    by_name = {layer.fqn: layer for layer in planned}
    done = [_as_planned(block, by_name) for group in groups for block in group]
    return planned, done, purse.trade_off(tried, bought)


def _bought(
    market: Market, purse: Purse, groups: list[list[BlockCandidate]], options: PlanOptions
) -> tuple[list[Item], Allocation, list[Item]]:
    """The items that the budget was spent on, what was chosen of each, and all that it could have been spent on."""
    layers, widths = market.items(), [_width_item(group, market.cost, options) for group in groups]
    inside = {fqn for item in widths for fqn in item.names}
    free = [item for item in layers if inside.isdisjoint(item.names)]
    as_they_are = [combined([x.options for x in layers if x.names[0] in set(item.names)]) for item in widths]
    either = [
        replace(item, options=Options([*own.costs, *item.options.costs], [*own.errors, *item.options.errors]))
        for item, own in zip(widths, as_they_are, strict=True)
    ]
    first = purse.buy([*free, *either])
    narrowed = [chosen >= len(own.costs) for chosen, own in zip(first.chosen[len(free) :], as_they_are, strict=True)]
    narrower = [item for item, is_narrowed in zip(widths, narrowed, strict=True) if is_narrowed]
    inside = {fqn for item in narrower for fqn in item.names}
    items = [*(item for item in layers if inside.isdisjoint(item.names)), *narrower]
    return items, purse.buy(items), [*free, *either]


def _groups(blocks: list[BlockCandidate], options: PlanOptions) -> list[list[BlockCandidate]]:
    """The blocks that get one width: each alone, or all that have as many units, for which configs have one number."""
    if options.narrow != "uniform":
        return [[block] for block in blocks]
    alike: dict[int, list[BlockCandidate]] = defaultdict(list)
    for x in blocks:
        alike[x.block.units].append(x)
    return list(alike.values())


def _width_item(group: list[BlockCandidate], cost: Cost, options: PlanOptions) -> Item:
    """Blocks of one width."""
    each = [width_options(block, cost, options) for block in group]
    widths = list(each[0])
    totals = [[sum(found[width][i] for found in each) for width in widths] for i in (0, 1)]

    def decided(chosen: int) -> list[LayerPlan]:
        return [layer for block in group for layer in block.layers_at(widths[chosen])]

    return Item(
        Options(*totals), tuple(fqn for block in group for fqn in block.block.layers), decided, lambda chosen: []
    )


def _as_planned(block: BlockCandidate, layers: dict[str, LayerPlan]) -> NarrowedBlock:
    consumer = layers[block.block.consumer]
    if consumer.narrowed:
        return block.at(consumer.shape.in_features, _BY_BUDGET)
    return block.at(None, "its layers lose less with what else they cost")


def _within(
    candidates: list[Candidate], blocks: list[BlockCandidate], error: float, options: PlanOptions
) -> tuple[list[LayerPlan], list[NarrowedBlock]]:
    """Every layer at its smallest rank of at most this error, or every block at such a width if it stores less then."""
    planned = {layer.fqn: layer for layer in within(candidates, error, options)}
    for x in blocks:
        good = [width for width in _widths(x.block.units, options) if x.errors[width] <= error**2 * x.errors[0]]
        if not good:
            continue
        narrowed = x.layers_at(good[0])
        if sum(y.params_after for y in narrowed) < sum(planned[y.fqn].params_after for y in narrowed):
            planned |= {layer.fqn: layer for layer in narrowed}
    return list(planned.values()), [_as_planned(block, planned) for block in blocks]
