"""How a budget is spent where blocks may lose units: on ranks or widths, whichever saves more."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.metric_source import LayerStatistics, columns_of
from ..linalg import Allocation, Columns, FactorizationError, Options, combined, eliminate
from ..model.feed_forward import FeedForward, OfUnits
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
    """A block that the budget may narrow: its layers as candidates for ranks, the consumer last, and by width the
    squared error of the consumer's outputs, for one token. carried: the layers between them, which follow its width."""

    block: FeedForward
    layers: tuple[Candidate, ...]
    errors: tuple[float, ...]
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
        block = self.at(width, _BY_BUDGET)
        drafts = [*(x.draft for x in self.layers), *self.carried]
        return [narrowed_layer(draft, block, _BY_BUDGET) for draft in drafts]


def width_options(block: BlockCandidate, cost: Cost, options: PlanOptions) -> dict[int, tuple[float, float]]:
    """What a block costs and loses at every width that it could have, its layers dense: width -> (cost, error), in the
    units of the costs and errors of ranks."""
    plan, found = NarrowedBlock.of(block.block), {}
    for width in _widths(plan, options):
        at = replace(plan, width=width)
        shapes = [narrowed_shape(at, x.site.fqn, x.draft.shape) for x in block.layers]
        price = sum(cost.of(x.priced, None, shape) for x, shape in zip(block.layers, shapes, strict=True))
        found[width] = price, block.errors[width] * block.consumer.weight
    return found


def _widths(block: OfUnits, options: PlanOptions) -> range:
    """Those at which every layer has round sizes."""
    multiple = options.round_to or (8 if block.units >= 128 else 1)
    multiple //= math.gcd(multiple, *block.rows) if block.rows else 1
    return range(multiple, block.units, multiple)


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
        raise ValueError("narrow: what units are worth is known only of data and a loss: give calibrate=data")
    if statistics.feed_forward is None:
        raise ValueError("narrow: this calibration did not look for blocks; make it with calibrate(..., narrow=True)")


def block_candidates(
    statistics: LayerStatistics,
    budget: Budget,
    candidates: list[Candidate],
    others: dict[str, LayerPlan],
    options: PlanOptions,
    left_out: Mapping[str, str],
) -> tuple[list[BlockCandidate], list[NarrowedBlock]]:
    """The blocks that the budget may narrow, and those that it may not, with the reasons.

    others: the layers that are no candidates, with the reasons. left_out: layers that the options leave out, with the
    reasons.
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
        # A depthwise convolution has no ranks to choose from, and is no candidate, but may follow its neighbours.
        reasons += [f"{fqn}: {left_out[fqn]}" for fqn in block.carriers if fqn in left_out]
        if options.narrow == "uniform" and block.rows:
            reasons.append("configs have no number for how many heads are left, which uniform widths are for")
        if reason := block.reason or "; ".join(reasons):
            unable.append(NarrowedBlock.of(block, reason))
        else:
            able.append(block)

    def errors(block: FeedForward) -> tuple[float, ...] | str:
        try:
            columns = columns_of(statistics, by_name[block.consumer].site)
            if columns is None:
                return "the calibration did not observe its units one by one"
            # Least squares on so many columns err more on other tokens than on those that they are of: of
            # all-MiniLM-L6-v2 with 3524 tokens the squared error held out is 2.5 and 1.9 times as large at keep 0.8 and
            # 0.6, that of ranks 1.4 and 1.35 times.
            tokens, fitted = statistics.tokens(block.consumer), len(columns.data) // block.units
            found = eliminate(columns, units=unit_columns(block, columns)).errors.tolist()
            return tuple(e * (1 + width * fitted / tokens) for width, e in enumerate(found))
        except FactorizationError as reason:
            return str(reason)

    workers = workers_for(by_name[block.consumer].site.module.weight for block in able)
    found = dealt(errors, able, [float(block.units * block.columns) ** 3 for block in able], workers, "narrowing")
    pairs = list(zip(able, found, strict=True))
    unable += [NarrowedBlock.of(block, x) for block, x in pairs if isinstance(x, str)]
    return [
        BlockCandidate(
            block,
            tuple(by_name[fqn] for fqn in block.layers),
            x,
            tuple(others[fqn] for fqn in block.carriers if fqn in others),
        )
        for block, x in pairs
        if not isinstance(x, str)
    ], unable


def unit_columns(block: OfUnits, columns: Columns) -> Tensor:
    """Which columns of the norm of its consumer are of which unit (units, columns of each)."""
    return block.columns_of(torch.arange(block.units), len(columns.data))


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
        return block.at(consumer.shape.in_features // block.block.columns, _BY_BUDGET)
    return block.at(None, "its layers lose less with what else they cost")


def _within(
    candidates: list[Candidate], blocks: list[BlockCandidate], error: float, options: PlanOptions
) -> tuple[list[LayerPlan], list[NarrowedBlock]]:
    """Every layer at its smallest rank of at most this error, or every block at such a width if it stores less then."""
    planned = {layer.fqn: layer for layer in within(candidates, error, options)}
    for x in blocks:
        good = [width for width in _widths(x.block, options) if x.errors[width] <= error**2 * x.errors[0]]
        if not good:
            continue
        narrowed = x.layers_at(good[0])
        own = [y for y in narrowed if y.fqn in planned]
        if sum(y.params_after for y in own) < sum(planned[y.fqn].params_after for y in own):
            planned |= {layer.fqn: layer for layer in narrowed}
    return list(planned.values()), [_as_planned(block, planned) for block in blocks]
