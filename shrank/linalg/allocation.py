"""One option for every item, of least total error within a budget: a multiple-choice knapsack.

Each item's options on the lower convex hull of (cost, error) are taken in the order of error saved per cost, which is
optimal for the relaxed problem (Sinha and Zoltners, 1979); the total then exceeds the optimum by less than the one step
that no longer fitted saves, and what remains of the budget buys whatever single changes still help.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


class BudgetTooSmall(ValueError):
    """No choice is as cheap as the budget."""


@dataclass(frozen=True)
class Options:
    """What an item can be: costs and errors, option by option, in any order."""

    costs: Sequence[float]
    errors: Sequence[float]


@dataclass(frozen=True)
class Allocation:
    """The option taken for every item, and the totals."""

    chosen: tuple[int, ...]
    cost: float
    error: float


def allocate(items: Sequence[Options], budget: float) -> Allocation:
    """Options whose costs add up to at most `budget`; BudgetTooSmall, with the least cost there is, if none do."""
    hulls = [_hull(item) for item in items]
    chosen = [hull[0] for hull in hulls]
    cost = sum(item.costs[i] for item, i in zip(items, chosen, strict=True))
    if cost > budget:
        raise BudgetTooSmall(f"a budget of {budget:g} was given, and the least possible is {cost:g}")
    for _, number, to in sorted(_steps(items, hulls), key=lambda step: (-step[0], step[1])):
        extra = items[number].costs[to] - items[number].costs[chosen[number]]
        if cost + extra > budget:
            break  # the next ones save less for what they cost
        chosen[number], cost = to, cost + extra
    _spend(items, chosen, budget - cost)
    return _totals(items, chosen)


def frontier(items: Sequence[Options]) -> list[Allocation]:
    """The allocations at which the relaxed problem turns, from the cheapest to the one of least error."""
    hulls = [_hull(item) for item in items]
    chosen = [hull[0] for hull in hulls]
    found = [_totals(items, chosen)]
    for _, number, to in sorted(_steps(items, hulls), key=lambda step: (-step[0], step[1])):
        before, last = chosen[number], found[-1]
        chosen[number] = to
        item = items[number]
        # Rounding of the running sum must not take it below zero.
        error = max(0.0, last.error + item.errors[to] - item.errors[before])
        found.append(Allocation((), last.cost + item.costs[to] - item.costs[before], error))
    return found


def combined(items: Sequence[Options]) -> Options:
    """Items as one: of everything that they can be together, what is worth considering at any budget."""
    found = frontier(items)
    return Options([each.cost for each in found], [each.error for each in found])


def _totals(items: Sequence[Options], chosen: Sequence[int]) -> Allocation:
    pairs = list(zip(items, chosen, strict=True))
    return Allocation(tuple(chosen), sum(x.costs[i] for x, i in pairs), sum(x.errors[i] for x, i in pairs))


def _hull(item: Options) -> list[int]:
    """The options on the lower convex hull, from the cheapest to the one of least error."""
    order = sorted(range(len(item.costs)), key=lambda i: (item.costs[i], item.errors[i]))
    hull: list[int] = []
    for i in order:
        if hull and item.errors[i] >= item.errors[hull[-1]]:
            continue  # it costs more and is no better
        while len(hull) >= 2 and _slope(item, hull[-2], hull[-1]) <= _slope(item, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _steps(items: Sequence[Options], hulls: Sequence[list[int]]) -> Iterator[tuple[float, int, int]]:
    """(error saved per cost, item, option reached) for every edge of every hull."""
    for number, (item, hull) in enumerate(zip(items, hulls, strict=True)):
        for here, there in pairwise(hull):
            yield _slope(item, here, there), number, there


def _slope(item: Options, here: int, there: int) -> float:
    return (item.errors[here] - item.errors[there]) / (item.costs[there] - item.costs[here])


def _spend(items: Sequence[Options], chosen: list[int], left: float) -> None:
    """Change one item at a time to the option, on the hull or not, that saves most error for what is left."""
    while True:
        best = (0.0, None, None)
        for number, item in enumerate(items):
            cost, error = item.costs[chosen[number]], item.errors[chosen[number]]
            for option, (c, e) in enumerate(zip(item.costs, item.errors, strict=True)):
                if c - cost <= left and error - e > best[0]:
                    best = (error - e, number, option)
        _, number, option = best
        if number is None:
            return
        left -= items[number].costs[option] - items[number].costs[chosen[number]]
        chosen[number] = option
