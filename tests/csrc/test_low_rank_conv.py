"""The convolution kernels of csrc/kernels, run by the emulator: right numbers, and no rule of the machine broken."""

from __future__ import annotations

import pytest
import torch

from shrank.ops import reference
from tests.common.tolerances import assert_close, assert_every_element_close

from .emulated.conv import ANALYTIC, BY_NUMBER, DEPTHWISE, TILES, TINY, ConvRun, emulate, exact, in_pytorch, runs

BOTH = pytest.mark.parametrize("copies_early", [False, True], ids=["copies_late", "copies_early"])


def test_every_tile_that_is_compiled_is_tested(dev) -> None:
    assert [(tile.gather, tile.block_m, tile.max_rank) for tile in dev.select.CONV_TILES] == list(TILES)


@BOTH
@pytest.mark.parametrize("run", runs(), ids=str)
def test_values_are_as_good_as_pytorchs_and_no_rule_is_broken(dev, run: ConvRun, copies_early: bool) -> None:
    arguments = run.arguments(dev)
    outcome = emulate(dev, run, arguments, hash(run.N + run.C + run.R) % 8, copies_early)
    assert outcome.problems == []
    wanted = exact(run, arguments)
    assert_close(outcome.y, wanted.y, in_pytorch(run, arguments).y, strict=True)
    assert_every_element_close(outcome.y, wanted.y)
    if run.training:
        assert_every_element_close(outcome.h[0], wanted.h)
    else:  # saving h for training is not in a loop
        assert outcome.counts.bank_conflicts == 0


@BOTH
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("tile", "C", "groups"), [(TINY, 32, 1), (ANALYTIC, 32, 2), (BY_NUMBER, 10, 1), (DEPTHWISE, 72, 72)]
)
def test_no_order_of_threads_breaks_a_rule_or_changes_a_bit(dev, tile, C, groups, seed, copies_early) -> None:
    run = ConvRun(
        tile,
        (9, 8),
        (3, 3),
        C,
        136,
        72 if tile == DEPTHWISE else 40,
        1,
        begin=(1, 1),
        groups=groups,
        bias=True,
        activation="gelu_tanh",
        residual=True,
        training=True,
        blocks_n=2,
    )
    arguments = run.arguments(dev)
    outcome, other = emulate(dev, run, arguments, seed, copies_early), emulate(dev, run, arguments)
    assert outcome.problems == []
    assert all(torch.equal(a, b) for a, b in zip((outcome.y, outcome.h[0]), (other.y, other.h[0]), strict=True))


@pytest.mark.parametrize(
    ("tile", "C", "groups"), [(TINY, 16, 1), (ANALYTIC, 16, 1), (BY_NUMBER, 3, 1), (DEPTHWISE, 16, 16)]
)
def test_training_and_inference_give_the_same_bits(dev, tile, C, groups) -> None:
    for activation in reference.ACTIVATIONS:
        training, inference = (
            ConvRun(
                tile,
                (7, 6),
                (3, 3),
                C,
                40,
                16,
                1,
                begin=(1, 1),
                groups=groups,
                bias=True,
                activation=activation,
                residual=True,
                training=each,
            )
            for each in (True, False)
        )
        arguments = training.arguments(dev)
        assert torch.equal(emulate(dev, training, arguments).y, emulate(dev, inference, arguments).y)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("tile", "C", "groups"), [(TINY, 16, 1), (ANALYTIC, 16, 1), (BY_NUMBER, 3, 1), (DEPTHWISE, 16, 16)]
)
def test_nan_and_inf_reach_the_windows_that_see_them(dev, special, tile, C, groups) -> None:
    run = ConvRun(
        tile, (12,), (3,), C, 40, 16, 1, begin=(1,), groups=groups, bias=True, activation="relu", residual=True
    )
    arguments = run.arguments(dev)
    arguments["x"][0, 0, 0, 5, 1] = special
    y, torchs = emulate(dev, run, arguments).y, in_pytorch(run, arguments).y
    assert torch.equal(y.isnan(), torchs.isnan()) and torch.equal(y.isinf(), torchs.isinf())
    assert y[:4].isfinite().all() and y[7:].isfinite().all()


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize(("tile", "C"), [(TINY, 16), (ANALYTIC, 16), (BY_NUMBER, 3)])
def test_a_special_filter_reaches_its_own_column_of_h(dev, special, tile, C) -> None:
    """The last step has columns beyond the filter, which lie in the next row of the matrix."""
    run = ConvRun(tile, (12,), (3,), C, 40, 16, 1, begin=(1,), training=True)
    arguments = run.arguments(dev)
    arguments["down"][1, ..., :] = special
    outcome, torchs = emulate(dev, run, arguments), in_pytorch(run, arguments)
    assert torch.equal(outcome.h[0].isfinite(), torchs.h.isfinite())
    assert outcome.h[0][:, 0].isfinite().all() and outcome.h[0][:, 2:].isfinite().all()


@pytest.mark.parametrize("up_groups", [1, 4])
def test_infinity_stays_in_its_group(dev, up_groups) -> None:
    """Groups of 8 ranks share fragments of 16 with their neighbours."""
    tile = ANALYTIC if up_groups == 1 else TINY
    run = ConvRun(tile, (12,), (3,), 32, 32, 32, 1, begin=(1,), groups=4, up_groups=up_groups, training=True)
    arguments = run.arguments(dev)
    arguments["x"][0, 0, 0, 5, 9] = float("inf")
    outcome, torchs = emulate(dev, run, arguments), in_pytorch(run, arguments)
    for found, wanted in ((outcome.h[0], torchs.h), (outcome.y, torchs.y)):
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
    assert outcome.h[0][:, :8].isfinite().all() and outcome.h[0][:, 16:].isfinite().all()
