"""The matrix kernels of csrc/kernels, run by the emulator: right numbers, and no rule of the machine broken."""

from __future__ import annotations

import pytest
import torch

from shrank.ops import reference
from tests.common.tolerances import assert_close, assert_every_element_close

from .emulated.linear import BF16, TILES, Run, emulate, exact, runs

BOTH = pytest.mark.parametrize("copies_early", [False, True], ids=["copies_late", "copies_early"])


def test_every_tile_that_is_compiled_is_tested(dev) -> None:
    assert [(tile.block_m, tile.max_rank) for tile in dev.select.LINEAR_TILES] == list(TILES)


@BOTH
@pytest.mark.parametrize("run", runs(), ids=str)
def test_values_are_as_good_as_pytorchs_and_no_rule_is_broken(dev, run: Run, copies_early: bool) -> None:
    arguments = run.arguments()
    outcome = emulate(dev, run, arguments, hash(run.M + run.N + run.K + run.R) % 8, copies_early)
    assert outcome.problems == []
    given_h = outcome.h if run.from_h else None
    wanted, torchs = exact(arguments, given_h), reference.low_rank_linear(*arguments)
    assert_close(outcome.y, wanted.y, torchs, strict=True)
    assert_every_element_close(outcome.y, wanted.y)
    if run.training:
        assert_every_element_close(outcome.h, wanted.h)
    else:  # saving h for training is not in a loop
        assert outcome.counts.bank_conflicts == 0


@BOTH
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("block_m", "max_rank", "from_h"), [(32, 64, False), (32, 96, True), (64, 0, True)])
def test_no_order_of_threads_breaks_a_rule_or_changes_a_bit(dev, block_m, max_rank, from_h, seed, copies_early) -> None:
    run = Run(block_m, max_rank, 70, 200, 392, 40, True, "gelu_tanh", True, True, 2, from_h=from_h)
    arguments = run.arguments()
    outcome, other = emulate(dev, run, arguments, seed, copies_early), emulate(dev, run, arguments)
    assert outcome.problems == []
    assert all(torch.equal(a, b) for a, b in zip((outcome.y, outcome.h), (other.y, other.h), strict=True))


def test_training_and_inference_give_the_same_bits(dev) -> None:
    for activation in reference.ACTIVATIONS:
        training = Run(32, 64, 33, 72, 136, 40, True, activation, True, True)
        inference = Run(32, 64, 33, 72, 136, 40, True, activation, True, False)
        arguments = training.arguments()
        assert torch.equal(emulate(dev, training, arguments).y, emulate(dev, inference, arguments).y)


def test_h_is_rounded_once_as_two_calls_round_it(dev) -> None:
    """x and down are small integers, so that h is exact before it is rounded, and up picks single numbers of it."""
    generator = torch.Generator().manual_seed(0)
    x, down = (torch.randint(-8, 9, shape, generator=generator).to(BF16) for shape in ((40, 136), (16, 136)))
    up = torch.eye(16, dtype=BF16)
    run = Run(32, 64, 40, 136, 16, 16, training=True)
    outcome = emulate(dev, run, (x, down, up, None, "none", None))
    rounded = (x.double() @ down.double().T).to(BF16)
    assert outcome.problems == [] and torch.equal(outcome.h, rounded) and torch.equal(outcome.y, rounded)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("max_rank", [64, 0])
def test_nan_and_inf_go_where_pytorch_lets_them_go(dev, special, max_rank) -> None:
    run = Run(64, max_rank, 20, 72, 72, 40, True, "relu", True)
    arguments = run.arguments()
    arguments[0][3, 5] = special
    y, torchs = emulate(dev, run, arguments).y, reference.low_rank_linear(*arguments)
    assert torch.equal(y.isnan(), torchs.isnan()) and torch.equal(y.isinf(), torchs.isinf())
    assert not y[:3].isnan().any() and not y[4:].isnan().any()
