"""What a caller names: every tile that is compiled, on the C++ code of the ops with the kernels emulated.

tests/csrc/test_ops.py runs this in the process that loads that library.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import shrank
from shrank.measuring import tuning
from shrank.measuring.timing import Timing
from shrank.ops import gated_backward, multi, pivoted_backward, pivoted_reference, reference, self_check, tuned
from shrank.ops.conv import CONV
from shrank.ops.expand_backward import run_named
from shrank.ops.gated import GATED
from shrank.ops.linear import LINEAR
from shrank.ops.multi import run_together
from shrank.ops.pivoted import PIVOTED
from tests.common.conv_cases import ConvCase
from tests.common.gated_cases import GatedCase
from tests.common.linear_cases import LinearCase
from tests.common.ops import doubled
from tests.common.pivoted_cases import PivotedCase
from tests.common.tolerances import assert_close
from tests.csrc.conftest import dev_module
from tests.csrc.emulated.backward import BackwardRun
from tests.measuring.test_tuning import PROBLEMS

DEV = dev_module()
HALVES = (torch.bfloat16, torch.float16)
BACKWARD_TILES = [
    *DEV.select.BACKWARD_TILES,
    *DEV.select.GATED_BACKWARD_TILES,
    *DEV.select.PIVOTED_BACKWARD_TILES,
]


def held_to_pytorch(op, given: tuple, kernel: str, grid: tuple) -> None:
    exact, plain = op.by_pytorch(*doubled(given)), op.by_pytorch(*given)
    for training in (False, True):
        found = op.run_named(given, kernel, grid, training)
        for ours, right, theirs in list(zip(found, exact, plain, strict=True))[: None if training else 1]:
            assert_close(ours, right, theirs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.LINEAR_TILES, ids=repr)
def test_every_tile_of_linear_layers(tile, dtype: torch.dtype) -> None:
    rank = tile.max_rank - 8 if tile.holds_h else 40
    given = LinearCase((37,), 72, 264, rank, True, "silu", True).tensors(dtype, "cpu")
    for kernel in ("fused", "gemm_expand") if tile.holds_h else ("gemm_expand",):
        held_to_pytorch(LINEAR, given, kernel, (tile.block_m, tile.max_rank, 2))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.GATED_TILES, ids=repr)
def test_every_tile_of_gated_layers(tile, dtype: torch.dtype) -> None:
    rank = tile.max_rank - 8 if tile.holds_h else 40
    given = GatedCase((37,), 72, 264, 24, rank).tensors(dtype, "cpu")
    for kernel in ("fused", "gemm_expand") if tile.holds_h else ("gemm_expand",):
        held_to_pytorch(GATED, given, kernel, (tile.block_m, tile.max_rank, 2))


@pytest.mark.parametrize("pivots", ["gate", "value", "both"])
@pytest.mark.parametrize("dtype", HALVES)
def test_gated_layers_with_pivots_get_all_rows_or_are_computed_apart(dtype: torch.dtype, pivots: str) -> None:
    for bias in ("both", "gate", "none"):
        given = GatedCase((37,), 72, 264, 24, 56, bias, pivots=pivots).tensors(dtype, "cpu")
        for kernel in ("fused", "gemm_expand", "apart", "two_gemms_epilogue"):
            held_to_pytorch(GATED, given, kernel, ())
    ways = json.loads(torch.ops.shrank.low_rank_gated_choices(*given, 1))
    assert {"shrink_expand", "fused", "gemm_expand", "apart", "two_gemms"} <= {way["kernel"] for way in ways}
    plain = GatedCase((37,), 72, 264, 24, 56).tensors(dtype, "cpu")
    with pytest.raises(RuntimeError, match="apart: no gate and value with pivots"):
        GATED.run_named(plain, "apart")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.PIVOTED_TILES, ids=repr)
def test_every_tile_of_pivoted_layers(tile, dtype: torch.dtype) -> None:
    rank = tile.max_rank - 8 if tile.holds_h else 40
    given = PivotedCase((37,), 72, 264, rank, "both", "silu", True).tensors(dtype, "cpu")
    for kernel in ("fused", "gemm_expand") if tile.holds_h else ("gemm_expand",):
        held_to_pytorch(PIVOTED, given, kernel, (tile.block_m, tile.max_rank, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", ["both", "pivots", "others", "none"])
def test_pivoted_layers_by_gemms(dtype: torch.dtype, activation: str, bias: str) -> None:
    for N in (37, 5):
        given = PivotedCase((2, 3), 32, N, 5, bias, activation, activation != "none").tensors(dtype, "cpu")
        held_to_pytorch(PIVOTED, given, "two_gemms" if activation == "none" else "two_gemms_epilogue", ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gated_layers_by_gemms(dtype: torch.dtype, activation: str) -> None:
    for pivots in ("none", "gate", "value", "both"):
        given = GatedCase((6,), 32, 37, 8, 5, "gate", activation, pivots).tensors(dtype, "cpu")
        held_to_pytorch(GATED, given, "two_gemms" if activation == "none" else "two_gemms_epilogue", ())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.CONV_TILES, ids=repr)
def test_every_tile_of_convolutions(tile, dtype: torch.dtype) -> None:
    rank = tile.max_rank - (16 if tile.gather == "analytic" else 8)
    channels, groups = {"chunks": (8, 1), "analytic": (16, 2), "numbers": (3, 1), "depthwise": (rank, rank)}[
        tile.gather
    ]
    case = ConvCase((6, 5), (3, 2), channels, 40, rank, padding=(1, 0), groups=groups, activation="relu", last=True)
    held_to_pytorch(CONV, case.tensors(dtype, "cpu"), "fused", (tile.block_m, tile.max_rank, 1))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.SHRINK_EXPAND_TILES, ids=repr)
def test_every_tile_for_a_few_rows(tile, dtype: torch.dtype) -> None:
    if tile.layers > 1:
        layers = [
            PivotedCase((37,), 520, N, R).tensors(dtype, "cpu")[:6]
            if tile.form == 3 and N != 40
            else (*LinearCase((37,), 520, N, R).tensors(dtype, "cpu")[:4], None, None)
            for N, R in ((136, 72), (40, 24), (72, 40))
        ]
        x, lists = layers[0][0], [list(each) for each in zip(*(given[1:] for given in layers), strict=True)]
        for splits in ((1, 1, 1), (2, 1, 3)):
            found = run_together((x, *lists), tile.tokens, splits)
            for y, (op, given), each in zip(found, multi.alone(x, *lists), splits, strict=True):
                assert torch.equal(y, op.run_named(given, "shrink_expand", (tile.tokens, 0, each)).y)
        return
    op, case = {
        1: (LINEAR, LinearCase((37,), 520, 136, 72, True, "silu", True)),
        2: (GATED, GatedCase((37,), 520, 136, 72, 40)),
        3: (PIVOTED, PivotedCase((37,), 520, 136, 72, "both", "silu", True)),
        4: (GATED, GatedCase((37,), 520, 136, 72, 40, pivots="both")),
    }[tile.form]
    for splits in (1, 2):
        held_to_pytorch(op, case.tensors(dtype, "cpu"), "shrink_expand", (tile.tokens, 0, splits))


def test_many_rows_are_not_few() -> None:
    given = LinearCase((65,), 72, 72, 24).tensors(torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match="shrink_expand: more than 64 rows"):
        LINEAR.run_named(given, "shrink_expand")
    wide = LinearCase((5,), 72, 72, 2056).tensors(torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match="shrink_expand: R is above 2048"):
        LINEAR.run_named(wide, "shrink_expand")


def gradients_held_to_pytorch(given: tuple, kernel: str, grid: tuple = ()) -> None:
    plainly, named = {
        6: (reference.expand_backward, run_named),
        8: (pivoted_reference.pivoted_backward, pivoted_backward.run_named),
        10: (reference.gated_backward, gated_backward.run_named),
    }[len(given)]
    for ours, right, theirs in zip(named(given, kernel, grid), plainly(*doubled(given)), plainly(*given), strict=True):
        if right is None:
            assert ours.numel() == 0
        else:
            assert_close(ours, right, theirs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", BACKWARD_TILES, ids=repr)
def test_every_tile_of_gradients(tile, dtype: torch.dtype) -> None:
    rank, of_form = tile.max_rank - 8 if tile.holds_h else 40, {1: {}, 2: {"gate": 24}, 3: {"pivoted": True}}[tile.form]
    run = BackwardRun(tile.block_m, tile.max_rank, 137, 264, rank, "silu", dtype=dtype, **of_form)
    for sums in (False, True):
        given = replace(run, sums=sums).arguments()
        gradients_held_to_pytorch(given, "fused", (tile.block_m, tile.max_rank, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(("M", "N"), [(6, 64), (6, 37), (300, 72)])
def test_gradients_by_a_gemm_and_one_pass(dtype: torch.dtype, M: int, N: int) -> None:
    for of_form, sums in (({}, True), ({"gate": 5}, True), ({"gate": 5}, False), ({"pivoted": True}, True)):
        run = BackwardRun(0, 0, M, N, 8, "gelu", sums=sums, dtype=dtype, **of_form)
        gradients_held_to_pytorch(run.arguments(), "gemm_epilogue")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_gate_without_activation(dtype: torch.dtype) -> None:
    gradients_held_to_pytorch(BackwardRun(0, 0, 6, 37, 8, "none", dtype=dtype, gate=5).arguments(), "gemm_epilogue")


@pytest.mark.parametrize(
    ("kernel", "grid", "message"),
    [
        ("two_gemms", (), "kernel is 'two_gemms', wanted one of fused, gemm_epilogue"),
        ("gemm_epilogue", (64, 64, 1), "gemm_epilogue has no grid"),
        ("fused", (128, 64, 1), "fused: no kernel is compiled for this tile"),
        ("fused", (64, 64, 1), "fused: R is above the tile's rank"),
        ("fused", (64, 96, 0), "fused: the shares of the columns must be 1 to 64"),
    ],
)
def test_what_cannot_compute_gradients_is_refused_in_words(kernel: str, grid: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_named(BackwardRun(0, 0, 5, 64, 80).arguments(), kernel, grid)


@pytest.mark.parametrize("shares", [1, 2])
def test_groups_of_both_stages(shares: int) -> None:
    case = ConvCase((6, 5), (3, 2), 16, 272, 32, groups=2, up_groups=2, activation="silu", residual=True, last=True)
    held_to_pytorch(CONV, case.tensors(torch.bfloat16, "cpu"), "fused", (64, 32, shares))


@pytest.mark.parametrize(
    ("kernel", "grid", "message"),
    [
        (
            "warp",
            (),
            "kernel is 'warp', wanted one of shrink_expand, fused, gemm_expand, apart, two_gemms_epilogue, two_gemms",
        ),
        ("fused", (64,), "grid has 1 numbers, wanted block_m, max_rank and blocks_n"),
        ("fused", (64, 32, 1), "fused: no kernel is compiled for this tile"),
        ("fused", (32, 64, 1), "fused: R is above the tile's rank"),
        ("fused", (64, 0, 1), "fused: a tile that streams h cannot compute it"),
        ("fused", (64, 96, 0), "fused: the shares of the columns must be 1 to 64"),
        ("fused", (64, 96, 65), "fused: the shares of the columns must be 1 to 64"),
        ("two_gemms_epilogue", (64, 96, 1), "two_gemms_epilogue has no grid"),
        ("shrink_expand", (64, 0, 1), "shrink_expand: no kernel is compiled for this tile"),
        ("shrink_expand", (8, 0, 0), "shrink_expand: the splits of K must be 1 to 64"),
        ("two_gemms", (), "two GEMMs alone apply no activation"),
    ],
)
def test_what_cannot_run_is_refused_in_words(kernel: str, grid: tuple, message: str) -> None:
    given = LinearCase((5,), 64, 64, 80, True, "gelu").tensors(torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match=message):
        LINEAR.run_named(given, kernel, grid)


def test_a_problem_that_no_kernel_takes_is_refused_in_words() -> None:
    with pytest.raises(RuntimeError, match="fused: the tensor core kernels take bfloat16 and float16"):
        LINEAR.run_named(LinearCase((5,), 64, 64, 8).tensors(torch.float32, "cpu"), "fused")
    with pytest.raises(RuntimeError, match="fused: a tensor is not channels last"):
        CONV.run_named(ConvCase((6, 5), (3, 3), 16, 16, 8).tensors(torch.bfloat16, "cpu"), "fused")


def test_a_rank_below_the_tiles_leaves_infinity_infinite() -> None:
    """Columns of h that there are not are zero, and not zero times infinity."""
    x, down, up, *ends = LinearCase((33,), 64, 64, 40, False).tensors(torch.bfloat16, "cpu")
    x[3, 5], down[:, 5], up[:] = torch.inf, 1.0, up.abs()
    found = LINEAR.run_named((x, down, up, *ends), "fused", (64, 64, 1)).y
    assert bool((found[3] == torch.inf).all()) and bool(found[4:].isfinite().all())


def test_the_emulated_card_passes_its_check(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SHRANK_CACHE", str(tmp_path))
    found = self_check.check_and_keep("cpu")
    assert not [name for name, reason in found.items() if reason] and self_check.kept("cpu") == found


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_way_that_is_listed_computes_the_same(name: str) -> None:
    problem = PROBLEMS[name]
    given = problem.arguments("cpu")
    ways = tuning.ways(problem.op, given)
    assert len({way.kernel for way in ways}) >= 3 and len({way.grid for way in ways}) >= 3
    for way in ways:
        held_to_pytorch(problem.op, given, way.kernel, way.grid)


def test_what_a_model_asks_is_measured_and_then_runs(monkeypatch, tmp_path) -> None:
    """From the call to the choice: noted, timed by a scripted clock, kept, told, chosen."""
    monkeypatch.setenv("SHRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_loaded", set())
    given = LinearCase((100,), 64, 72, 40, True, "relu").tensors(torch.bfloat16, "cpu")

    def clock(candidates, device, rounds, graphs, held):
        return {name: Timing(0.5 if name.startswith("gemm_expand") else 1.0, 0.0) for name in candidates}

    with shrank.tune("cpu", clock=clock) as done:
        plain = LINEAR.overload(*given)
        LINEAR.overload(*given)
    (measured,) = done
    assert measured.kernel == "gemm_expand" and measured.key.startswith(
        "linear M128 K64 N72 R40 bfloat16 relu bias on "
    )
    calls = []
    with shrank.tune("cpu", clock=clock) as again:
        calls.append(LINEAR.overload(*given))
    assert again == [] and len(tuned.load("cpu")) == 1
    assert_close(calls[0], plain)
    told = json.loads(torch.ops.shrank.low_rank_linear_choices(*given, 1))
    assert [each["kernel"] for each in told][-1] == "two_gemms"
    torch.ops.shrank.forget_measured()


def test_evidence_for_tiles_that_are_gone_is_not_followed() -> None:
    given = LinearCase((100,), 64, 80, 40, True, "relu").tensors(torch.bfloat16, "cpu")
    torch.ops.shrank.note_problems(True)
    plain = LINEAR.overload(*given)
    (key,) = json.loads(torch.ops.shrank.noted_problems())
    torch.ops.shrank.note_problems(False)
    for kernel, grid in (("fused", [48, 64, 1]), ("warp", []), ("fused", [1])):
        torch.ops.shrank.remember_measured(key, kernel, grid, 1.0, 2.0, "another build")
        assert torch.equal(LINEAR.overload(*given), plain)
    torch.ops.shrank.forget_measured()
