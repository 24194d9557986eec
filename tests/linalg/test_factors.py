"""Cost formulas against modules that are counted."""

from __future__ import annotations

import pytest
from torch import nn

from shrank.layers.ced import CED
from shrank.layers.led import LED
from shrank.linalg import Grid, Quantized, Shape, Storage, nearest
from tests.common.models import draw


def weights(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("rank", [1, 5])
def test_linear_costs_what_its_modules_hold(rank: int) -> None:
    shape = Shape(30, 20)
    assert shape.params(None) == shape.dense_params == weights(nn.Linear(20, 30))
    assert shape.params(rank) == shape.low_rank_params(rank) == weights(LED(20, 30, rank))
    assert shape.flops(rank) == 2 * shape.params(rank)


@pytest.mark.parametrize(("groups", "groups_out"), [(1, False), (4, False), (4, True)])
def test_convolution_costs_what_its_modules_hold(groups: int, groups_out: bool) -> None:
    shape = Shape(12, 8 * 3 * 5, groups, groups, groups if groups_out else 1)
    assert shape.dense_params == weights(nn.Conv2d(8, 12, (3, 5), groups=groups))
    assert shape.low_rank_params(4) == weights(CED(8, 12, 4, (3, 5), groups=groups, groups_out=groups_out))


def test_break_even_is_the_last_rank_that_does_not_grow() -> None:
    for shape in (Shape(384, 384), Shape(64, 64 * 9), Shape(7, 5), Shape(64, 288, 4, 4), Shape(64, 288, 4, 4, 4)):
        rank = shape.break_even_rank
        assert shape.low_rank_params(rank) <= shape.dense_params < shape.low_rank_params(rank + 1)
    assert Shape(64, 64 * 9).break_even_rank == 57  # a formula without the kernel gives 32


def test_max_rank_is_where_the_blocks_are_full() -> None:
    assert Shape(30, 20).max_rank == 20
    assert Shape(64, 288, 4, 4).max_rank == 4 * min(16, 72)
    assert Shape(12, 60, 6, 4).max_rank == 4 * min(12, 15)  # 4 does not divide 6: every output in every block


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True), (True, True)])
def test_traffic_is_every_tensor_once(rank: int | None, bias: bool, residual: bool) -> None:
    tokens, shape = 7, Shape(30, 20)
    layer = nn.Linear(20, 30, bias=bias) if rank is None else LED(20, 30, rank, bias=bias)
    x, y = 20 * tokens, 30 * tokens
    moved = x + y * (1 + residual) + sum(p.numel() for p in layer.parameters())
    assert shape.traffic(tokens, rank, bias, residual) == moved


def packed(quantized: Quantized) -> int:
    """Bytes of a matrix that is packed as small as whole bytes in every row allow."""
    rows, columns = quantized.values.shape
    return rows * ((columns * quantized.grid.bits + 7) // 8) + 2 * quantized.scales.numel()


@pytest.mark.parametrize("grid", [Grid(4, 5), Grid(8), Grid(8, 10)], ids=str)
@pytest.mark.parametrize("pivoted", [False, True])
def test_bytes_are_those_of_the_tensors(grid: Grid, pivoted: bool) -> None:
    shape, rank = Shape(30, 20, pivoted=pivoted), 10
    down, up = nearest(draw(rank, 20), grid), nearest(draw(20 if pivoted else 30, rank), grid)
    dense, index = nearest(draw(30, 20), grid), 4 * 30 * pivoted
    assert shape.bytes(None) == 2 * shape.bytes(None, itemsize=1) == 2 * 600
    assert shape.bytes(rank) == 2 * shape.params(rank) + index
    assert shape.bytes(None, Storage(grid)) == packed(dense)
    assert shape.bytes(rank, Storage(grid)) == packed(down) + packed(up) + index
    assert shape.bytes(rank, Storage(grid, True)) == packed(dense) + 2 * shape.params(rank) + index
    assert shape.bytes(rank, Storage(grid, True, grid)) == packed(dense) + packed(down) + packed(up) + index
    assert shape.stored_params(rank, Storage(grid, True)) == 600 + shape.params(rank)


def test_groups_that_fit() -> None:
    shape, of_four = Shape(30, 20), Grid(4, 4)
    assert shape.fits(None, Storage(of_four)) and not Shape(20, 30).fits(None, Storage(of_four))
    assert shape.fits(8, Storage(of_four)) and not shape.fits(10, Storage(of_four))
    assert shape.fits(10, Storage(of_four, True)) and not shape.fits(10, Storage(of_four, True, of_four))
    assert shape.fits(10, Storage(of_four, True, Grid(8)))


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ({"factor_grid": Grid(8)}, "is that of a correction"),
        ({"activations": "int8"}, "give its grid"),
        ({"grid": Grid(8), "activations": "fp8"}, "must be 'int8' or None, got 'fp8'"),
    ],
)
def test_a_storage_that_cannot_be(storage: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Storage(**storage)
