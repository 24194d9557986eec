"""Which kernel, on which grid, at what predicted cost, for convolutions: properties on every GPU of select's table."""

from __future__ import annotations

from itertools import product

import pytest

from shrank.linalg.factors import Shape

from .conftest import expected_choice

HALF, FULL = ("bfloat16", "float16"), ("float32", "float64")
TAILS = [
    dict(activation=activation, bias=bias, residual=residual)
    for activation, bias, residual in product(("none", "gelu"), *[(False, True)] * 2)
]
# B, C, N, R, input, kernel: the rows of docs/csrc/predicted.md (ResNet's four stages, a UNet, a high resolution, a
# point), a stem, CREPE, Whisper, tubes.
SPATIAL = [
    (32, 64, 64, 16, (56, 56), (3, 3)),
    (32, 128, 128, 32, (28, 28), (3, 3)),
    (32, 256, 256, 64, (14, 14), (3, 3)),
    (32, 512, 512, 128, (7, 7), (3, 3)),
    (8, 320, 320, 80, (64, 64), (3, 3)),
    (8, 128, 128, 32, (128, 128), (3, 3)),
    (32, 64, 256, 16, (56, 56), (1, 1)),
    (8, 3, 64, 24, (224, 224), (7, 7)),
    (64, 1, 1024, 168, (1532, 1), (512, 1)),
    (64, 128, 128, 56, (127, 1), (64, 1)),
    (8, 80, 384, 40, (3000,), (3,)),
    (2, 3, 768, 256, (16, 224, 224), (2, 16, 16)),
]
SEPARABLE = [
    (32, 32, 64, (112, 112), (3, 3)),
    (32, 128, 128, (56, 56), (3, 3)),
    (32, 256, 256, (28, 28), (3, 3)),
    (32, 512, 512, (14, 14), (3, 3)),
    (32, 1024, 1024, (7, 7), (3, 3)),
    (32, 96, 384, (56, 56), (7, 7)),
    (8, 1536, 80, (2048,), (4,)),
]


def three(sizes: tuple, fill: int) -> tuple:
    return (fill,) * (3 - len(sizes)) + tuple(sizes)


