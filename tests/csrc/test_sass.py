"""What nvcc made of the matrix kernels: tensor cores, asynchronous copies, no spill, within every limit."""

from __future__ import annotations

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
    wanted = {(dtype, tile.block_m, tile.max_rank) for dtype, tile in product(DTYPES, dev.select.LINEAR_TILES)}
    assert set(sass.kernels(arch)) == wanted


def test_no_kernel_spills(arch) -> None:
    for name, kernel in sass.kernels(arch).items():
        assert (kernel.stack, kernel.local) == (0, 0), name
        assert not {"LDL", "STL"} & set(kernel.instructions), name


def test_products_run_on_tensor_cores_and_panels_come_by_asynchronous_copies(arch) -> None:
    for name, kernel in sass.kernels(arch).items():
        used = kernel.instructions
        assert used["HMMA"] and used["LDSM"] and used["LDGSTS"] and used["LDGDEPBAR"], (name, used)
        assert used["HMMA"] >= 2 * used["LDSM"] or name[1] == 32, "a loaded fragment serves two products at least"
        assert bool(used["ACQBULK"]) == (arch in ("sm_90a", "sm_100")), "griddepcontrol begins with sm_90"
        assert not {"FADD64", "DFMA", "DADD", "DMUL"} & set(used), f"{name} computes in fp64"


def test_every_kernel_fits_where_select_lets_it_run(dev, arch) -> None:
    capability = divmod(int(arch.strip("sma_")), 10)
    card = dev.select.Device.from_attributes("Some GPU", *capability, 100, 1500000, 5000000, 256, 1 << 22,
                                             sass.SHARED_OF_BLOCK[arch] * 1024)
    legal = 0
    for tile in dev.select.LINEAR_TILES:
        rank = tile.max_rank or 96
        problem = dev.select.Problem(512, 768, 768, rank)
        if tile.shared_bytes > card.smem_per_block:
            continue
        legal += 1
        assert dev.select.linear_why_not(problem, card, tile.holds_h) is None
        for dtype in DTYPES:
            kernel = sass.kernels(arch)[dtype, tile.block_m, tile.max_rank]
            assert sass.blocks_per_sm(arch, kernel, tile.threads, tile.shared_bytes) >= 1
    assert legal >= 10


def test_two_blocks_of_four_warps_share_an_sm90(dev) -> None:
    for tile in dev.select.LINEAR_TILES:
        for dtype in DTYPES:
            kernel = sass.kernels("sm_90a")[dtype, tile.block_m, tile.max_rank]
            blocks = sass.blocks_per_sm("sm_90a", kernel, tile.threads, tile.shared_bytes)
            assert blocks >= (2 if tile.threads == 128 else 1), tile


def test_the_table_in_the_readme_is_of_these_kernels(dev) -> None:
    """Other versions of nvcc allocate other registers; the table says which one it is of."""
    text = sass.README.read_text()
    if f"By nvcc {sass.nvcc_version()}," in text:
        assert text == sass.written(text, dev.select.LINEAR_TILES), "python -m tests.csrc.sass"
