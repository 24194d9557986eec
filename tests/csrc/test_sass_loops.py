"""The steady loops of the matrix kernels issue little beside their products, and what select's model says they do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shrank.ops import native

from . import sass
from .sass_loops import End, Loop, backward_ends, ends, kernels, loops, steps

SLOTS = Path(__file__).parents[2] / "csrc/select/kernel_slots.h"
DTYPES = ("bfloat16", "float16")
# CUTLASS 4.7, device::Gemm, bf16, 16-byte alignment, warps of 32x64 (64x128) and 64x64 (128x128): slots of a step of 64
# columns, counted once from its SASS.
CUTLASS_SLOTS = {(64, 128): 205, (128, 128): 300}
CUTLASS_WINDOW_SLOTS = 245  # its convolution of 128x64, forward, with the optimized iterator
# Slots beside products, fragments and barrier: at most so many, and so many for every copy.
OWN, OWN_OF_TWO, OWN_LISTED, PER_COPY = 48, 60, 66, 2
# For 8 neighbouring numbers of y.
MOST_OF_END = {"bias": 20, "relu": 9, "gelu": 74, "gelu_tanh": 58, "silu": 42, "residual": 26}

PLANTED = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/              @!P0 LDGSTS.E.BYPASS.128 [R3], [R6.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/               @P1 HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/               @P2 BRA `(.L_x_3) ;
        /*0070*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   WARPSYNC 0xffffffff ;
        /*00a0*/                   STG.E.128 [R2.64], R4 ;
        /*00b0*/               @P0 BRA `(.L_x_2) ;
        /*00c0*/               @P3 BRA `(.L_x_0) ;
.L_x_3:
        /*00d0*/                   EXIT ;
"""


def test_innermost_loops_are_found_by_their_branches_back() -> None:
    first, second = loops(PLANTED)
    assert (first.slots, first["HMMA"], first["LDSM"], first["LDGSTS"], first["BAR"]) == (8, 2, 1, 1, 1)
    assert (first.rest, first.control) == (4, 2) and first.guarded("HMMA") == first.guarded("LDGSTS") == 1
    assert (second.slots, second.control, second["STG"]) == (3, 2, 1)


def test_what_a_branch_of_a_loop_passes_over_is_known() -> None:
    now_and_then = PLANTED.replace("@P2 BRA `(.L_x_3) ;", "@P2 BRA `(.L_x_4) ;").replace(
        "        /*0080*/", ".L_x_4:\n        /*0080*/"
    )
    first, second = loops(now_and_then)
    assert (first.slots, first.skipped, second.skipped) == (8, 1, 0)


def test_code_without_loops_has_none() -> None:
    assert loops(PLANTED.split(".L_x_1:")[0]) == []


def linear_steps(arch: str, dtype: str, kind: str = sass.LINEAR) -> dict[tuple[int, int], Loop]:
    """The loop over x and down of every tile that computes h."""
    named = {(name[2], name[3]): steps(arch, name) for name in kernels(arch) if name[:2] == (kind, dtype)}
    return {tile: found[0] for tile, found in named.items() if tile[1]}


def gated_steps(arch: str, dtype: str, kind: str = sass.LINEAR) -> dict[tuple[int, int], Loop]:
    """The loop over h and up of every tile with two pairs."""
    return {name[2:]: steps(arch, name)[-1] for name in kernels(arch) if name[:2] == (sass.GATED + kind, dtype)}


def warps_of(rows: int, rank: int) -> int:
    """Of a gated tile."""
    return 8 if rank > 128 or (rows == 128 and rank) else 4


needs_extension = pytest.mark.skipif(not native.LIBRARY.exists(), reason="no nvcc on this machine, so no extension")


