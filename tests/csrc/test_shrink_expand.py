"""The kernels for a few rows, run by the emulator: right numbers, and no rule of the machine broken."""

from __future__ import annotations

import pytest
import torch

from shrank.ops import reference
from tests.common.tolerances import assert_close, assert_every_element_close

from .emulated.few_rows import TOKENS, FewRowsRun, emulate, runs
from .emulated.linear import BF16, exact


def test_every_tile_that_is_compiled_is_tested(dev) -> None:
    assert tuple(tile.tokens for tile in dev.select.SHRINK_EXPAND_TILES) == TOKENS


@pytest.mark.parametrize("run", runs(), ids=str)
def test_values_are_as_good_as_pytorchs_and_no_rule_is_broken(dev, run: FewRowsRun) -> None:
    arguments = run.arguments()
    outcome = emulate(dev, run, arguments, hash(run.M + run.N + run.K + run.R) % 8)
    assert outcome.problems == [] and outcome.counts.bank_conflicts == 0
    wanted, torchs = exact(arguments), reference.low_rank_linear(*arguments)
    assert_close(outcome.y, wanted.y, torchs)
    assert_every_element_close(outcome.y, wanted.y)
    if outcome.h is not None:
        assert_every_element_close(outcome.h, wanted.h)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("tokens", "splits"), [(8, 3), (16, 1), (16, 2)])
def test_no_order_of_threads_breaks_a_rule_or_changes_a_bit(dev, tokens: int, splits: int, seed: int) -> None:
    run = FewRowsRun(tokens, splits, tokens + 3, 1032, 136, 72, True, "gelu_tanh", True, True)
    arguments = run.arguments()
    outcome, other = emulate(dev, run, arguments, seed), emulate(dev, run, arguments)
    assert outcome.problems == []
    assert torch.equal(outcome.y, other.y) and torch.equal(outcome.h, other.h)


def test_training_and_inference_give_the_same_bits(dev) -> None:
    for splits in (1, 2):
        training = FewRowsRun(8, splits, 5, 520, 72, 40, True, "silu", True, True)
        inference = FewRowsRun(8, splits, 5, 520, 72, 40, True, "silu", True)
        arguments = training.arguments()
        assert torch.equal(emulate(dev, training, arguments).y, emulate(dev, inference, arguments).y)


@pytest.mark.parametrize("splits", [1, 3])
def test_h_is_rounded_once_as_two_calls_round_it(dev, splits: int) -> None:
    """x and down are small integers, so that h is exact before it is rounded, and up picks single numbers of it."""
    generator = torch.Generator().manual_seed(0)
    x, down = (torch.randint(-8, 9, shape, generator=generator).to(BF16) for shape in ((9, 1048), (16, 1048)))
    up = torch.eye(16, dtype=BF16)
    run = FewRowsRun(16, splits, 9, 1048, 16, 16, training=True)
    outcome = emulate(dev, run, (x, down, up, None, "none", None))
    rounded = (x.double() @ down.double().T).to(BF16)
    assert outcome.problems == [] and torch.equal(outcome.h, rounded) and torch.equal(outcome.y, rounded)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("R", "splits"), [(40, 1), (40, 2), (264, 1)])
def test_nan_and_inf_go_where_pytorch_lets_them_go(dev, special: float, R: int, splits: int) -> None:
    run = FewRowsRun(8, splits, 5, 72, 72, R, True, "relu", True)
    arguments = run.arguments()
    arguments[0][3, 5] = special
    y, torchs = emulate(dev, run, arguments).y, reference.low_rank_linear(*arguments)
    assert torch.equal(y.isnan(), torchs.isnan()) and torch.equal(y.isinf(), torchs.isinf())
    assert not y[:3].isnan().any() and not y[4:].isnan().any()
