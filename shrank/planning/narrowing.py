"""How a budget is spent where blocks may lose units: on widths, ranks and bits, or some of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from ..linalg import Allocation, Options, combined
from .block_candidates import BlockCandidate, Others, block_candidates, width_options, widths
from .budget import Budget, MaxError
from .costs import Cost
from .losses import Candidate
from .narrowed import NarrowedBlock
from .options import PlanOptions
from .plan import LayerPlan
from .spectra import Spectra
from .spending import BY_BUDGET, MOST_ROUNDS, Item, Market, Paid, Purse, TradeOff, spend, within


def spend_on_blocks(
    budget: Budget,
    candidates: list[Candidate],
    fixed: list[Paid],
    others: Others,
    options: PlanOptions,
    spectra: Spectra,
) -> tuple[list[LayerPlan], list[NarrowedBlock], TradeOff]:
    """As `spend`, with blocks that may be narrowed.

    Decided twice: first of each block whether it is narrowed, and how far where its layers get ranks or few bits
    besides, by the best that its layers could be together; then the widths of blocks whose layers stay as they are, and
    every single rank.

    others: the layers that are no candidates.
    """
    blocks, unable = block_candidates(spectra.calibration, budget, candidates, others, options)
    if not candidates or not blocks:
        planned, trade_off = spend(budget, candidates, fixed, options, True, spectra)
        return planned, unable, trade_off
    if isinstance(budget.goal, MaxError):
        planned, done = _within(candidates, blocks, budget.goal.error, options)
        return planned, [*unable, *done], TradeOff()
    smaller = [x for block in blocks for layers in block.narrower.values() for x in layers]
    market = Market(budget, candidates, options, True, spectra, smaller)
    purse, groups = Purse(market, fixed), _groups(blocks, options)
    for _ in range(MOST_ROUNDS):
        items, bought, tried = _bought(market, purse, groups, options)
        if not market.settle(items, bought):
            break
    planned = [x for item, chosen in zip(items, bought.chosen, strict=True) for x in item.decided(chosen)]
    by_name = {layer.fqn: layer for layer in planned}
    done = [_as_planned(block, by_name) for group in groups for block in group]
    return planned, [*unable, *done], purse.trade_off(tried, bought)


def _bought(
    market: Market, purse: Purse, groups: list[list[BlockCandidate]], options: PlanOptions
) -> tuple[list[Item], Allocation, list[Item]]:
    """The items that the budget was spent on, what was chosen of each, and all that it could have been spent on."""
    layers = market.items()
    inside = {fqn for group in groups for x in group for fqn in x.block.layers}
    free = [item for item in layers if inside.isdisjoint(item.names)]
    ways = [list(_ways(market, group, layers, options)) for group in groups]
    either = [_any_of(each) for each in ways]
    first = purse.buy([*free, *either])
    items = list(free)
    for each, chosen in zip(ways, first.chosen[len(free) :], strict=True):
        items += _way_of(each, chosen)
    return items, purse.buy(items), [*free, *either]


# What a block, or several of one width, can be: the items that are then to be decided on, and all of them as one.
_Way = tuple[list[Item], Options]


def _ways(market: Market, group: list[BlockCandidate], layers: list[Item], options: PlanOptions) -> Iterator[_Way]:
    """As wide as they are; at any width, with layers as they are; and at some widths, with all forms of the layers."""
    width_item = _width_item(group, market.cost, options)
    own = [x for x in layers if x.names[0] in set(width_item.names)]
    yield own, combined([x.options for x in own])
    yield [width_item], width_item.options
    for width in group[0].narrower:
        items = []
        for block in group:
            *producers, consumer = market.items_of(block.narrower[width])
            more = consumer.with_more(block.errors[width] * block.consumer.weight)
            items += [*producers, more.with_layers(block.carried_at(width))]
        yield items, combined([x.options for x in items])


def _any_of(ways: list[_Way]) -> Item:
    """The ways as options of one item, in their order."""
    costs = [cost for _, found in ways for cost in found.costs]
    errors = [error for _, found in ways for error in found.errors]
    names = tuple(name for item in ways[0][0] for name in item.names)
    return Item(Options(costs, errors), names, lambda chosen: [], lambda chosen: [])


def _way_of(ways: list[_Way], chosen: int) -> list[Item]:
    """The items of the way that an option of `_any_of` is of."""
    for items, found in ways:
        if chosen < len(found.costs):
            return items
        chosen -= len(found.costs)
    raise IndexError(chosen)


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
        return block.at(consumer.shape.in_features // block.block.columns, BY_BUDGET)
    return block.at(None, "its layers lose less with what else they cost")


def _within(
    candidates: list[Candidate], blocks: list[BlockCandidate], error: float, options: PlanOptions
) -> tuple[list[LayerPlan], list[NarrowedBlock]]:
    """Every layer at its smallest rank of at most this error, or every block at such a width if it stores less then."""
    planned = {layer.fqn: layer for layer in within(candidates, error, options)}
    for x in blocks:
        good = [width for width in widths(x.block, options) if x.errors[width] <= error**2 * x.errors[0]]
        if not good:
            continue
        narrowed = x.layers_at(good[0])
        own = [y for y in narrowed if y.fqn in planned]
        if sum(y.params_after for y in own) < sum(planned[y.fqn].params_after for y in own):
            planned |= {layer.fqn: layer for layer in narrowed}
    return list(planned.values()), [_as_planned(block, planned) for block in blocks]
