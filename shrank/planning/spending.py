"""How a budget is spent: on the ranks, the bits or the dense layers that save most error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor

from ..linalg import Allocation, Options, allocate, frontier
from .budget import Budget, MaxError
from .costs import Bytes, Cost, PricedLayer
from .forms import Form, Key, forms
from .losses import Candidate, Losses
from .options import PlanOptions
from .plan import LayerPlan
from .spectra import Spectra

_POINTS_OF_A_CURVE = 65
_MOST_ROUNDS = 8  # of spending, each with what the last one chose measured


@dataclass(frozen=True)
class TradeOff:
    """What a budget could have bought and what it did: (share of the cost, share of the squared error of nothing)."""

    curve: tuple[tuple[float, float], ...] = ()
    spent: tuple[float, float] | None = None


@dataclass(frozen=True)
class Paid:
    """A layer whose rank others decided, paid from the same budget."""

    layer: LayerPlan
    priced: PricedLayer


def spend(
    budget: Budget,
    candidates: list[Candidate],
    fixed: list[Paid],
    options: PlanOptions,
    weighted: bool,
    spectra: Spectra,
) -> tuple[list[LayerPlan], TradeOff]:
    """The candidates with ranks and bits, and the trade-off that there was.

    weighted: the squared errors of different layers add up.
    """
    if not candidates:
        return [], TradeOff()
    cost = None if isinstance(budget.goal, MaxError) else budget.goal
    grids = cost.grids if isinstance(cost, Bytes) else None
    choices = {x.site.fqn: forms(x.site, x.draft.shape, options, grids) for x in candidates}
    if cost is None:
        return [_within(x, choices[x.site.fqn], budget.goal.error) for x in candidates], TradeOff()
    losses = Losses(candidates, choices, cost, weighted, spectra)
    items = [[x for x in candidates if x.site.fqn in names] for names in _tied(budget.same_rank, candidates)]
    dense = sum(cost.of(x.priced, None, x.draft.shape) for x in candidates)
    dense += sum(cost.of(x.priced, None, x.layer.shape) for x in fixed)
    paid = sum(cost.of(x.priced, x.layer.rank, x.layer.shape, x.layer.storage) for x in fixed)
    for _ in range(_MOST_ROUNDS):
        problems = [_options(item, choices, cost, losses) for item in items]
        bought = allocate([part for part, _ in problems], cost.keep * dense - paid)
        chosen = [
            (x, choices[x.site.fqn][common[number]])
            for item, (_, common), number in zip(items, problems, bought.chosen, strict=True)
            for x in item
        ]
        if not losses.settle(chosen):
            break
    planned = [_decided(x, form, losses.squared(x, form)) for x, form in chosen]
    whole = sum(losses.of_nothing(x) for x in candidates) or 1.0

    def share(point: Allocation) -> tuple[float, float]:
        return (point.cost + paid) / dense, point.error / whole

    curve = _thinned(frontier([part for part, _ in problems]))
    return planned, TradeOff(tuple(map(share, curve)), share(bought))


def _options(
    item: list[Candidate], choices: dict[str, dict[Key, Form]], cost: Cost, losses: Losses
) -> tuple[Options, list[Key]]:
    """What layers of one rank can be, with the forms that all of them have."""
    own = [choices[x.site.fqn] for x in item]
    common = [key for key in own[0] if all(key in other for other in own)]
    totals, errors = [], []
    for key in common:
        of_all = [(x, c[key]) for x, c in zip(item, own, strict=True)]
        totals.append(sum(cost.of(x.priced, form.rank, form.shape, form.storage) for x, form in of_all))
        errors.append(sum(losses.of(x, form) for x, form in of_all))
    return Options(totals, errors), common


def _within(candidate: Candidate, choices: dict[Key, Form], max_error: float) -> LayerPlan:
    """The layer at its smallest rank of at most this error; where it has none, dense, or at its largest rank."""
    low_rank = [form for form in choices.values() if form.rank is not None]
    within = [form for form in low_rank if candidate.relative(candidate.tail(form.rank)) <= max_error]
    dense = [form for form in choices.values() if form.rank is None]
    chosen = min(within, key=lambda form: form.rank) if within else (dense or low_rank[-1:])[0]
    return _decided(candidate, chosen, candidate.tail(chosen.rank))


def _decided(candidate: Candidate, form: Form, squared: float) -> LayerPlan:
    layer = replace(candidate.draft, spectrum=_relative_spectrum(candidate.squares))
    if form.rank is None and form.storage.grid is None:
        return replace(layer, reason="the budget is better spent elsewhere")
    break_even = "" if form.rank is None else f"; break-even rank {form.shape.break_even_rank}"
    return replace(
        layer,
        rank=form.rank,
        shape=form.shape,
        storage=form.storage,
        error=candidate.relative(squared),
        reason=f"chosen by the budget{break_even}",
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


def _thinned(points: list[Allocation]) -> list[Allocation]:
    step = max(1, len(points) // _POINTS_OF_A_CURVE)
    return [*points[:-1:step], points[-1]]
