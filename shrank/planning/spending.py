"""How a budget is spent: on the ranks, or the dense layers, that save most error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
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


def spend(
    budget: Budget, candidates: list[Candidate], fixed: list[Paid], options: PlanOptions, weighted: bool
) -> tuple[list[LayerPlan], TradeOff]:
    """The candidates with ranks, and the trade-off that there was.

    weighted: errors of different layers add up; else every layer keeps the same share, which no measure of the weights
    alone has beaten.
    """
    if not candidates:
        return [], TradeOff()
    choices = {x.site.fqn: _choices(x, options) for x in candidates}
    if isinstance(budget.goal, MaxError):
        return [_within(x, choices[x.site.fqn], budget.goal.error) for x in candidates], TradeOff()
    cost: Cost = budget.goal
    items = [[x for x in candidates if x.site.fqn in names] for names in _tied(budget.same_rank, candidates)]
    problems = [_options(item, choices, cost, weighted) for item in items]
    dense = sum(cost.of(x.priced, None, x.draft.shape) for x in candidates)
    dense += sum(cost.of(x.priced, None, x.layer.shape) for x in fixed)
    paid = sum(cost.of(x.priced, x.layer.rank, x.layer.shape) for x in fixed)
    bought = allocate([part for part, _ in problems], cost.keep * dense - paid)
    planned = []
    for item, (_, common), chosen in zip(items, problems, bought.chosen, strict=True):
        planned += [_decided(x, choices[x.site.fqn][common[chosen]]) for x in item]
    whole = sum(_error_of_nothing(x, weighted) for x in candidates) or 1.0

    def share(point: Allocation) -> tuple[float, float]:
        return (point.cost + paid) / dense, point.error / whole

    curve = _thinned(frontier([part for part, _ in problems]))
    return planned, TradeOff(tuple(map(share, curve)), share(bought))


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


def _options(
    item: list[Candidate], choices: dict[str, dict[int | None, _Choice]], cost: Cost, weighted: bool
) -> tuple[Options, list[int | None]]:
    """What layers of one rank can be, with the ranks that all of them have."""
    own = [choices[x.site.fqn] for x in item]
    common = [rank for rank in own[0] if all(rank in other for other in own)]
    totals, errors = [], []
    for rank in common:
        totals.append(sum(cost.of(x.priced, rank, c[rank].shape) for x, c in zip(item, own, strict=True)))
        errors.append(sum(_error(x, c[rank], weighted) for x, c in zip(item, own, strict=True)))
    return Options(totals, errors), common


def _error(candidate: Candidate, choice: _Choice, weighted: bool) -> float:
    if weighted:
        return candidate.tail(choice.rank) * _weight(candidate)
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


def _tied(same_rank: Iterable[str | Iterable[str]], candidates: list[Candidate]) -> list[set[str]]:
    """Names of the layers of each item: those of one `same_rank` entry together, all others alone."""
    groups: list[set[str]] = []
    free = {x.site.fqn: None for x in candidates}
    for entry in same_rank:
        patterns = [entry] if isinstance(entry, str) else list(entry)
        members = {fqn for fqn in free if any(fnmatchcase(fqn, pattern) for pattern in patterns)}
        if not members:
            raise ValueError(f"same_rank: {', '.join(patterns)} matches no layer that the budget may change")
        groups.append(members)
        free = {fqn: None for fqn in free if fqn not in members}
    return groups + [{fqn} for fqn in free]


def _error_of_nothing(candidate: Candidate, weighted: bool) -> float:
    return candidate.tails[0] * _weight(candidate) if weighted else candidate.draft.shape.dense_params


def _weight(candidate: Candidate) -> float:
    """What the errors of all tokens of a layer come to, of which `squares` are the mean."""
    return worth(candidate.priced.tokens or 1)


def worth(tokens: int) -> float:
    """What the errors of so many tokens come to, over their mean."""
    return float(tokens) ** _COHERENCE


def _thinned(points: list[Allocation]) -> list[Allocation]:
    step = max(1, len(points) // _POINTS_OF_A_CURVE)
    return [*points[:-1:step], points[-1]]
