"""A budget for all layers together, and how it is spent: on the ranks, or the dense layers, that save most error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property

from torch import Tensor, nn

from ..linalg import Allocation, Options, Shape, allocate, frontier
from ..model.adapters import target
from ..model.surgery import Site
from .latency import LatencyTable
from .options import PlanOptions, StaysDense, can_pivot, grouped, is_faster
from .plan import LayerPlan
from .rank import RankRule, as_rule

_TARGETS = ("keep_params", "keep_flops", "keep_latency", "max_error", "eval_fn")
_POINTS_OF_A_CURVE = 65
# Errors of T tokens add up to T times their mean square if they are independent and to T^2 times if they are all alike.
# It matters where layers see different numbers of tokens: Whisper tiny.en (1500 in the encoder, some 15 in the decoder)
# has a cross entropy of 5.30, 5.10, 2.22, 1.56 at keep 0.5 with exponents 0, 0.5, 1, 1.5.
_COHERENCE = 1.5


@dataclass(frozen=True)
class Budget:
    """What all eligible layers may cost together, or how far the model may suffer; exactly one of the first five.

    keep_params, keep_flops: share of the eligible layers' weights, or of their arithmetic on the calibration data, in
    (0, 1). keep_latency: share of their time in `table`, which `shrank bench --layers` measures. max_error: the largest
    relative error of any layer. eval_fn: from a model to a number, larger is better; the smallest model is sought that
    loses at most `tolerated_drop` of it. overrides: glob patterns -> rank rules (None: dense) for layers that the
    budget pays but does not choose. same_rank: glob patterns, or lists of them; the layers that match one get one rank.
    """

    keep_params: float | None = None
    keep_flops: float | None = None
    keep_latency: float | None = None
    max_error: float | None = None
    eval_fn: Callable[[nn.Module], float] | None = None
    tolerated_drop: float = 0.0
    table: LatencyTable | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    same_rank: Iterable[str | Iterable[str]] = ()

    def __post_init__(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give a budget exactly one of {', '.join(_TARGETS)}; got {', '.join(given) or 'none'}")
        for name in _TARGETS[:-1]:
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}")
        if (self.keep_latency is None) != (self.table is None):
            raise ValueError("keep_latency and table go together")

    def rule_for(self, fqn: str) -> RankRule | None:
        """The rule of the first override that matches."""
        for pattern, rule in self.overrides.items():
            if fnmatchcase(fqn, pattern):
                return as_rule(rule) if rule is not None else _keep_dense
        return None


def _keep_dense(layer: object) -> None:
    return None


@dataclass(frozen=True)
class TradeOff:
    """What a budget could have bought and what it did: (share of the cost, share of the squared error of nothing)."""

    curve: tuple[tuple[float, float], ...] = ()
    spent: tuple[float, float] | None = None


@dataclass(frozen=True)
class Candidate:
    """A layer that the budget decides on: its tokens in the calibration, and what each of its directions adds to the
    squared error if it is cut, (G, m)."""

    site: Site
    draft: LayerPlan
    tokens: int | None
    squares: Tensor | None = None

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


def spend(budget: Budget, candidates: list[Candidate], fixed: list[LayerPlan], options: PlanOptions,
          weighed: bool) -> tuple[list[LayerPlan], TradeOff]:
    """The candidates with ranks, and the trade-off that there was.

    fixed: layers whose ranks others decided, paid from the same budget. weighed: errors of different layers add up;
    else every layer keeps the same share, which no measure of its own beats (README, what each step buys).
    """
    if not candidates:
        return [], TradeOff()
    choices = {x.site.fqn: _choices(x, budget, options) for x in candidates}
    if budget.max_error is not None:
        return [_within(x, choices[x.site.fqn], budget.max_error) for x in candidates], TradeOff()
    items = [[x for x in candidates if x.site.fqn in names] for names in _tied(budget, candidates)]
    costs = _Costs(budget, {x.site.fqn: x.tokens for x in candidates})
    problems = [_options(item, choices, costs, weighed) for item in items]
    dense = sum(costs.of(x, None, x.shape) for x in (*(x.draft for x in candidates), *fixed))
    paid = sum(costs.of(x, x.rank, x.shape) for x in fixed)
    keep = budget.keep_params or budget.keep_flops or budget.keep_latency
    found = allocate([options for options, _ in problems], keep * dense - paid)
    planned = []
    for item, (_, common), chosen in zip(items, problems, found.chosen, strict=True):
        planned += [_decided(x, choices[x.site.fqn][common[chosen]]) for x in item]
    whole = sum(_error_of_nothing(x, weighed) for x in candidates)
    points = _thinned(frontier([options for options, _ in problems]))
    curve, spent = ([((p.cost + paid) / dense, p.error / (whole or 1.0)) for p in part] for part in (points, [found]))
    return planned, TradeOff(tuple(curve), spent[0])


@dataclass(frozen=True)
class _Costs:
    """What a layer costs in the unit of the budget."""

    budget: Budget
    tokens: Mapping[str, int | None]

    def of(self, layer: LayerPlan, rank: int | None, shape: Shape) -> float:
        if self.budget.keep_latency is not None:
            return self.budget.table.seconds(layer.fqn, rank, shape.pivoted)
        if self.budget.keep_flops is None:
            return shape.params(rank) + (shape.index_size if rank is not None else 0)
        tokens = self.tokens.get(layer.fqn)
        if tokens is None and layer.kind.startswith("Conv") and layer.kind != "Conv1D":
            raise ValueError(f"{layer.fqn}: keep_flops needs a calibration, which tells how often a kernel is applied")
        return shape.flops(rank) * (tokens or 1)


def _choices(candidate: Candidate, budget: Budget, options: PlanOptions) -> dict[int | None, _Choice]:
    """Every rank that the layer could have, by rank, and dense."""
    found, shape = target(candidate.site.module), candidate.draft.shape
    choices: dict[int | None, _Choice] = {None: _Choice(None, shape)}
    multiple = math.lcm(options.round_to or (8 if shape.max_rank >= 128 else 1), shape.groups)
    pivots = options.pivot is True or (options.pivot == "auto" and not candidate.site.module.training
                                       and not candidate.site.module.weight.is_cuda)
    largest = min(shape.max_rank, options.max_rank or math.inf)
    for rank in range(multiple, int(largest) + 1, multiple):
        if rank < (options.min_rank or 1):
            continue
        try:
            twin = grouped(rank, found, options)
        except StaysDense:
            continue
        # Below a certain rank the index costs more than the pivots save.
        pivoted = replace(twin, pivoted=pivots and can_pivot(twin, rank))
        if pivoted.low_rank_params(rank) + pivoted.index_size < twin.low_rank_params(rank):
            twin = pivoted
        grows = twin.low_rank_params(rank) + twin.index_size >= twin.dense_params
        if not grows and is_faster(rank, twin, found, options):
            choices[rank] = _Choice(rank, twin)
    return choices


def _options(item: list[Candidate], choices: dict[str, dict[int | None, _Choice]], costs: _Costs,
             weighed: bool) -> tuple[Options, list[int | None]]:
    """What layers of one rank can be, with the ranks that all of them have."""
    own = [choices[x.site.fqn] for x in item]
    common = [rank for rank in own[0] if all(rank in other for other in own)]
    totals, errors = [], []
    for rank in common:
        totals.append(sum(costs.of(x.draft, rank, c[rank].shape) for x, c in zip(item, own, strict=True)))
        errors.append(sum(_error(x, c[rank], weighed) for x, c in zip(item, own, strict=True)))
    return Options(totals, errors), common


def _error(candidate: Candidate, choice: _Choice, weighed: bool) -> float:
    if weighed:
        return candidate.tail(choice.rank) * _weight(candidate)
    size = choice.shape.dense_params
    return 0.0 if choice.rank is None else size * (1 - choice.shape.low_rank_params(choice.rank) / size) ** 2


def _within(candidate: Candidate, choices: dict[int | None, _Choice], max_error: float) -> LayerPlan:
    """The layer at its smallest rank of at most this error."""
    ranks = [rank for rank in choices if rank is not None and candidate.relative_error(rank) <= max_error]
    return _decided(candidate, choices[min(ranks, default=None)])


def _decided(candidate: Candidate, choice: _Choice) -> LayerPlan:
    layer = replace(candidate.draft, spectrum=_relative_spectrum(candidate.squares))
    if choice.rank is None:
        return replace(layer, reason="the budget is better spent elsewhere")
    return replace(layer, rank=choice.rank, shape=choice.shape, error=candidate.relative_error(choice.rank),
                   reason=f"chosen by the budget; break-even rank {choice.shape.break_even_rank}")


def _relative_spectrum(squares: Tensor) -> tuple[float, ...]:
    """Singular values over the largest, at evenly spaced ranks from the first to the last."""
    values = squares.amax(0).clamp_min(0).sqrt()
    places = sorted({round(i * (len(values) - 1) / (_POINTS_OF_A_CURVE - 1)) for i in range(_POINTS_OF_A_CURVE)})
    return tuple(round((values[i] / values[0]).item(), 7) if values[0] > 0 else 0.0 for i in places)


def _tied(budget: Budget, candidates: list[Candidate]) -> list[set[str]]:
    """Names of the layers of each item: those of one `same_rank` entry together, all others alone."""
    groups: list[set[str]] = []
    free = {x.site.fqn: None for x in candidates}
    for entry in budget.same_rank:
        patterns = [entry] if isinstance(entry, str) else list(entry)
        members = {fqn for fqn in free if any(fnmatchcase(fqn, pattern) for pattern in patterns)}
        if not members:
            raise ValueError(f"same_rank: {', '.join(patterns)} matches no layer that the budget may change")
        groups.append(members)
        free = {fqn: None for fqn in free if fqn not in members}
    return groups + [{fqn} for fqn in free]


def _error_of_nothing(candidate: Candidate, weighed: bool) -> float:
    return candidate.tails[0] * _weight(candidate) if weighed else candidate.draft.shape.dense_params


def _weight(candidate: Candidate) -> float:
    """What the errors of all tokens of a layer come to, of which `squares` are the mean."""
    return float(candidate.tokens or 1) ** _COHERENCE


def _thinned(points: list[Allocation]) -> list[Allocation]:
    step = max(1, len(points) // _POINTS_OF_A_CURVE)
    return [*points[:-1:step], points[-1]]