@pytest.fixture(params=["sm_80", "sm_90a"])
def arch(request) -> str:
    return request.param


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_issues_little_beside_its_products_and_no_more_than_cutlass(arch: str, dtype: str) -> None:
    for (rows, rank), step in linear_steps(arch, dtype, sass.GATED + sass.LINEAR).items():
        assert step.rest <= OWN + PER_COPY * (rows + rank) * 8 / (32 * warps_of(rows, rank)), (rows, rank, step.rest)
    found = linear_steps(arch, dtype)
    assert len(found) == 15
    for (rows, rank), step in found.items():
        copies = (rows + rank) * 8 / (256 if rows == 128 and rank > 128 else 128)
        assert step["LDGSTS"] == copies, (rows, rank)
        assert step.rest <= OWN + PER_COPY * copies, (rows, rank, step.rest)
        assert step.until_first_fragment <= 24, "the copies of the next step come after the first products"
        if rows == 128 and rank >= 96:
            assert step.slots <= 2.0 * step["HMMA"], (rows, rank, step.slots)
        if rows == 64 and rank >= 128:
            assert step.slots <= 2.5 * step["HMMA"], (rows, rank, step.slots)
        if (rows, rank) in CUTLASS_SLOTS:
            assert step.slots <= CUTLASS_SLOTS[rows, rank] * 1.02, (rows, rank, step.slots)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_with_a_streamed_h_issues_little_beside_its_products(arch: str, dtype: str) -> None:
    for rows in (64, 128):
        (step,) = steps(arch, (sass.LINEAR, dtype, rows, 0))
        # What a column tile needs anew, its last step does.
        assert step.rest - step.skipped <= OWN + PER_COPY * step["LDGSTS"], (rows, step.rest, step.skipped)
        assert step.skipped <= 24
        assert step.control <= 3 and not step.guarded("HMMA"), (rows, step.counts)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [sass.LINEAR, sass.BACKWARD])
def test_a_step_of_two_pairs_issues_little_beside_its_products(arch: str, dtype: str, kind: str) -> None:
    """The panels of h and up of both, behind one barrier."""
    found = gated_steps(arch, dtype, kind)
    assert len(found) == {sass.LINEAR: 9, sass.BACKWARD: 5}[kind]
    for (rows, rank), step in found.items():
        warps = warps_of(rows, rank)
        assert step["BAR"] == 1 and step["LDGSTS"] == (128 + (0 if rank else 2 * rows)) * 8 / (32 * warps), (rows, rank)
        assert step["HMMA"] == 4 * rows * 128 / (16 * 8 * warps), (rows, rank)
        own = OWN_OF_TWO + (0 if rank else 10)  # streamed panels of h are counted anew for each tile
        assert step.rest - step.skipped <= own + PER_COPY * step["LDGSTS"], (rows, rank, step.rest, step.skipped)
        assert step.control <= 3 and not step.guarded("HMMA"), (rows, rank, step.counts)


@needs_extension
def test_the_model_knows_what_a_step_of_two_pairs_issues(arch: str) -> None:
    slots = model()
    own = slots["own"] + slots["kSecondPairSlots"]
    for tile, step in gated_steps(arch, "bfloat16").items():
        predicted = step["HMMA"] + step["LDSM"] + own + slots["per_copy"] * step["LDGSTS"]
        assert predicted == pytest.approx(step.slots - step.skipped, rel=0.12), (tile, step.slots, step.skipped)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [sass.LINEAR, sass.BACKWARD])
def test_the_model_knows_what_pivots_cost(arch: str, dtype: str, kind: str) -> None:
    """The loop over tiles has the end of a tile in it: beside that of plain factors, with all branches."""
    of_eight = model()["kPivotSlots"]
    for rank in (64, 128, 256):
        plain, pivoted = (steps(arch, (of + kind, dtype, 64, rank))[-1] for of in ("", sass.PIVOTED))
        assert pivoted["HMMA"] == plain["HMMA"] and not pivoted.guarded("HMMA")
        eights = 64 * 128 / 8 / 128  # of a thread
        assert pivoted.slots - plain.slots == pytest.approx(of_eight * eights, rel=0.1), (rank, kind)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_step_of_pivoted_layers_is_that_of_plain_ones(arch: str, dtype: str) -> None:
    plain = linear_steps(arch, dtype)
    for tile, step in linear_steps(arch, dtype, sass.PIVOTED + sass.LINEAR).items():
        assert step["LDGSTS"] == plain[tile]["LDGSTS"] and step.slots <= plain[tile].slots + 24, tile


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_in_a_step_is_conditional_but_the_end_of_the_copies(arch: str, dtype: str) -> None:
    for tile, step in linear_steps(arch, dtype).items():
        assert step.control <= (2 if arch == "sm_80" else 1), (tile, step.counts)  # on sm_80, loops are left by a call
        assert not step["WARPSYNC"] and not step.guarded("HMMA") and not step.guarded("LDSM"), tile


