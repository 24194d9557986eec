"""What nvcc made of the matrix kernels: tensor cores, asynchronous copies, no spill, within every limit."""

from __future__ import annotations

import re
import shutil
from itertools import product

import pytest

from . import sass

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine, so no kernels")
DTYPES = ("bfloat16", "float16")


@pytest.fixture(params=sass.ARCHS)
def arch(request) -> str:
    return request.param


def test_every_tile_is_compiled_for_every_architecture(dev, arch) -> None:
    wanted = {sass.name_of(tile, dtype) for dtype, tile in product(DTYPES, sass.tiles_of(dev))}
    assert set(sass.kernels(arch)) == wanted


def test_no_kernel_spills(arch) -> None:
    for name, kernel in sass.kernels(arch).items():
        assert (kernel.stack, kernel.local) == (0, 0), name
        assert not {"LDL", "STL"} & set(kernel.instructions), name


def test_products_run_on_tensor_cores_and_panels_come_by_asynchronous_copies(arch) -> None:
    for name, kernel in sass.kernels(arch).items():
        used = kernel.instructions
        if name[0].endswith((sass.SHRINK, sass.EXPAND)):  # weights go from memory straight to registers
            assert used["HMMA"] and used["LDG"] and not used["LDSM"] and not used["LDGSTS"], (name, used)
        else:
            assert used["HMMA"] and used["LDSM"] and used["LDGSTS"] and used["LDGDEPBAR"], (name, used)
        if name[0] == sass.LINEAR and name[2] != 32:
            assert used["HMMA"] >= 2 * used["LDSM"], "a loaded fragment serves two products at least"
        assert bool(used["ACQBULK"]) == (arch in ("sm_90a", "sm_100")), "griddepcontrol begins with sm_90"
        assert not {"FADD64", "DFMA", "DADD", "DMUL"} & set(used), f"{name} computes in fp64"


@pytest.mark.parametrize("model", sass.CARDS)
def test_every_kernel_fits_where_select_lets_it_run(dev, model: str) -> None:
    capability = divmod(int(model.strip("sma_")), 10)
    card = dev.select.Device.from_attributes(
        "Some GPU", *capability, 100, 1500000, 5000000, 256, 1 << 22, sass.SHARED_OF_BLOCK[model] * 1024
    )
    fitting = [tile for tile in sass.tiles_of(dev) if tile.shared_bytes <= card.smem_per_block]
    for tile in fitting:
        assert why_not(dev, tile, card) is None
        for dtype in DTYPES:
            kernel = sass.kernel_on(model, sass.name_of(tile, dtype))
            assert sass.blocks_per_sm(model, kernel, tile.threads, tile.shared_bytes) >= 1
    assert len(fitting) >= 28


def why_not(dev, tile, card) -> str | None:
    """Of a problem that the tile may serve."""
    kind, _, _, rank = sass.name_of(tile, "bfloat16")
    gate = {"gate_R": 64 * kind.startswith(sass.GATED), "pivoted": sass.PIVOTED in kind}
    kind = kind.split()[-1]
    if kind == sass.LINEAR:
        problem = dev.select.LinearProblem(512, 768, 768, rank or 96, **gate)
        return dev.select.linear_why_not(problem, card, tile.holds_h)
    if kind == sass.BACKWARD:
        problem = dev.select.LinearProblem(512, 768, 768, rank or 96, activation="gelu", **gate)
        return next(each.why_not for each in dev.select.backward_candidates(problem, card) if each.kernel == "fused")
    if kind in (sass.SHRINK, sass.EXPAND):
        candidates = dev.select.candidates(dev.select.LinearProblem(tile.block_m, 768, 768, 96, **gate), card)
        return next(each.why_not for each in candidates if each.kernel == "shrink_expand")
    C, groups = {"chunks": (64, 1), "analytic": (64, 4), "numbers": (3, 1), "depthwise": (rank, rank)}[kind]
    return dev.select.conv_why_not(dev.select.ConvProblem(2, C, 64, rank, (1, 16, 16), (1, 3, 3), groups=groups), card)


@pytest.mark.parametrize("model", sass.CARDS)
def test_enough_blocks_stream_up_at_a_time(dev, model: str) -> None:
    """Blocks of the second kernel on an SM, as its launch bounds promise and its shared memory allows."""
    tiles = [tile for tile in sass.tiles_of(dev) if getattr(tile, "gather", "").endswith(sass.EXPAND)]
    for tile, dtype in product(tiles, DTYPES):
        kernel = sass.kernel_on(model, sass.name_of(tile, dtype))
        fit = sass.SHARED_OF_SM[model] * 1024 // (tile.shared_bytes + 1024)
        assert sass.blocks_per_sm(model, kernel, tile.threads, tile.shared_bytes) >= min(3, fit)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100"])
def test_weights_of_the_second_kernel_are_asked_for_before_it_waits(arch: str) -> None:
    """All that is on its way at a time: 2 batches of 4 or 2 chunks, of all pairs, each of two rows for a lane."""
    found = {}
    for part in sass.functions(sass.disassembled(arch)):
        if (name := sass.name_in(part.split("\n", 1)[0])) and name[0].endswith(sass.EXPAND):
            before, _ = part.split("ACQBULK", 1)
            found[name[:3]] = len(re.findall(r"LDG\.E\.\S*LTC128B\.128", before))
    kinds = [of + sass.EXPAND for of in (*sass.OF_FORM, sass.MULTI, sass.MULTI + sass.PIVOTED)]
    assert found == {
        (kind, dtype, tokens): 2 * 2 * (4 if tokens == 8 else 2)
        for kind, dtype, tokens in product(kinds, DTYPES, (8, 16))
    }


def test_two_blocks_of_four_warps_share_an_sm90(dev) -> None:
    """But for depthwise kernels that hold an h of high rank."""
    for tile, dtype in product(sass.tiles_of(dev), DTYPES):
        kernel = sass.kernels("sm_90a")[sass.name_of(tile, dtype)]
        blocks = sass.blocks_per_sm("sm_90a", kernel, tile.threads, tile.shared_bytes)
        assert blocks >= (2 if tile.threads == 128 and tile.shared_bytes <= 113 << 10 else 1), tile


def test_the_table_in_the_readme_is_of_these_kernels(dev) -> None:
    """Other versions of nvcc allocate other registers; the table says which one it is of."""
    text = sass.README.read_text()
    if f"By nvcc {sass.nvcc_version()}," in text:
        assert text == sass.written(text, sass.tiles_of(dev)), "python -m tests.csrc.sass"
