"""The backward kernel of csrc/kernels, run by the emulator: right numbers, and no rule of the machine broken."""

from __future__ import annotations

import pytest
import torch

from tests.common.tolerances import assert_close, assert_every_element_close

from .emulated.backward import GATED_TILES, PIVOTED_TILES, TILES, BackwardRun, compared, emulate, exact, found_of, runs

BOTH = pytest.mark.parametrize("copies_early", [False, True], ids=["copies_late", "copies_early"])


def test_every_tile_that_is_compiled_is_tested(dev) -> None:
    select = dev.select
    compiled_tiles = (select.BACKWARD_TILES, select.GATED_BACKWARD_TILES, select.PIVOTED_BACKWARD_TILES)
    for compiled, tested in zip(compiled_tiles, (TILES, GATED_TILES, PIVOTED_TILES), strict=True):
        assert [(tile.block_m, tile.max_rank) for tile in compiled] == list(tested)


@BOTH
@pytest.mark.parametrize("run", runs(), ids=str)
def test_values_are_as_good_as_pytorchs_and_no_rule_is_broken(dev, run: BackwardRun, copies_early: bool) -> None:
    arguments = run.arguments()
    outcome = emulate(dev, run, arguments, hash(run.M + run.N + run.R) % 8, copies_early)
    assert outcome.problems == []
    assert run.pivoted or outcome.counts.bank_conflicts == 0  # pivots are read from h column by column
    for ours, right, theirs in compared(outcome, run, arguments):
        assert_close(ours, right, theirs, strict=ours.dim() > 1)
        assert_every_element_close(ours, right)


@BOTH
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_rank", [64, 0])
@pytest.mark.parametrize("of_form", [{}, {"gate": 24}, {"pivoted": True}], ids=["plain", "gated", "pivoted"])
def test_no_order_of_threads_breaks_a_rule_or_changes_a_bit(dev, max_rank, of_form, seed, copies_early) -> None:
    run = BackwardRun(64, max_rank, 70, 392, 40, "gelu_tanh", blocks_n=2, **of_form)
    arguments = run.arguments()
    outcome, other = emulate(dev, run, arguments, seed, copies_early), emulate(dev, run, arguments)
    assert outcome.problems == []
    assert all(map(torch.equal, found_of(outcome, torch.float32), found_of(other, torch.float32)))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["grad", "h"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("gate", [0, 24])
def test_nan_and_inf_go_where_they_must(dev, special, where, activation, gate) -> None:
    run = BackwardRun(64, 64, 20, 72, 40, activation, gate=gate)
    arguments = run.arguments()
    arguments[["grad", "h"].index(where)][19, 5] = special  # in the row that those beyond it repeat
    found, wanted = emulate(dev, run, arguments), exact(arguments)  # PyTorch's own silu makes NaN of infinite gradients
    for ours, theirs in zip(found_of(found, torch.float64), wanted, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
    assert all(dz[:19].isfinite().all() for dz in found.dz)
