"""How a budget is spent: on the ranks, or the dense layers, that save most error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ..linalg import Allocation, Options, Shape, allocate, frontier
from ..model.survey import Site
from .budget import Budget, MaxError
from .costs import Cost, PricedLayer
from .options import PlanOptions, StaysDense, can_pivot, grouped, is_faster
from .plan import LayerPlan

_POINTS_OF_A_CURVE = 65
# Errors of T tokens add up to T times their mean square if they are independent and to T^2 times if they are all alike.
# It matters where layers see different numbers of tokens: Whisper tiny.en (1500 in the encoder, some 15 in the decoder)
# has a cross entropy of 5.30, 5.10, 2.22, 1.56 at keep 0.5 with exponents 0, 0.5, 1, 1.5.
_COHERENCE = 1.5


@dataclass(frozen=True)
class TradeOff:
    """What a budget could have bought and what it did: (share of the cost, share of the squared error of nothing)."""

    curve: tuple[tuple[float, float], ...] = ()
    spent: tuple[float, float] | None = None


@dataclass(frozen=True)
class Candidate:
    """A layer that the budget decides on; squares (G, m): what each of its directions adds to the squared error if it
    is cut."""

    site: Site
    draft: LayerPlan
    priced: PricedLayer
    squares: Tensor

    def tail(self, rank: int | None) -> float:
        """The squared error at a rank; 0 for a dense layer."""
        return 0.0 if rank is None else self.tails[min(rank // len(self.squares), len(self.tails) - 1)]

    @cached_property
    def tails(self) -> list[float]:
        """The squared error at ranks 0, 1, ... of every group."""
        return [*self.squares.sum(0).flip(0).cumsum(0).flip(0).clamp_min(0).tolist(), 0.0]

    def relative_error(self, rank: int | None) -> float:
        return math.sqrt(self.tail(rank) / self.tails[0]) if self.tails[0] else 0.0

    @property
    def weight(self) -> float:
        """What the errors of all tokens come to, of which `squares` are the mean."""
        return float(self.priced.tokens or 1) ** _COHERENCE


@dataclass(frozen=True)
class _Choice:
    """One rank for a layer, with the shape of the twin; None keeps it dense."""

    rank: int | None
    shape: Shape


@dataclass(frozen=True)
class Paid:
    """A layer whose rank others decided, paid from the same budget."""

    layer: LayerPlan
    priced: PricedLayer


@dataclass(frozen=True)
class Item:
    """Layers that the budget decides on together: what they can be, and the plan of each for the option chosen."""

    options: Options
    names: tuple[str, ...]
    decided: Callable[[int], list[LayerPlan]]


def spend(
    budget: Budget, candidates: list[Candidate], fixed: list[Paid], options: PlanOptions, weighted: bool
) -> tuple[list[LayerPlan], TradeOff]:
    """The candidates with ranks, and the trade-off that there was.

    weighted: errors of different layers add up; else every layer keeps the same share, which no measure of the weights
    alone has beaten.
    """
    if not candidates:
        return [], TradeOff()
    if isinstance(budget.goal, MaxError):
        return within(candidates, budget.goal.error, options), TradeOff()
    items = layer_items(budget, candidates, options, weighted)
    purse = Purse(budget.goal, candidates, fixed, weighted)
    bought = purse.buy(items)
    planned = [x for item, chosen in zip(items, bought.chosen, strict=True) for x in item.decided(chosen)]
    return planned, purse.trade_off(items, bought)


def layer_items(budget: Budget, candidates: list[Candidate], options: PlanOptions, weighted: bool) -> list[Item]:
    """What each layer, or those of one rank together, can be for the budget's cost."""
    choices = {x.site.fqn: _choices(x, options) for x in candidates}
    names = [x.site.fqn for x in candidates]
    groups = budget.groups(names)
    groups += [{fqn} for fqn in names if not any(fqn in group for group in groups)]
    tied = [[x for x in candidates if x.site.fqn in group] for group in groups]
    return [_item(layers, choices, budget.goal, weighted) for layers in tied]


class Purse:
    """What a budget has to spend on the candidates, after what others were given is paid."""

    def __init__(self, cost: Cost, candidates: list[Candidate], fixed: list[Paid], weighted: bool) -> None:
        dense = sum(cost.of(x.priced, None, x.draft.shape) for x in candidates)
        self.dense = dense + sum(cost.of(x.priced, None, x.layer.shape) for x in fixed)
        self.paid = sum(cost.of(x.priced, x.layer.rank, x.layer.shape) for x in fixed)
        self.left = cost.keep * self.dense - self.paid
        self.error = sum(_error_of_nothing(x, weighted) for x in candidates) or 1.0

    def buy(self, items: list[Item]) -> Allocation:
        """An option for each item; BudgetTooSmall where there is not enough for any."""
        return allocate([item.options for item in items], self.left)

    def trade_off(self, items: list[Item], bought: Allocation) -> TradeOff:
        """What these items could have been, and what they were."""
        curve = _thinned(frontier([item.options for item in items]))
        return TradeOff(tuple(map(self._share, curve)), self._share(bought))

    def _share(self, point: Allocation) -> tuple[float, float]:
        return (point.cost + self.paid) / self.dense, point.error / self.error


