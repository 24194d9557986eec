"""The backward kernel of csrc/kernels, run by the emulator: right numbers, and no rule of the machine broken."""

from __future__ import annotations

import pytest
import torch

from shrank.ops import reference
from tests.common.tolerances import assert_close, assert_every_element_close

from .emulated.backward import TILES, BackwardRun, emulate, exact, runs

BOTH = pytest.mark.parametrize("copies_early", [False, True], ids=["copies_late", "copies_early"])


def test_every_tile_that_is_compiled_is_tested(dev) -> None:
    assert [(tile.block_m, tile.max_rank) for tile in dev.select.BACKWARD_TILES] == list(TILES)


@BOTH
@pytest.mark.parametrize("run", runs(), ids=str)
def test_values_are_as_good_as_pytorchs_and_no_rule_is_broken(dev, run: BackwardRun, copies_early: bool) -> None:
    arguments = run.arguments()
    outcome = emulate(dev, run, arguments, hash(run.M + run.N + run.R) % 8, copies_early)
    assert outcome.problems == [] and outcome.counts.bank_conflicts == 0
    wanted, torchs = exact(arguments), reference.expand_backward(*arguments)
    assert_close(outcome.dz, wanted.z, torchs.z, strict=True)
    assert_every_element_close(outcome.dz, wanted.z)
    if run.sums:
        assert_close(outcome.sums.to(run.dtype), wanted.bias, torchs.bias)
        assert_every_element_close(outcome.sums.to(run.dtype), wanted.bias)


@BOTH
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_rank", [64, 0])
def test_no_order_of_threads_breaks_a_rule_or_changes_a_bit(dev, max_rank, seed, copies_early) -> None:
    run = BackwardRun(64, max_rank, 70, 392, 40, "gelu_tanh", blocks_n=2)
    arguments = run.arguments()
    outcome, other = emulate(dev, run, arguments, seed, copies_early), emulate(dev, run, arguments)
    assert outcome.problems == []
    assert torch.equal(outcome.dz, other.dz) and torch.equal(outcome.sums, other.sums)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["grad", "h"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_nan_and_inf_go_where_they_must(dev, special, where, activation) -> None:
    run = BackwardRun(64, 64, 20, 72, 40, activation)
    arguments = run.arguments()
    arguments[["grad", "h"].index(where)][19, 5] = special  # in the row that those beyond it repeat
    found, wanted = emulate(dev, run, arguments), exact(arguments)  # PyTorch's own silu makes NaN of infinite gradients
    for ours, theirs in ((found.dz, wanted.z), (found.sums, wanted.bias)):
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
    assert found.dz[:19].isfinite().all()