def listed_steps(arch: str) -> dict[tuple[int, int], tuple[Loop, int, int]]:
    """The loop over windows and filters of every tile that lists the taps, its copies of x and of filters."""
    return {
        name[2:]: (steps(arch, name)[0], name[2] * 8 // 128, name[3] * 8 // 128)
        for name in kernels(arch)
        if name[:2] == ("chunks", "bfloat16")
    }


@needs_extension
def test_a_step_of_a_convolution_issues_three_slots_for_a_copy(arch: str) -> None:
    found = listed_steps(arch)
    assert len(found) == 11
    for tile, (step, of_x, of_filters) in found.items():
        assert step["LDGSTS"] == of_x + of_filters, tile
        assert step.rest <= OWN_LISTED + 3 * of_x + PER_COPY * of_filters, (tile, step.rest)
        assert step.control <= (3 if arch == "sm_80" else 1), (tile, step.counts)
    assert found[128, 64][0].slots <= CUTLASS_WINDOW_SLOTS


@needs_extension
def test_the_model_knows_what_a_step_of_a_convolution_issues(arch: str) -> None:
    own, per_copy = step_slots("kListedStep")
    for tile, (step, of_x, of_filters) in listed_steps(arch).items():
        predicted = step["HMMA"] + step["LDSM"] + own + per_copy * of_x + model()["per_copy"] * of_filters
        assert predicted == pytest.approx(step.slots, rel=0.12), (tile, step.slots)


def depthwise_taps(arch: str) -> dict[sass.Name, tuple[Loop, int]]:
    """The loop over the taps of every depthwise tile, and the pixels of a thread."""
    return {
        name: (next(loop for loop in found if loop["FFMA"] >= 16), name[2] // (32 if name[2:] == (128, 256) else 16))
        for name, found in kernels(arch).items()
        if name[0] == "depthwise"
    }


@needs_extension
def test_a_depthwise_tap_issues_at_most_three_slots_a_product(arch: str) -> None:
    found = depthwise_taps(arch)
    assert len(found) == 14
    for name, (tap, pixels) in found.items():
        assert tap["FFMA"] == 8 * pixels and tap["LDG"] == pixels, name
        assert tap.slots <= (3.4 if pixels == 2 else 3.0) * tap["FFMA"], (name, tap.slots)
        assert tap.control == 1, (name, tap.counts)


@needs_extension
def test_all_pixels_of_a_depthwise_tap_are_asked_for_before_the_first_is_used(arch: str) -> None:
    for name, (tap, pixels) in depthwise_taps(arch).items():
        opcodes = [each.name for each in tap.body]
        assert opcodes[: opcodes.index("FFMA")].count("LDG") == pixels, name


@needs_extension
def test_the_model_knows_what_a_depthwise_tap_issues(arch: str) -> None:
    own, per_pixel = step_slots("kDepthwiseStep")
    for name, (tap, pixels) in depthwise_taps(arch).items():
        assert own + per_pixel * pixels == pytest.approx(tap.slots, rel=0.1), (name, tap.slots)


@needs_extension
def test_nothing_multiplies_under_a_condition_but_grouped_convolutions(arch: str) -> None:
    for name, found in kernels(arch).items():
        if name[0] not in ("analytic", "numbers"):
            assert not any(loop.guarded("HMMA") or loop["WARPSYNC"] for loop in found if loop["HMMA"]), name


def model() -> dict[str, float]:
    """The numbers of csrc/select/kernel_slots.h."""
    text = SLOTS.read_text()
    numbers = {name: float(value) for name, value in re.findall(r"(k\w+Slots) = ([\d.]+)", text)}
    numbers |= {
        f"{function} {name}": float(value)
        for function, cases in re.findall(r"double (\w+)_slots\(Activation.*?\{(.*?)\n\}", text, re.DOTALL)
        for name, value in re.findall(r"case Activation::(\w+): return ([\d.]+);", cases)
    }
    own, per_copy = step_slots("kPanelStep")
    return numbers | {"own": own, "per_copy": per_copy}


def step_slots(name: str) -> tuple[float, float]:
    own, per_copy = re.search(rf"{name}\{{([\d.]+), ([\d.]+)\}}", SLOTS.read_text()).groups()
    return float(own), float(per_copy)


@needs_extension
def test_the_model_knows_what_a_step_issues(arch: str) -> None:
    slots = model()
    for tile, step in linear_steps(arch, "bfloat16").items():
        predicted = step["HMMA"] + step["LDSM"] + slots["own"] + slots["per_copy"] * step["LDGSTS"]
        assert predicted == pytest.approx(step.slots, rel=0.2), (tile, step.slots)


def predicted(slots: dict[str, float], tile: Loop, end: End) -> float:
    """By the model, what a warp issues for a column tile: two steps, and the end of its numbers."""
    eights = tile["HMMA"] / 16  # two panels, each 4 products for a fragment of 16 x 8
    each = slots["kStoreSlots"] + slots[f"activation {end.activation}"]
    each += end.bias * slots["kBiasSlots"] + end.residual * slots["kResidualSlots"]
    copies = 16  # of two panels of up
    return tile["HMMA"] + tile["LDSM"] + 2 * slots["own"] + copies * slots["per_copy"] + eights * each


@needs_extension
def test_the_model_knows_what_a_column_tile_issues(arch: str) -> None:
    slots = model()
    for end, tile in ends(arch).items():
        if not spills(tile):
            assert predicted(slots, tile, end) == pytest.approx(tile.slots, rel=0.08), (end, tile.slots)


@needs_extension
def test_the_model_knows_what_a_backward_column_tile_issues(arch: str) -> None:
    slots, found = model(), backward_ends(arch)
    assert len(found) == 5
    for end, tile in found.items():
        each = slots["kStoreSlots"] + slots["kResidualSlots"] + slots[f"derivative {end.activation}"]
        each += end.sums * slots["kRowSumSlots"]
        steps_of_up = 2 * slots["own"] + 16 * slots["per_copy"]
        expected = tile["HMMA"] + tile["LDSM"] + steps_of_up + tile["HMMA"] / 16 * each
        assert expected == pytest.approx(tile.slots, rel=0.08), (end, tile.slots)


def few_rows_loops(arch: str) -> dict[sass.Name, tuple[Loop, int, int]]:
    """The loop over two batches of weights of the kernels for a few rows, its chunks and its eights of rows."""
    found = {}
    for name, of_kernel in kernels(arch).items():
        if name[0].endswith((sass.SHRINK, sass.EXPAND)):
            eights = name[2] // 8
            (loop,) = (loop for loop in of_kernel if loop["HMMA"])
            found[name] = loop, loop["HMMA"] // (2 * eights), eights
    return found


@needs_extension
def test_a_few_rows_cost_little_beside_the_loads_of_their_weights(arch: str) -> None:
    """By chunk of 16 rows and 32 columns, two loads of 16 bytes a lane."""
    slots, found = model(), few_rows_loops(arch)
    assert len(found) == 36
    for name, (loop, chunks, eights) in found.items():
        shrinks = name[0].endswith(sass.SHRINK)
        of_tokens = slots["kTokenSlots" if shrinks else "kStagedTokenSlots"]
        assert loop["LDG"] == 2 * chunks + (chunks * eights if shrinks else 0), name
        assert chunks * (slots["kWeightSlots"] + eights * of_tokens) == pytest.approx(loop.slots, rel=0.15), name
        assert loop.slots <= chunks * (12 + eights * (21 if shrinks else 13)), (name, loop.slots)
        assert loop.control == 1 and not loop.guarded("HMMA"), (name, loop.counts)


@needs_extension
def test_an_end_issues_little_for_a_number(arch: str) -> None:
    found = ends(arch)
    assert len(found) == 14
    for rows in (64, 128):
        bare = found[End(rows, "none", False, False)]
        eights = bare["STG"]
        assert bare.rest <= 14 * eights + 2 * OWN + PER_COPY * bare["LDGSTS"], bare.rest
        assert bare.control <= (2 if arch == "sm_80" else 1)
        for end, tile in found.items():
            if end.rows == rows and not spills(tile):
                name = "bias" if end.bias else "residual" if end.residual else end.activation
                allowed = MOST_OF_END.get(name, 0)
                assert tile.slots - bare.slots <= allowed * eights, (end, (tile.slots - bare.slots) / eights)
                special = {"gelu": 1, "gelu_tanh": 2, "silu": 2}.get(end.activation, 0)  # of the special functions
                assert tile["MUFU"] == 8 * eights * special


def spills(tile: Loop) -> bool:
    """As a kernel for a residual alone does where the real one, which has all ends, does not (test_sass.py)."""
    return bool(tile["LDL"])
