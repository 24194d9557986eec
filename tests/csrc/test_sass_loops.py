"""The steady loops of the matrix kernels issue little beside their products, and what select's model says they do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shrank.ops import native

from . import sass
from .sass_loops import Loop, ends, kernels, loops, steps

ROOT = Path(__file__).parents[2]
DTYPES = ("bfloat16", "float16")
# CUTLASS 4.7, device::Gemm, bf16, 16-byte alignment, warps of 32x64 (64x128) and 64x64 (128x128): slots of a step of 64
# columns, counted once from its SASS.
CUTLASS_SLOTS = {(64, 128): 205, (128, 128): 300}
OWN, PER_COPY = 40, 7  # slots beside products, fragments and barrier: at most so many, and so many for every copy

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


def test_code_without_loops_has_none() -> None:
    assert loops(PLANTED.split(".L_x_1:")[0]) == []


def linear_steps(arch: str, dtype: str) -> dict[tuple[int, int], Loop]:
    """The loop over x and down of every tile that computes h."""
    named = {(name[2], name[3]): steps(arch, name) for name in kernels(arch) if name[:2] == (sass.LINEAR, dtype)}
    return {tile: found[0] for tile, found in named.items() if tile[1]}


needs_extension = pytest.mark.skipif(not native.LIBRARY.exists(), reason="no nvcc on this machine, so no extension")


@pytest.fixture(params=["sm_80", "sm_90a"])
def arch(request) -> str:
    return request.param


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_issues_little_beside_its_products_and_no_more_than_cutlass(arch: str, dtype: str) -> None:
    found = linear_steps(arch, dtype)
    assert len(found) == 15
    for (rows, rank), step in found.items():
        copies = (rows + rank) * 8 / (256 if rows == 128 and rank > 128 else 128)
        assert step["LDGSTS"] == copies, (rows, rank)
        assert step.rest <= OWN + PER_COPY * copies, (rows, rank, step.rest)
        if (rows, rank) in CUTLASS_SLOTS:
            assert step.slots <= CUTLASS_SLOTS[rows, rank] * 1.02, (rows, rank, step.slots)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_in_a_step_is_conditional_but_the_end_of_the_copies(arch: str, dtype: str) -> None:
    for tile, step in linear_steps(arch, dtype).items():
        # One past the last copies, one back; on sm_80 loops are left by a call.
        assert step.control <= (3 if arch == "sm_80" else 2), (tile, step.counts)
        assert not step["WARPSYNC"] and not step.guarded("HMMA") and not step.guarded("LDSM"), tile


@needs_extension
def test_no_linear_kernel_multiplies_under_a_condition(arch: str) -> None:
    for name, found in kernels(arch).items():
        if name[0] == sass.LINEAR:
            assert not any(loop.guarded("HMMA") or loop["WARPSYNC"] for loop in found if loop["HMMA"]), name


def model() -> dict[str, float]:
    """The numbers of csrc/select/kernel_slots.h."""
    text = (ROOT / "csrc/select/kernel_slots.h").read_text()
    numbers = {name: float(value) for name, value in re.findall(r"(k\w+Slots) = ([\d.]+)", text)}
    numbers |= {
        f"activation {name}": float(value) for name, value in re.findall(r"case Activation::(\w+): return (\d+);", text)
    }
    own, per_copy = re.search(r"kPanelStep\{([\d.]+), ([\d.]+)\}", text).groups()
    return numbers | {"own": float(own), "per_copy": float(per_copy)}


@needs_extension
def test_the_model_knows_what_a_step_issues(arch: str) -> None:
    slots = model()
    for tile, step in linear_steps(arch, "bfloat16").items():
        predicted = step["HMMA"] + step["LDSM"] + slots["own"] + slots["per_copy"] * step["LDGSTS"]
        assert predicted == pytest.approx(step.slots, rel=0.2), (tile, step.slots)


@needs_extension
@pytest.mark.parametrize("rows", [64, 128])
def test_the_model_knows_what_an_end_issues(arch: str, rows: int) -> None:
    """Of the loops over 8 numbers, each with bias, z and residual: one for every activation."""
    slots = model()
    found = ends(arch, (sass.LINEAR, "bfloat16", rows, 128))
    counted = sorted({loop.slots for loop in found})
    with_all = slots["kStoreSlots"] + slots["kBiasSlots"] + slots["kResidualSlots"] + slots["kPreactivationSlots"]
    for name in ("none", "relu", "gelu", "gelu_tanh", "silu"):
        predicted = with_all + slots[f"activation {name}"]
        assert min(abs(predicted / each - 1) for each in counted) <= 0.1, (name, predicted, counted)
    assert max(counted) <= 200, "GELU by erf took 300 of them"
