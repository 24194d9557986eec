"""The matrix kernels of csrc/kernels, run by the emulator: right numbers, and no rule of the machine broken."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from shrank.ops import reference
from tests.common.tolerances import assert_close, assert_every_element_close

from .emulated.linear import BF16, GATED_TILES, PIVOTED_TILES, TILES, Run, emulate, exact, in_pytorch, runs

BOTH = pytest.mark.parametrize("copies_early", [False, True], ids=["copies_late", "copies_early"])


def test_every_tile_that_is_compiled_is_tested(dev) -> None:
    select = dev.select
    tested_tiles = (TILES, GATED_TILES, PIVOTED_TILES)
    for compiled, tested in zip(
        (select.LINEAR_TILES, select.GATED_TILES, select.PIVOTED_TILES), tested_tiles, strict=True
    ):
        assert [(tile.block_m, tile.max_rank) for tile in compiled] == list(tested)


@BOTH
@pytest.mark.parametrize("run", runs(), ids=str)
def test_values_are_as_good_as_pytorchs_and_no_rule_is_broken(dev, run: Run, copies_early: bool) -> None:
    arguments = run.arguments()
    outcome = emulate(dev, run, arguments, hash(run.M + run.N + run.K + run.R) % 8, copies_early)
    assert outcome.problems == []
    y, *h = exact(arguments, outcome.h if run.from_h else None)
    assert_close(outcome.y, y, in_pytorch(arguments), strict=True)
    assert_every_element_close(outcome.y, y)
    if run.training:
        for ours, theirs in zip(outcome.h, h, strict=True):
            assert_every_element_close(ours, theirs)
    elif not run.pivoted:  # saving h for training is not in a loop, and pivots are read from h column by column
        assert outcome.counts.bank_conflicts == 0


@BOTH
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("block_m", "max_rank", "from_h", "of_form"),
    [
        (32, 64, False, {}),
        (32, 96, True, {}),
        (64, 0, True, {}),
        (64, 64, False, {"gate": 24}),
        (64, 0, True, {"gate": 72}),
        (64, 64, False, {"pivoted": True}),
        (64, 0, True, {"pivoted": True}),
    ],
)
def test_no_order_of_threads_breaks_a_rule_or_changes_a_bit(
    dev, block_m, max_rank, from_h, of_form, seed, copies_early
) -> None:
    ends = (True, "gelu_tanh", "gate" not in of_form, True, 2)
    run = Run(block_m, max_rank, 70, 200, 392, 40, *ends, from_h=from_h, **of_form)
    arguments = run.arguments()
    outcome, other = emulate(dev, run, arguments, seed, copies_early), emulate(dev, run, arguments)
    assert outcome.problems == []
    assert all(torch.equal(a, b) for a, b in zip((outcome.y, *outcome.h), (other.y, *other.h), strict=True))


def test_training_and_inference_give_the_same_bits(dev) -> None:
    for activation, (block_m, gate) in product(reference.ACTIVATIONS, ((32, 0), (64, 24))):
        training = Run(block_m, 64, 33, 72, 136, 40, True, activation, not gate, True, gate=gate)
        inference = replace(training, training=False)
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
    assert outcome.problems == [] and torch.equal(outcome.h[0], rounded) and torch.equal(outcome.y, rounded)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("max_rank", [64, 0])
@pytest.mark.parametrize("gate", [0, 24])
def test_nan_and_inf_go_where_pytorch_lets_them_go(dev, special, max_rank, gate) -> None:
    run = Run(64, max_rank, 20, 72, 72, 40, True, "relu", not gate, gate=gate)
    arguments = run.arguments()
    arguments[0][3, 5] = special
    y, torchs = emulate(dev, run, arguments).y, in_pytorch(arguments)
    assert torch.equal(y.isnan(), torchs.isnan()) and torch.equal(y.isinf(), torchs.isinf())
    assert not y[:3].isnan().any() and not y[4:].isnan().any()
