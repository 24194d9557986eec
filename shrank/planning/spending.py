"""How a budget is spent: on the ranks, the bits or the dense layers that save most error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..linalg import Allocation, Options, allocate, frontier
from .budget import Budget, MaxError
from .costs import Cost, PricedLayer
from .forms import Form, Key, forms
from .losses import Candidate, Losses
from .options import PlanOptions, may_pivot
from .plan import LayerPlan
from .spectra import Spectra

_POINTS_OF_A_CURVE = 65
BY_BUDGET = "chosen by the budget"
MOST_ROUNDS = 8  # of spending, each with what the last one chose measured


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


@dataclass(frozen=True)
class Item:
    """Layers that the budget decides on together: what they can be; the plan of each, and its form, for the option
    chosen."""

    options: Options
    names: tuple[str, ...]
    decided: Callable[[int], list[LayerPlan]]
    forms: Callable[[int], list[tuple[Candidate, Form]]]

    def with_more(self, error: float) -> Item:
        """With an error that comes to that of every option."""
        more = Options(self.options.costs, [each + error for each in self.options.errors])
        return replace(self, options=more)

    def with_layers(self, layers: list[LayerPlan]) -> Item:
        """With layers that are decided with it, whatever it becomes."""
        return replace(self, decided=lambda chosen: [*self.decided(chosen), *layers])


class Market:
    """What a budget may buy for some layers, and what that costs and loses.

    Args:
        budget: By weights, bytes, arithmetic or time.
        candidates: The layers.
        options: What they may become.
        weighted: The squared errors of different layers add up.
        spectra: Who knows what the layers see.
        others: What some of the layers may be instead.
    """

    def __init__(
        self,
        budget: Budget,
        candidates: list[Candidate],
        options: PlanOptions,
        weighted: bool,
        spectra: Spectra,
        others: Sequence[Candidate] = (),
    ) -> None:
        self.budget, self.cost, self.candidates = budget, budget.goal, candidates
        every = [*candidates, *others]
        self._choices = {x.key: _forms(x, options, self.cost) for x in every}
        self.losses = Losses(every, self._choices, self.cost, weighted, spectra)

    def items(self) -> list[Item]:
        """What each layer, or those of one rank together, can be, by what is known now."""
        names = [x.site.fqn for x in self.candidates]
        groups = self.budget.groups(names)
        groups += [{fqn} for fqn in names if not any(fqn in group for group in groups)]
        tied = [[x for x in self.candidates if x.site.fqn in group] for group in groups]
        return [self._item(layers) for layers in tied]

    def items_of(self, candidates: Iterable[Candidate]) -> list[Item]:
        """What each of these alone can be."""
        return [self._item([x]) for x in candidates]

    def settle(self, items: Iterable[Item], bought: Allocation) -> bool:
        """Measure what was bought, as far as it was not; whether there was anything to measure."""
        pairs = zip(items, bought.chosen, strict=True)
        return self.losses.settle(form for item, chosen in pairs for form in item.forms(chosen))

    def _item(self, layers: list[Candidate]) -> Item:
        """Layers of one rank, with the forms that all of them have."""
        own = [self._choices[x.key] for x in layers]
        common = [key for key in own[0] if all(key in other for other in own)]
        totals, errors = [], []
        for key in common:
            of_all = [(x, choices[key]) for x, choices in zip(layers, own, strict=True)]
            totals.append(sum(self.cost.of(x.priced, form.rank, form.shape, form.storage) for x, form in of_all))
            errors.append(sum(self.losses.of(x, form) for x, form in of_all))

        def chosen_forms(chosen: int) -> list[tuple[Candidate, Form]]:
            return [(x, choices[common[chosen]]) for x, choices in zip(layers, own, strict=True)]

        def decided(chosen: int) -> list[LayerPlan]:
            return [_decided(x, form, self.losses.squared(x, form)) for x, form in chosen_forms(chosen)]

        return Item(Options(totals, errors), tuple(x.site.fqn for x in layers), decided, chosen_forms)


class Purse:
    """What a budget has to spend on the candidates of a market, after what others were given is paid."""

    def __init__(self, market: Market, fixed: list[Paid]) -> None:
        cost, candidates = market.cost, market.candidates
        dense = sum(cost.of(x.priced, None, x.draft.shape) for x in candidates)
        self.dense = dense + sum(cost.of(x.priced, None, x.layer.shape) for x in fixed)
        self.paid = sum(cost.of(x.priced, x.layer.rank, x.layer.shape, x.layer.storage) for x in fixed)
        self.left = cost.keep * self.dense - self.paid
        self.error = sum(market.losses.of_nothing(x) for x in candidates) or 1.0

    def buy(self, items: list[Item]) -> Allocation:
        """An option for each item; BudgetTooSmall where there is not enough for any."""
        return allocate([item.options for item in items], self.left)

    def trade_off(self, items: list[Item], bought: Allocation) -> TradeOff:
        """What these items could have been, and what they were."""
        curve = _thinned(frontier([item.options for item in items]))
        return TradeOff(tuple(map(self._share, curve)), self._share(bought))

    def _share(self, point: Allocation) -> tuple[float, float]:
        return (point.cost + self.paid) / self.dense, point.error / self.error


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
    if isinstance(budget.goal, MaxError):
        return within(candidates, budget.goal.error, options), TradeOff()
    market = Market(budget, candidates, options, weighted, spectra)
    purse = Purse(market, fixed)
    for _ in range(MOST_ROUNDS):
        items = market.items()
        bought = purse.buy(items)
        if not market.settle(items, bought):
            break
    planned = [x for item, chosen in zip(items, bought.chosen, strict=True) for x in item.decided(chosen)]
    return planned, purse.trade_off(items, bought)


def within(candidates: list[Candidate], error: float, options: PlanOptions) -> list[LayerPlan]:
    """The layers at their smallest ranks of at most this error."""
    return [_within(x, _forms(x, options, None), error) for x in candidates]


def _forms(x: Candidate, options: PlanOptions, cost: Cost | None) -> dict[Key, Form]:
    return forms(x.priced, x.adapter, x.draft.shape, options, cost, may_pivot(x.site.module, options))


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
        return layer if layer.narrowed else replace(layer, reason="the budget is better spent elsewhere")
    why = layer.reason if layer.narrowed else BY_BUDGET
    break_even = "" if form.rank is None else f"; break-even rank {form.shape.break_even_rank}"
    return replace(
        layer,
        rank=form.rank,
        shape=form.shape,
        storage=form.storage,
        error=candidate.relative(squared),
        reason=why + break_even,
    )


def _relative_spectrum(squares: Tensor) -> tuple[float, ...]:
    """Singular values over the largest, at evenly spaced ranks from the first to the last."""
    values = squares.amax(0).clamp_min(0).sqrt()
    places = sorted({round(i * (len(values) - 1) / (_POINTS_OF_A_CURVE - 1)) for i in range(_POINTS_OF_A_CURVE)})
    return tuple(round((values[i] / values[0]).item(), 7) if values[0] > 0 else 0.0 for i in places)


def _thinned(points: list[Allocation]) -> list[Allocation]:
    step = max(1, len(points) // _POINTS_OF_A_CURVE)
    return [*points[:-1:step], points[-1]]
