"""The table of shapes and the order of the grid."""

from __future__ import annotations

import pytest

from benchmarks.speed import shapes
from shrank.ops.reference import ACTIVATIONS


@pytest.mark.parametrize("layer", shapes.LAYERS, ids=str)
def test_layers_are_ones_that_the_op_computes(layer: shapes.Layer) -> None:
    assert layer.activation in ACTIVATIONS
    assert (layer.shape.in_features, layer.shape.out_features) == (layer.K, layer.N)
    ranks = [layer.rank(share) for share in shapes.SHARES]
    assert ranks == sorted(set(ranks)) and all(rank % 8 == 0 for rank in ranks)
    assert layer.shape.break_even_rank - 8 < ranks[-1] <= layer.shape.break_even_rank


def test_known_shapes() -> None:
    sizes = {(layer.model, layer.K, layer.N) for layer in shapes.LAYERS}
    assert {
        ("BERT-base", 768, 3072),
        ("Llama-3-8B", 4096, 14336),
        ("Llama-3-8B", 4096, 1024),
        ("ViT-L/16", 1024, 4096),
        ("MiniLM", 384, 1536),
        ("Whisper-large", 1280, 5120),
    } <= sizes
    assert shapes.BERT[0].rank(1 / 2) == 304  # break-even 614


def test_the_grid_is_complete_and_holds_nothing_twice() -> None:
    grid = shapes.grid("bfloat16")
    assert len(grid) == len(set(grid))
    assert {(case.layer, case.M, case.R) for case in grid} >= {
        (layer, M, layer.rank(share)) for layer in shapes.LAYERS for M in shapes.Ms for share in shapes.SHARES
    }
    assert set(shapes.TELLING_Ms) == set(shapes.Ms)
    assert max(2 * case.M * max(case.layer.K, case.layer.N) for case in grid) <= shapes.MOST_BYTES


def test_the_most_telling_come_first() -> None:
    grid = shapes.grid("bfloat16")
    first = grid[: 2 * len(shapes.LAYERS)]
    assert {(case.layer, case.M) for case in first} == {(layer, M) for layer in shapes.LAYERS for M in layer.typical_M}
    assert all(case.layer.rank(1 / 2) == case.R for case in first)
    assert {case.layer.model for case in first[: len(shapes.LAYERS)]} == {layer.model for layer in shapes.LAYERS}
    sweep = grid[len(first) : len(first) + 6]
    assert {case.layer for case in sweep} == set(shapes.TELLING) and {case.M for case in sweep} == {512}
