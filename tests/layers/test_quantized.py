"""Weights on a grid: what torchao computes with them, what conversions keep, and the way into files and back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shrank.layers.quantized import (
    ACTIVATIONS,
    DTYPES,
    activations_of,
    is_quantized,
    packed,
    packed_shapes,
    plain,
    quantized_of,
    quantized_weight,
    unpacked,
)
from shrank.linalg import Grid, Quantized, nearest
from tests.common.tolerances import assert_close

GRIDS = [Grid(8), Grid(8, 16), Grid(4), Grid(4, 16), Grid(3), Grid(3, 16)]
CONVERSIONS = {
    "half": (nn.Module.half, torch.float16),
    "bfloat16": (nn.Module.bfloat16, torch.bfloat16),
    "float": (nn.Module.float, torch.float32),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
}
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on_grid(grid: Grid, columns: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> Quantized:
    return nearest(torch.randn(24, columns, generator=torch.Generator().manual_seed(seed)).to(dtype), grid)


def layer(quantized: Quantized, activations: str | None = None) -> nn.Linear:
    made = nn.Linear(quantized.values.shape[1], len(quantized.values), dtype=quantized.scales.dtype)
    made.weight = quantized_weight(quantized, activations)
    return made.eval()


def same(one: Quantized, other: Quantized) -> bool:
    return one.grid == other.grid and torch.equal(one.values, other.values) and torch.equal(one.scales, other.scales)


@each_dtype
@each_grid
def test_torchao_multiplies_by_what_the_weight_stands_for(grid: Grid, dtype: torch.dtype) -> None:
    held = on_grid(grid, dtype=dtype)
    made, x = layer(held), torch.randn(2, 5, 64).to(dtype)
    weight = held.dequantized()
    exact = linear(x.double(), held.values.double() * scales_of(held), made.bias.double())
    assert_close(made(x), exact, linear(x, weight, made.bias))
    assert is_quantized(made.weight) and not is_quantized(weight) and not made.weight.requires_grad
    assert torch.equal(plain(made.weight), weight) and plain(weight) is weight
    assert same(quantized_of(made.weight), held)


def scales_of(held: Quantized) -> Tensor:
    return held.scales.double().repeat_interleave(held.values.shape[1] // held.scales.shape[1], 1)


def test_large_inputs_do_not_overflow_in_float16() -> None:
    held = on_grid(Grid(8), 256, torch.float16)
    made, x = layer(held), 100 * torch.ones(1, 256, dtype=torch.float16)
    assert made(x).isfinite().all()
    assert_close(made(x), linear(x.double(), held.dequantized().double(), made.bias.double()))


@each_dtype
@each_grid
def test_inputs_of_8_bits(grid: Grid, dtype: torch.dtype) -> None:
    held = on_grid(grid, dtype=dtype)
    made, x = layer(held, "int8"), torch.randn(3, 64).to(dtype)
    assert activations_of(made.weight) == "int8" in ACTIVATIONS
    assert activations_of(layer(held).weight) is None
    coarse, fine = made(x).double(), layer(held)(x).double()
    error = (coarse - fine).norm() / fine.norm()
    assert 0 < error < 4 / 127  # off by half a step of a 127th of the largest, and in 16 bits by rounding of scales


@pytest.mark.parametrize("name", CONVERSIONS)
@each_grid
def test_a_weight_takes_the_dtype_of_its_module(grid: Grid, name: str) -> None:
    convert, dtype = CONVERSIONS[name]
    held = on_grid(grid, dtype=torch.bfloat16)
    made = convert(layer(held, "int8"))
    assert made.weight.dtype is dtype and isinstance(made.weight, nn.Parameter) and not made.weight.requires_grad
    assert activations_of(made.weight) == "int8"
    assert same(quantized_of(made.weight), Quantized(held.values, held.scales.to(dtype), grid))
    assert made(torch.randn(3, 64, dtype=dtype)).dtype is dtype


@each_grid
def test_copies_and_devices(grid: Grid) -> None:
    made = layer(on_grid(grid))
    twin = copy.deepcopy(made)
    assert same(quantized_of(twin.weight), quantized_of(made.weight))
    assert quantized_of(twin.weight).values.data_ptr() != quantized_of(made.weight).values.data_ptr()
    assert twin.to("meta").weight.is_meta
    x = torch.randn(3, 64, requires_grad=True)
    made(x).sum().backward()
    assert_close(x.grad, plain(made.weight).sum(0).expand(3, -1))
    with pytest.raises(TypeError, match="a weight on a grid cannot become"):
        made.weight.to(torch.int64)


@each_grid
def test_compiled_and_exported(grid: Grid) -> None:
    made, x = layer(on_grid(grid)), torch.randn(3, 64)
    wanted = made(x)
    torch._dynamo.reset()
    assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), wanted)
    assert_close(torch.export.export(made, (x,)).module()(x), wanted)


@pytest.mark.parametrize("columns", [64, 63, 1], ids=str)
@each_dtype
@each_grid
def test_packed_and_back(grid: Grid, dtype: torch.dtype, columns: int) -> None:
    if not grid.fits(columns):
        grid = Grid(grid.bits)
    held = on_grid(grid, columns, dtype)
    values, scales = packed(held)
    assert (tuple(values.shape), tuple(scales.shape)) == packed_shapes(24, columns, grid)
    assert values.nbytes + scales.nbytes == grid.bytes(24, columns)
    assert same(unpacked(values, scales, columns, grid, dtype), held)


def test_all_numbers_of_4_bits_in_their_places() -> None:
    held = Quantized(torch.arange(-8, 8, dtype=torch.int8)[None], torch.ones(1, 1), Grid(4))
    values, _ = packed(held)
    assert values[0].tolist() == [0x98, 0xBA, 0xDC, 0xFE, 0x10, 0x32, 0x54, 0x76]
    assert same(unpacked(values, torch.ones(1, 1), 16, Grid(4), torch.float32), held)


@pytest.mark.parametrize(("dtype", "in_file"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)])
def test_scales_of_bfloat16_stay_exact(dtype: torch.dtype, in_file: torch.dtype) -> None:
    scales = torch.tensor([[2.0**-100], [1.0]]).to(dtype)  # beyond float16
    held = Quantized(torch.ones(2, 4, dtype=torch.int8), scales, Grid(8))
    values, stored = packed(held)
    assert stored.dtype is in_file
    assert same(unpacked(values, stored, 4, Grid(8), dtype), held)


def test_scales_that_16_bits_do_not_hold_are_stored_as_they_are() -> None:
    held = Quantized(torch.ones(1, 4, dtype=torch.int8), torch.tensor([[0.1]]), Grid(8))
    assert same(unpacked(*packed(held), 4, Grid(8), torch.float32), held)


GOOD = packed(on_grid(Grid(4, 16)))
DAMAGED: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], str]] = {
    "dtype of values": (lambda v, s: (v.view(torch.int8), s), "values are torch.int8, wanted torch.uint8"),
    "dtype of scales": (lambda v, s: (v, s.to(torch.int32)), "scales are torch.int32, wanted floating-point"),
    "columns": (lambda v, s: (v[:, :-1], s), r"values have the shape \(24, 31\), wanted \(24, 32\) for int4/16"),
    "groups": (lambda v, s: (v, s[:, :-1]), r"scales have the shape \(24, 3\), wanted \(24, 4\)"),
    "rows": (lambda v, s: (v[:-1], s), r"scales have the shape \(24, 4\), wanted \(23, 4\)"),
    "a vector": (lambda v, s: (v.flatten(), s), "values have the shape"),
    "a number": (lambda v, s: (v[0, 0], s), "values have the shape"),
    "NaN": (lambda v, s: (v, torch.full_like(s, torch.nan)), "scales hold NaN or infinity"),
    "infinity": (lambda v, s: (v, torch.full_like(s, torch.inf)), "scales hold NaN or infinity"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_arrays_are_refused(name: str) -> None:
    damage, message = DAMAGED[name]
    with pytest.raises(ValueError, match=message):
        unpacked(*damage(*GOOD), 64, Grid(4, 16), torch.float32)


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "shrank.layers.torchao_tensors", raising=False)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.delattr("shrank.layers.torchao_tensors", raising=False)
    with pytest.raises(ImportError, match=r"weights of few bits need torchao: pip install 'shrank\[quant\]'"):
        quantized_weight(on_grid(Grid(8)))
