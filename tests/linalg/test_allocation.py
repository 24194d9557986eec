"""The allocator against every possibility, on small problems."""

from __future__ import annotations

import itertools
import random

import pytest

from shrank.linalg import BudgetTooSmall, Options, allocate, frontier


def problem(seed: int, pivoted: bool) -> list[Options]:
    """Layers of a few options each: a falling curve of errors, concave or linear costs, and a dense option."""
    rng = random.Random(seed)
    items = []
    for _ in range(rng.randint(1, 5)):
        N, K = rng.randint(4, 9), rng.randint(4, 9)
        squares = sorted((rng.random() ** 3 for _ in range(min(N, K))), reverse=True)
        ranks = [r for r in range(1, min(N, K)) if (r * (N + K - r) if pivoted else r * (N + K)) < N * K]
        costs = [r * (N + K - r) if pivoted else r * (N + K) for r in ranks] + [N * K]
        items.append(Options(costs, [sum(squares[r:]) for r in ranks] + [0.0]))
    return items


def best(items: list[Options], budget: float) -> float | None:
    errors = [
        sum(x.errors[i] for x, i in zip(items, choice, strict=True))
        for choice in itertools.product(*(range(len(x.costs)) for x in items))
        if sum(x.costs[i] for x, i in zip(items, choice, strict=True)) <= budget
    ]
    return min(errors, default=None)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_within_one_step_of_the_best_of_all(seed: int, pivoted: bool) -> None:
    items = problem(seed, pivoted)
    dense = sum(item.costs[-1] for item in items)
    excess = []
    for keep in (0.3, 0.5, 0.7, 0.9, 1.0):
        optimum = best(items, keep * dense)
        if optimum is None:
            with pytest.raises(BudgetTooSmall):
                allocate(items, keep * dense)
            continue
        found = allocate(items, keep * dense)
        assert found.cost == sum(x.costs[i] for x, i in zip(items, found.chosen, strict=True)) <= keep * dense
        assert found.error == pytest.approx(sum(x.errors[i] for x, i in zip(items, found.chosen, strict=True)))
        largest_step = max(max(x.errors) for x in items)
        assert optimum - 1e-12 <= found.error <= optimum + largest_step
        excess.append(found.error - optimum)
    assert not excess or sum(excess) / len(excess) < 0.08  # far less on the average


def test_at_most_one_hull_step_above_the_relaxed_optimum() -> None:
    for seed in range(40):
        items = problem(seed, pivoted=False)
        turns = frontier(items)
        for low, high in itertools.pairwise(turns):
            budget = (low.cost + high.cost) / 2
            found = allocate(items, budget)
            assert found.error <= low.error + 1e-12  # never worse than the last turn that fits
            if best(items, budget) is not None:
                assert found.error - best(items, budget) <= low.error - high.error + 1e-12


def test_the_whole_budget_buys_everything() -> None:
    items = problem(3, pivoted=True)
    assert allocate(items, sum(x.costs[-1] for x in items)).error == 0


def test_more_budget_never_hurts_on_the_frontier() -> None:
    for seed in range(10):
        turns = frontier(problem(seed, pivoted=True))
        assert all(a.cost < b.cost and a.error > b.error for a, b in itertools.pairwise(turns))
        slopes = [(a.error - b.error) / (b.cost - a.cost) for a, b in itertools.pairwise(turns)]
        assert slopes == sorted(slopes, reverse=True) or max(b - a for a, b in itertools.pairwise(slopes)) < 1e-9


def test_what_is_left_is_spent() -> None:
    steep = Options([1, 10], [5.0, 0.0])
    flat = Options([1, 3, 11], [1.0, 0.9, 0.0])
    assert allocate([steep, flat], 5).chosen == (0, 1)  # the steep step does not fit, a small one does


def test_too_small_a_budget_says_what_is_possible() -> None:
    with pytest.raises(BudgetTooSmall, match="3"):
        allocate([Options([3, 4], [1.0, 0.0])], 2)
