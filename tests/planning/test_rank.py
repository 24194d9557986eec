"""Rank rules: what they give and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shrank.linalg import Shape, spectrum
from shrank.planning.rank import ByFunction, ByPattern, Energy, Fixed, Fraction, Layer, as_rule

SHAPE = Shape(64, 48)


def layer(shape: Shape = SHAPE, fqn: str = "encoder.0.fc") -> Layer:
    torch.manual_seed(0)
    W = torch.randn(shape.down_groups, shape.out_features // shape.down_groups, shape.in_features // shape.down_groups)
    return Layer(fqn, nn.Linear(48, 64), shape, lambda: spectrum(W))


def test_int_is_the_rank() -> None:
    assert as_rule(7)(layer()) == 7


def test_fraction_is_of_the_break_even_rank() -> None:
    shape = Shape(64, 64 * 9)
    assert as_rule(0.5)(layer(shape)) == shape.break_even_rank // 2
    kept = shape.low_rank_params(as_rule(0.5)(layer(shape))) / shape.dense_params
    assert 0.48 < kept <= 0.5


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_energy_is_the_smallest_rank_that_reaches_it(threshold: float, groups: int) -> None:
    one = layer(Shape(64, 48, groups, groups, groups))
    rank = Energy(threshold)(one)
    squares = one.spectrum().square()
    kept = [squares[:, :r].sum() / squares.sum() for r in range(squares.shape[1] + 1)]
    assert rank % groups == 0
    assert kept[rank // groups] >= threshold - 1e-12
    assert kept[rank // groups - 1] < threshold


def test_first_matching_pattern_wins_and_the_rest_stays_dense() -> None:
    rule = as_rule({"*.fc": 3, "encoder.*": None, "decoder.*": 0.5})
    assert rule(layer(fqn="encoder.0.fc")) == 3
    assert rule(layer(fqn="encoder.0.q")) is None
    assert rule(layer(fqn="decoder.q")) == Fraction(0.5)(layer())
    assert rule(layer(fqn="head")) is None


def test_function_sees_name_and_module_and_may_answer_with_a_fraction() -> None:
    seen = []
    rule = as_rule(lambda fqn, module: seen.append((fqn, type(module))) or 0.25)
    assert rule(layer()) == Fraction(0.25)(layer())
    assert seen == [("encoder.0.fc", nn.Linear)]
    assert as_rule(lambda fqn, module: None)(layer()) is None


def test_rules_pass_through_and_compare_by_value() -> None:
    assert as_rule(Energy(0.9)) == Energy(0.9) and as_rule(5) == Fixed(5)
    assert as_rule({"*": 4}) == ByPattern((("*", Fixed(4)),))
    assert isinstance(as_rule(max), ByFunction)


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (0, ValueError, "at least 1, got 0"),
        (-3, ValueError, "at least 1, got -3"),
        (1.0, ValueError, r"\(0, 1\), got 1.0"),
        (0.0, ValueError, r"\(0, 1\), got 0.0"),
        (float("nan"), ValueError, "got nan"),
        (True, TypeError, "bool True"),
        ("8", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        ({"*": "all"}, TypeError, "got str"),
    ],
    ids=str,
)
def test_what_is_no_rank_is_refused_by_name(bad: object, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        as_rule(bad)


@pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan")])
def test_energy_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="energy threshold"):
        Energy(threshold)
