"""On which grid a kernel runs: every element is covered, every limit kept."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from .test_select import TOKENS

ADDRESSING = [("bfloat16", True), ("float16", True), ("float32", True), ("float64", True), ("float16", False)]


# ---- the matrix kernels


@pytest.mark.parametrize(
    ("fused", "deviation", "reason"),
    [
        (True, dict(dtype="float32"), "bfloat16 and float16"),
        (False, dict(dtype="float64"), "bfloat16 and float16"),
        (True, dict(K=100), "multiples of 8"),
        (True, dict(N=4), "multiples of 8"),
        (False, dict(R=12), "multiples of 8"),
        (True, dict(aligned=False), "multiple of 16 bytes"),
        (False, dict(aligned=False), "multiple of 16 bytes"),
        (True, dict(R=264), "R is above 256"),
        (True, dict(gate_R=264), "R is above 256"),
        (False, dict(gate_R=12), "multiples of 8"),
        (False, dict(M=0), "zero"),
        (True, dict(R=0), "zero"),
        (False, dict(M=1 << 31), r"2\^31"),
        (True, dict(gpu=(7, 5)), "compute capability 8.0"),
        (True, dict(smem=48 << 10), "more shared memory"),
        (False, dict(smem=48 << 10), "more shared memory"),
    ],
)
def test_a_matrix_kernel_that_may_not_run_says_why(dev, fused, deviation, reason) -> None:
    sizes = {"M": 512, "K": 768, "N": 768, "R": 96, **deviation}
    arch, smem = sizes.pop("gpu", (9, 0)), sizes.pop("smem", 227 << 10)
    card = dev.select.Device.from_attributes("Some GPU", *arch, 132, 1980000, 3201000, 6144, 60 << 20, smem)
    problem = dev.select.LinearProblem(**sizes)
    assert reason.replace("\\", "") in dev.select.linear_why_not(problem, card, fused)
    with pytest.raises(ValueError, match=reason):
        dev.select.linear_grid(problem, card, fused)
    told = {c.kernel: c.why_not for c in dev.select.candidates(problem, card)}
    assert told["fused" if fused else "gemm_expand"] == dev.select.linear_why_not(problem, card, fused)
    assert dev.select.select(problem, card).kernel not in ("fused" if fused else "gemm_expand",)


@pytest.mark.parametrize("fused", [True, False])
def test_the_grid_covers_the_problem_with_a_tile_that_fits(dev, gpu, fused) -> None:
    for (K, N), R, M in product([(768, 3072), (4096, 4096), (64, 8)], (8, 64, 72, 96, 128, 192, 256), TOKENS):
        grid = dev.select.linear_grid(dev.select.LinearProblem(M, K, N, R), gpu, fused)
        assert (grid.blocks_m - 1) * grid.tile.block_m < M <= grid.blocks_m * grid.tile.block_m
        assert 1 <= grid.blocks_n <= min(64, -(-N // 128))
        assert grid.tile.shared_bytes <= gpu.smem_per_block and (grid.tile.holds_h or not fused)
        if grid.tile.holds_h:
            fitting = [t.max_rank for t in dev.select.LINEAR_TILES if t.max_rank >= R]
            assert grid.tile.max_rank == min(fitting)


@pytest.mark.parametrize("fused", [True, False])
def test_the_grid_of_a_gated_layer_holds_the_larger_rank(dev, gpu, fused) -> None:
    for (R, gate), M in product([(8, 8), (64, 72), (128, 16), (16, 200), (256, 256)], TOKENS):
        problem = dev.select.LinearProblem(M, 768, 3072, R, activation="silu", gate_R=gate)
        if fused and max(R, gate) > 128 and gpu.smem_per_block < 128 << 10:
            assert "more shared memory" in dev.select.linear_why_not(problem, gpu, fused), "h of both ranks"
            continue
        grid = dev.select.linear_grid(problem, gpu, fused)
        assert grid.tile.pairs == 2 and grid.tile.shared_bytes <= gpu.smem_per_block
        assert (grid.blocks_m - 1) * grid.tile.block_m < M <= grid.blocks_m * grid.tile.block_m
        assert 1 <= grid.blocks_n <= min(64, -(-3072 // 64)) and (grid.tile.holds_h or not fused)
        if grid.tile.holds_h:
            fitting = [t.max_rank for t in dev.select.GATED_TILES if t.max_rank >= max(R, gate)]
            assert grid.tile.max_rank == min(fitting)


# ---- the epilogue


def cover(tile, M: int, N: int) -> np.ndarray:
    """How often each element of y is written, by the loop in select.h."""
    counts = np.zeros((M, N), dtype=int)
    columns = np.arange(tile.blocks_n * tile.threads_n) * tile.vector
    for column in columns[columns < N]:
        assert column + tile.vector <= N
        for row in range(tile.blocks_m * tile.threads_m):
            counts[row :: tile.blocks_m * tile.threads_m, column : column + tile.vector] += 1
    return counts


@pytest.mark.parametrize(("dtype", "aligned"), ADDRESSING)
def test_the_epilogue_writes_every_element_once(dev, dtype, aligned) -> None:
    b200 = dev.select.device("B200")
    for M, N in product((1, 3, 40), [*range(1, 34), 64, 96, 255, 257, 520]):
        tile = dev.select.epilogue_tile(dev.select.LinearProblem(M, 8, N, 4, dtype=dtype, aligned=aligned), b200)
        assert (cover(tile, M, N) == 1).all(), (M, N)


@pytest.mark.parametrize(("dtype", "aligned"), ADDRESSING)
def test_the_epilogue_grid_stays_within_its_limits(dev, gpu, dtype, aligned) -> None:
    widest = 16 // {"float64": 8, "float32": 4}.get(dtype, 2) if aligned else 1
    for M, N in product((1, 7, 129, 4096, 1 << 24), [*range(1, 300), *range(4096, 4113), 14336, 50257, 1 << 20]):
        tile = dev.select.epilogue_tile(dev.select.LinearProblem(M, 8, N, 4, dtype=dtype, aligned=aligned), gpu)
        assert tile.vector == (widest if N % widest == 0 else 1)
        assert tile.threads_n in (8, 16, 32, 64, 128, 256) and tile.threads_n * tile.threads_m == 256
        assert 1 <= tile.blocks_n < 1 << 31 and 1 <= tile.blocks_m <= 65535
        vectors = -(-N // tile.vector)
        lanes = {width: -(-vectors // width) * width for width in (8, 16, 32, 64, 128, 256)}
        thrifty = [width for width in lanes if 8 * (lanes[width] - vectors) <= lanes[width]]
        fewest = [width for width in lanes if lanes[width] == min(lanes.values())]
        assert tile.threads_n == max(thrifty or fewest)
        assert tile.blocks_n * tile.threads_n == lanes[tile.threads_n]
        assert (tile.blocks_m - 1) * tile.threads_m < M, "a block without a row"
        full = tile.blocks_m * tile.threads_m >= M  # every row has its thread: nothing to fill the machine with
        assert full or 8 * gpu.sms <= tile.blocks_n * tile.blocks_m < 8 * gpu.sms + tile.blocks_n


@pytest.mark.parametrize(("M", "N"), [(0, 64), (64, 0), (0, 0)])
def test_the_epilogue_of_nothing_has_no_blocks(dev, gpu, M, N) -> None:
    tile = dev.select.epilogue_tile(dev.select.LinearProblem(M, 8, N, 4), gpu)
    assert (tile.blocks_n, tile.blocks_m) == (0, 0)