def within(candidates: list[Candidate], error: float, options: PlanOptions) -> list[LayerPlan]:
    """The layers at their smallest ranks of at most this error."""
    return [_within(x, _choices(x, options), error) for x in candidates]


def _choices(candidate: Candidate, options: PlanOptions) -> dict[int | None, _Choice]:
    """Every rank that the layer could have, by rank, and None, dense, where it may be or can be nothing else."""
    adapter, shape = candidate.site.adapter, candidate.draft.shape
    dense = {None: _Choice(None, shape)}
    choices: dict[int | None, _Choice] = dict(dense) if options.allow_dense else {}
    multiple = math.lcm(options.round_to or (8 if shape.max_rank >= 128 else 1), shape.groups)
    pivots = options.pivot is True or (
        options.pivot == "auto" and not candidate.site.module.training and not candidate.site.module.weight.is_cuda
    )
    largest = min(shape.max_rank, options.max_rank or math.inf)
    for rank in range(multiple, int(largest) + 1, multiple):
        if rank < (options.min_rank or 1):
            continue
        try:
            twin = grouped(rank, adapter, options)
        except StaysDense:
            continue
        # Below a certain rank the index costs more than the pivots save.
        pivoted = replace(twin, pivoted=pivots and can_pivot(twin, rank))
        if pivoted.low_rank_params(rank) + pivoted.index_size < twin.low_rank_params(rank):
            twin = pivoted
        grows = twin.low_rank_params(rank) + twin.index_size >= twin.dense_params
        if not grows and is_faster(rank, twin, adapter, options):
            choices[rank] = _Choice(rank, twin)
    return choices or dense


def _item(layers: list[Candidate], choices: dict[str, dict[int | None, _Choice]], cost: Cost, weighted: bool) -> Item:
    """Layers of one rank, with the ranks that all of them have."""
    own = [choices[x.site.fqn] for x in layers]
    common = [rank for rank in own[0] if all(rank in other for other in own)]
    totals, errors = [], []
    for rank in common:
        totals.append(sum(cost.of(x.priced, rank, c[rank].shape) for x, c in zip(layers, own, strict=True)))
        errors.append(sum(_error(x, c[rank], weighted) for x, c in zip(layers, own, strict=True)))

    def decided(chosen: int) -> list[LayerPlan]:
        return [_decided(x, c[common[chosen]]) for x, c in zip(layers, own, strict=True)]

    return Item(Options(totals, errors), tuple(x.site.fqn for x in layers), decided)


def _error(candidate: Candidate, choice: _Choice, weighted: bool) -> float:
    if weighted:
        return candidate.tail(choice.rank) * candidate.weight
    size = choice.shape.dense_params
    return 0.0 if choice.rank is None else size * (1 - choice.shape.low_rank_params(choice.rank) / size) ** 2


def _within(candidate: Candidate, choices: dict[int | None, _Choice], max_error: float) -> LayerPlan:
    """The layer at its smallest rank of at most this error; where it has none, dense, or at its largest rank."""
    ranks = [rank for rank in choices if rank is not None]
    within = [rank for rank in ranks if candidate.relative_error(rank) <= max_error]
    otherwise = None if None in choices else max(ranks)
    return _decided(candidate, choices[min(within, default=otherwise)])


def _decided(candidate: Candidate, choice: _Choice) -> LayerPlan:
    layer = replace(candidate.draft, spectrum=_relative_spectrum(candidate.squares))
    if choice.rank is None:
        return replace(layer, reason="the budget is better spent elsewhere")
    return replace(
        layer,
        rank=choice.rank,
        shape=choice.shape,
        error=candidate.relative_error(choice.rank),
        reason=f"chosen by the budget; break-even rank {choice.shape.break_even_rank}",
    )


def _relative_spectrum(squares: Tensor) -> tuple[float, ...]:
    """Singular values over the largest, at evenly spaced ranks from the first to the last."""
    values = squares.amax(0).clamp_min(0).sqrt()
    places = sorted({round(i * (len(values) - 1) / (_POINTS_OF_A_CURVE - 1)) for i in range(_POINTS_OF_A_CURVE)})
    return tuple(round((values[i] / values[0]).item(), 7) if values[0] > 0 else 0.0 for i in places)


def _error_of_nothing(candidate: Candidate, weighted: bool) -> float:
    return candidate.tails[0] * candidate.weight if weighted else candidate.draft.shape.dense_params


def _thinned(points: list[Allocation]) -> list[Allocation]:
    step = max(1, len(points) // _POINTS_OF_A_CURVE)
    return [*points[:-1:step], points[-1]]