def problem(dev, B, C, N, R, size, kernel, **options):
    pads = three([k // 2 for k in kernel], 0)
    options = {"begin": pads, "end": pads} | options
    return dev.select.ConvProblem(B, C, N, R, three(size, 1), three(kernel, 1), **options)


def problems(dev, **options):
    for row in SPATIAL:
        yield problem(dev, *row, **options)
    for B, C, N, size, kernel in SEPARABLE:
        yield problem(dev, B, C, N, C, size, kernel, groups=C, **options)


def legal_costs(dev, each, gpu) -> dict[str, float]:
    return {c.kernel: c.microseconds for c in dev.select.candidates(each, gpu) if c.why_not is None}


@pytest.mark.parametrize("tail", TAILS, ids=str)
@pytest.mark.parametrize("dtype", HALF + FULL)
def test_the_choice_is_legal_its_cost_is_told_and_none_beats_the_floor(dev, gpu, dtype, tail) -> None:
    for each in problems(dev, dtype=dtype, **tail):
        cost, chosen = legal_costs(dev, each, gpu), dev.select.select(each, gpu)
        assert chosen.microseconds == cost[chosen.kernel] and chosen.reason
        assert all(0 < dev.select.floor_us(each, gpu) <= microseconds for microseconds in cost.values())
        assert dtype in HALF or chosen.kernel.startswith("two_convs")


@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_unmeasured_ours_must_gain_and_never_be_slower_and_training_makes_the_same(dev, gpu, tail) -> None:
    for training, inference in zip(problems(dev, training=True, **tail), problems(dev, **tail), strict=True):
        costs = [legal_costs(dev, each, gpu) for each in (training, inference)]
        chosen = [dev.select.select(each, gpu) for each in (training, inference)]
        wanted = expected_choice(costs, ("two_convs_epilogue", "two_convs"))
        assert chosen[0].kernel == chosen[1].kernel
        assert costs[0][chosen[0].kernel] == pytest.approx(costs[0][wanted]), "at equal cost either"
        if chosen[0].kernel == "fused":
            grids = [(repr(c.grid.tile), c.grid.blocks_m, c.grid.blocks_n) for c in chosen]
            assert grids[0] == grids[1]


def test_the_grid_covers_the_problem_with_a_tile_that_fits(dev, gpu) -> None:
    for each in problems(dev):
        if dev.select.conv_why_not(each, gpu):
            continue
        grid = dev.select.conv_grid(each, gpu)
        assert (grid.blocks_m - 1) * grid.tile.block_m < each.pixels <= grid.blocks_m * grid.tile.block_m
        assert 1 <= grid.blocks_n <= min(64, -(-each.N // 128))
        assert grid.tile.shared_bytes <= gpu.smem_per_block and grid.tile.max_rank >= each.R


@pytest.mark.parametrize(
    ("deviation", "reason"),
    [
        (dict(dtype="float32"), "bfloat16 and float16"),
        (dict(channels_last=False), "not channels last"),
        (dict(R=20), "multiples of 8"),
        (dict(N=36), "multiples of 8"),
        (dict(R=264), "rank 256"),
        (dict(B=0), "zero"),
        (dict(C=0), "zero"),
        (dict(B=1 << 21), "2^30"),
        (dict(smem=48 << 10), "more shared memory"),
        (dict(gpu=(7, 5)), "compute capability 8.0"),
        (dict(R=1544, C=1544, groups=1544), "1536 if depthwise"),
        (dict(C=64, R=64, groups=64, kernel=(17, 17)), "256 taps"),
        (dict(R=96, groups=3, C=96, up_groups=2), "parts of"),
    ],
)
def test_kernels_that_may_not_run_say_why(dev, deviation, reason) -> None:
    sizes = dict(B=8, C=64, N=64, R=32, size=(28, 28), kernel=(3, 3)) | deviation
    arch, smem = sizes.pop("gpu", (9, 0)), sizes.pop("smem", 227 << 10)
    card = dev.select.Device.from_attributes("Some GPU", *arch, 132, 1980000, 3201000, 6144, 60 << 20, smem)
    each = problem(dev, **sizes)
    assert reason in dev.select.conv_why_not(each, card)
    with pytest.raises(ValueError, match=reason.replace("^", r"\^")):
        dev.select.conv_grid(each, card)
    assert dev.select.select(each, card).kernel != "fused"


@pytest.mark.parametrize(
    ("C", "groups", "gather"),
    [(64, 1, "chunks"), (64, 8, "analytic"), (3, 1, "numbers"), (24, 8, "numbers"), (64, 64, "depthwise")],
)
def test_channels_decide_how_windows_are_read(dev, C, groups, gather) -> None:
    each = problem(dev, 8, C, 64, 64, (28, 28), (3, 3), groups=groups)
    assert dev.select.conv_grid(each, dev.select.device("H200")).tile.gather == gather


@pytest.mark.parametrize(
    ("size", "kernel", "groups", "up_groups", "gather"),
    [
        ((60,), (31,), 1, 1, "chunks"),
        ((60,), (32,), 1, 1, "analytic"),
        ((28, 28), (12, 10), 1, 1, "chunks"),
        ((28, 28, 28), (2, 2, 27), 1, 1, "chunks"),
        ((28, 28, 28), (2, 3, 27), 1, 1, "analytic"),
        ((28, 28, 28), (1, 3, 28), 1, 1, "chunks"),
        ((28, 28), (11, 11), 1, 1, "analytic"),
        ((28, 28), (3, 3), 4, 4, "chunks"),
        ((28, 28), (3, 3), 4, 2, "analytic"),
        ((28, 28), (3, 3), 2, 4, "chunks"),
    ],
)
def test_taps_are_listed_where_the_list_holds_them(dev, size, kernel, groups, up_groups, gather) -> None:
    each = problem(dev, 8, 64, 64, 64, size, kernel, groups=groups, up_groups=up_groups)
    assert dev.select.conv_grid(each, dev.select.device("H200")).tile.gather == gather


@pytest.mark.parametrize(
    ("C", "N", "R", "groups", "up_groups"), [(1024, 1024, 512, 1, 1), (1024, 1024, 512, 4, 1), (1024, 1024, 512, 4, 4)]
)
def test_costs_agree_with_the_cost_formulas_of_the_library(dev, gpu, C, N, R, groups, up_groups) -> None:
    """In fp32 these are compute-bound on every card."""
    each = problem(dev, 32, C, N, R, (56, 56), (3, 3), groups=groups, up_groups=up_groups, dtype="float32")
    shape = Shape(N, C * 9, groups, groups, up_groups)
    assert dev.select.floor_us(each, gpu) == pytest.approx(each.pixels * shape.flops(R) / gpu.flops_float32 * 1e6)
    dense = each.pixels * Shape(N, C * 9, groups).flops(None) / gpu.flops_float32 * 1e6 + gpu.node_us
    assert dev.select.dense_us(each, gpu) == pytest.approx(dense, rel=1e-6)


def test_depthwise_separable_blocks_gain_where_their_products_are_small(dev) -> None:
    """By the model of an H200, over two cuDNN calls: nothing measured."""
    h200 = dev.select.device("H200")

    def gain(each) -> float:
        return legal_costs(dev, each, h200)["two_convs"] / dev.select.select(each, h200).microseconds

    gains = [
        gain(problem(dev, B, C, N, C, size, kernel, groups=C, activation="gelu")) for B, C, N, size, kernel in SEPARABLE
    ]
    assert max(gains) >= 1.25
    for each in [*problems(dev), *problems(dev, activation="gelu", residual=True, bias=True)]:
        assert gain(each) >= 1
