"""The emulator's half of csrc/arch/hopper.cuh and warpgroup.cuh: a kernel of copied tiles and products by four warps,
whole and with one mistake at a time (tests/csrc/emulated/hopper_kernels.cuh)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
SEEDS = range(5)  # 0 and 1: first and last thread first; then warps that run ahead, and lanes that do
STAGES = 3
SHAPES = [(64, 64, 64), (2, 130, 8), (100, 72, 328), (128, 128, 512)]  # 1, 1, 6 and 8 steps of 64 columns
# What the emulator says of each mistake, under every seed; nothing for the one that only the numbers show.
FOUND = {
    "no_barrier_fence": "copy to a barrier whose making was not fenced",
    "no_sync_after_init": "barrier used in no order with its init_barrier|barrier without init_barrier",
    "wrong_parity": "deadlock",
    "no_wait_for_empty": "too many arrivals|write over a copy in flight|write after unordered (read|write)",
    "too_few_bytes": "read of a copy in flight|read after unordered write",
    "no_wait_for_full": "read of uninitialised|read of a copy in flight|read after unordered write",
    "wrong_column_step": "",
    "early_release": "write after unordered read|read of a copy in flight|read after unordered write",
}
# There is nothing to find while no slot is used twice.
NEEDS_REUSE = {"no_wait_for_empty", "early_release"}


def run(
    dev: ModuleType,
    mistake: str,
    shape: tuple[int, int, int],
    seed: int,
    early: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[list[str], float]:
    """The emulator's complaints, and the largest error."""
    rows, columns, depth = shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, depth, generator=generator).to(dtype)
    b = (torch.randn(columns, depth, generator=generator) * depth**-0.5).to(dtype)
    c = torch.full((rows, columns), torch.nan, dtype=dtype)
    result = dev.hopper.tiled_product(
        mistake,
        str(dtype).removeprefix("torch."),
        rows,
        columns,
        depth,
        a.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        seed,
        early,
    )
    error = (c.double() - a.double() @ b.double().T).abs().max().item()
    return result.problems, error


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_clean_and_right(dev: ModuleType, shape, dtype: torch.dtype, early: bool) -> None:
    for seed in SEEDS:
        problems, error = run(dev, "none", shape, seed, early, dtype)
        assert not problems
        assert error < 0.02


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3]], ids=str)
@pytest.mark.parametrize("mistake", FOUND)
def test_a_mistake_is_found_under_every_seed(dev: ModuleType, mistake: str, shape, early: bool) -> None:
    is_one = mistake not in NEEDS_REUSE or shape[2] > STAGES * 64
    for seed in SEEDS:
        problems, error = run(dev, mistake, shape, seed, early)
        if not is_one:
            assert not problems and error < 0.02
        elif FOUND[mistake]:
            assert any(re.search(FOUND[mistake], problem) for problem in problems), problems
        else:
            assert not problems and not error < 0.02


MICRO_FOUND = {
    "product/none": "",
    "product/no_proxy_fence": "stored operand without fence_async_proxy",
    "product/proxy_fence_too_soon": "stored operand without fence_async_proxy",
    "product/no_warpgroup_fence": "product without warpgroup_fence",
    "product/read_before_wait": "",  # only the numbers show it, and only where the products are late
    "product/never_awaited": "product never awaited",
    "product/never_committed": "product never committed",
    "product/stored_while_read": "race: write after unordered read|race: read after unordered write",
    "product/one_warp_differs": "divergent warpgroup instruction",
    "product/one_warp_less": "divergent warpgroup instruction .* issued 3 products",
    "product/unswizzled_operand": "operand refused",
    "tile/none": "",
    "tile/never_awaited": "copy never awaited",
    "tile/not_aligned": "tile copy refused .* not aligned",
    "tile/past_the_matrix": "global memory out of bounds",
    "tile/read_before_wait": "read of a copy in flight|read after unordered write",
    "tile/arrives_twice": "too many arrivals|deadlock",
    "tile/not_made": "barrier without init_barrier",
}


def run_micro(dev: ModuleType, name: str, seed: int, early: bool) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """The complaints, the matrix given and the numbers that came out."""
    given = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    out = torch.full((128,), torch.nan)
    return dev.hopper.micro(name, given.data_ptr(), out.data_ptr(), seed, early).problems, given, out


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("name", MICRO_FOUND)
def test_a_small_kernels_mistake_is_found_under_every_seed(dev: ModuleType, name: str, early: bool) -> None:
    for seed in SEEDS:
        problems, given, out = run_micro(dev, name, seed, early)
        if MICRO_FOUND[name]:
            assert any(re.search(MICRO_FOUND[name], problem) for problem in problems), problems
            continue
        assert not problems
        product = given.double() @ given.double().T
        thread = torch.arange(128)
        answer = product[thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2] if "product" in name else given[:, 0]
        too_soon = name.endswith("read_before_wait") and not early
        assert torch.isnan(out[0]) if too_soon else torch.allclose(out[: len(answer)].double(), answer.double())


def test_all_small_kernels_are_run(dev: ModuleType) -> None:
    assert set(dev.hopper.MICRO) == set(MICRO_FOUND)


def test_a_report_names_both_lines(dev: ModuleType) -> None:
    problems, _ = run(dev, "early_release", (64, 64, 512), 0, True)
    assert re.search(
        r"copy_tile_async at hopper_kernels.cuh:\d+ .*read by thread \d+ at hopper_kernels.cuh:\d+", "\n".join(problems)
    ), problems


def test_all_mistakes_are_tried(dev: ModuleType) -> None:
    assert set(dev.hopper.MISTAKES) == {"none", *FOUND}


@pytest.mark.skipif(NVCC is None, reason="needs nvcc, not a GPU")
def test_nvcc_compiles_it_without_spills(tmp_path: Path) -> None:
    command = [
        NVCC,
        "-std=c++17",
        "-arch=sm_90a",
        "-cubin",
        "-Xptxas=-v",
        "-o",
        tmp_path / "kernels.cubin",
        HERE / "emulated/hopper_kernels.cu",
    ]
    says = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert len(re.findall("Compiling entry function", says)) == 2
    assert len(re.findall("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", says)) == 2
    assert "serialized" not in says  # ptxas's warning C7510, where it cannot keep products in the background
