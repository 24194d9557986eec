"""Which kernel, on which grid, at what predicted cost: properties of csrc/select on every GPU of its table."""

from __future__ import annotations

import json
from itertools import pairwise, product

import pytest

from shrank.linalg.factors import Shape

from .conftest import GPUS, expected_choice

LAYERS = [(768, 768, 96), (768, 3072, 48), (3072, 768, 192), (4096, 4096, 512), (4096, 14336, 256), (100, 7, 3)]
TOKENS = (1, 2, 16, 64, 127, 128, 129, 512, 1000, 4096, 16384, 65536, 1 << 20)
TAILS = [
    dict(activation=activation, bias=bias, residual=residual, training=training)
    for activation, bias, residual, training in product(("none", "gelu"), *[(False, True)] * 3)
] + [
    dict(activation=activation, bias=bias, training=training, gate_R=gate)
    for activation, bias, training, gate in [
        ("silu", False, False, 96),
        ("silu", True, True, 256),
        ("none", True, False, 8),
    ]
]


def problems(dev, M: int = 1000, dtype: str = "bfloat16"):
    for (K, N, R), tail in product(LAYERS, TAILS):
        yield dev.select.LinearProblem(M, K, N, R, dtype=dtype, **tail)


def legal_costs(dev, problem, gpu) -> dict[str, float]:
    return {c.kernel: c.microseconds for c in dev.select.candidates(problem, gpu) if c.why_not is None}


def has_tail(problem) -> bool:
    return problem.activation != "none" or problem.residual


# ---- the cost model


@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_choice_is_legal_its_cost_is_told_and_none_beats_the_floor(dev, gpu, M, dtype) -> None:
    for problem in problems(dev, M, dtype):
        cost, chosen = legal_costs(dev, problem, gpu), dev.select.select(problem, gpu)
        assert chosen.microseconds == cost[chosen.kernel] and chosen.reason
        assert all(0 < dev.select.floor_us(problem, gpu) <= microseconds for microseconds in cost.values())


@pytest.mark.parametrize("M", TOKENS)
def test_unmeasured_ours_must_gain_and_never_be_slower(dev, gpu, M) -> None:
    for (K, N, R), tail in product(LAYERS, TAILS):
        both = [dev.select.LinearProblem(M, K, N, R, **{**tail, "training": training}) for training in (True, False)]
        costs = [legal_costs(dev, problem, gpu) for problem in both]
        wanted = expected_choice(costs, ("two_gemms_epilogue", "two_gemms"))
        for problem, cost in zip(both, costs, strict=True):
            found = cost[dev.select.select(problem, gpu).kernel]
            assert found == pytest.approx(cost[wanted]), "at equal cost either"


@pytest.mark.parametrize("M", TOKENS)
def test_training_runs_the_kernel_of_inference_so_that_both_give_the_same_bits(dev, gpu, M) -> None:
    for (K, N, R), tail in product(LAYERS, TAILS):
        training, inference = (dev.select.LinearProblem(M, K, N, R, **{**tail, "training": on}) for on in (True, False))
        assert dev.select.select(training, gpu).kernel == dev.select.select(inference, gpu).kernel
        for fused in (True, False):
            if LAYERS[-1] != (K, N, R) and dev.select.linear_why_not(training, gpu, fused) is None:
                grids = [dev.select.linear_grid(problem, gpu, fused) for problem in (training, inference)]
                assert len({(repr(grid.tile), grid.blocks_m, grid.blocks_n) for grid in grids}) == 1


def test_two_gemms_are_always_there_and_our_epilogue_where_there_is_something_for_it(dev, gpu) -> None:
    for problem in problems(dev):
        reasons = {c.kernel: c.why_not for c in dev.select.candidates(problem, gpu)}
        assert reasons["two_gemms"] is None
        assert (reasons["two_gemms_epilogue"] is None) == has_tail(problem)


@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_more_tokens_never_cost_less(dev, gpu, tail) -> None:
    for K, N, R in LAYERS:
        grown = [dev.select.LinearProblem(M, K, N, R, **tail) for M in range(0, 3000, 37)]
        for cost in (dev.select.floor_us, dev.select.dense_us, lambda p, d: legal_costs(dev, p, d)["two_gemms"]):
            assert all(a <= b for a, b in pairwise(cost(p, gpu) for p in grown))


def test_both_tails_fused_save_their_passes_over_y(dev, gpu) -> None:
    """PyTorch: 2 passes for the activation and 3 for the residual, in two kernels; ours: 3, in one."""
    problem = dev.select.LinearProblem(16384, 4096, 4096, 256, activation="gelu", residual=True)
    cost = legal_costs(dev, problem, gpu)
    saved = 2 * 16384 * 4096 * 2 / gpu.bandwidth * 1e6 + gpu.node_us
    assert cost["two_gemms"] - cost["two_gemms_epilogue"] == pytest.approx(saved)


def test_a_gate_saves_its_passes_over_y(dev, gpu) -> None:
    """PyTorch: 2 passes for the activation and 3 for the product; ours: 1, and x once."""
    M, K, N, R = 65536, 768, 3072, 64
    problem = dev.select.LinearProblem(M, K, N, R, activation="silu", gate_R=R)
    alone = dev.select.LinearProblem(M, K, N, R)
    cost, each = legal_costs(dev, problem, gpu), legal_costs(dev, alone, gpu)
    passes = 5 * M * N * 2 / gpu.bandwidth * 1e6 + 2 * gpu.node_us
    assert cost["two_gemms"] == pytest.approx(2 * each["two_gemms"] + passes)
    assert cost["two_gemms_epilogue"] == pytest.approx(cost["two_gemms"])
    floor = dev.select.floor_us(problem, gpu) * gpu.bandwidth / 1e6
    assert floor == pytest.approx(2 * (M * K + 2 * R * (K + N) + M * N)), "memory-bound: y is written once"
    assert dev.select.dense_us(problem, gpu) == pytest.approx(2 * dev.select.dense_us(alone, gpu) + passes)
    assert min(cost[name] for name in ("fused", "gemm_expand")) * 1.5 < cost["two_gemms"]


@pytest.mark.parametrize("M", [1, 16])
def test_a_gate_of_a_few_rows_costs_less_than_its_two_layers(dev, gpu, M) -> None:
    gated = dev.select.LinearProblem(M, 4096, 14336, 256, activation="silu", gate_R=256)
    cost, alone = legal_costs(dev, gated, gpu), legal_costs(dev, dev.select.LinearProblem(M, 4096, 14336, 256), gpu)
    assert cost["shrink_expand"] < 2 * alone["shrink_expand"]


def gated_pivoted(dev, M: int, K: int, N: int, R: int, **more) -> object:
    return dev.select.LinearProblem(M, K, N, R, activation="silu", gate_R=R, pivoted=True, **more)


LARGE_GATES = [(768, 3072, 256), (576, 1536, 192), (4096, 14336, 512), (4096, 14336, 1024)]


@pytest.mark.parametrize(("K", "N", "R"), LARGE_GATES)
def test_a_gate_with_pivots_never_costs_more_than_its_layers_apart(dev, gpu, K, N, R) -> None:
    """As the ops of gate and value, and a product of what these give. On few rows it shares their launches."""
    for M, training in product((1, 8, 64, 65, 128, 1024, 4096, 65536), (False, True)):
        problem = gated_pivoted(dev, M, K, N, R, training=training)
        gate = dev.select.LinearProblem(M, K, N, R, activation="silu", pivoted=True, training=training)
        value = dev.select.LinearProblem(M, K, N, R, pivoted=True, training=training)
        own = sum(dev.select.modelled(each, gpu).microseconds for each in (gate, value))
        apart = own + 3 * M * N * 2 / gpu.bandwidth * 1e6 + gpu.node_us
        assert legal_costs(dev, problem, gpu)["apart"] == pytest.approx(apart)
        assert dev.select.modelled(problem, gpu).microseconds <= apart * (1 + 1e-9)


def test_a_gate_with_pivots_streams_fewer_weights_and_of_many_rows_gets_all(dev) -> None:
    h200 = dev.select.device("H200")
    for K, N, R in LARGE_GATES:
        plain = dev.select.LinearProblem(1, K, N, R, activation="silu", gate_R=R)
        problem = gated_pivoted(dev, 1, K, N, R)
        assert dev.select.modelled(problem, h200).kernel == "shrink_expand"
        saved = 2 * 2 * R * R / h200.bandwidth * 1e6  # of both layers
        assert dev.select.floor_us(plain, h200) - dev.select.floor_us(problem, h200) == pytest.approx(saved)
        if R > 256:  # no kernel of ours is faster than GEMMs there
            continue
        many = dev.select.LinearProblem(65536, K, N, R, activation="silu", gate_R=R)
        cost, of_plain = legal_costs(dev, gated_pivoted(dev, 65536, K, N, R), h200), legal_costs(dev, many, h200)
        moved = (3 * N * 2 * R + 2 * 2 * R * (N - R)) * 2  # zeros, a copy of up, and all rows in order
        expanded = moved / h200.bandwidth * 1e6 + 8 * h200.node_us
        assert cost["gemm_expand"] - of_plain["gemm_expand"] == pytest.approx(expanded)
        assert dev.select.modelled(gated_pivoted(dev, 65536, K, N, R), h200).kernel in ("fused", "gemm_expand")


def test_apart_is_of_gates_with_pivots_alone(dev, gpu) -> None:
    for problem in (*problems(dev), dev.select.LinearProblem(1, 64, 64, 8, pivoted=True)):
        (apart,) = (c for c in dev.select.candidates(problem, gpu) if c.kernel == "apart")
        assert "no gate and value with pivots" in apart.why_not


def test_keeping_what_the_backward_pass_needs_raises_the_floor_by_its_bytes(dev, gpu) -> None:
    M, K, N, R = 65536, 768, 3072, 16  # memory-bound on every card

    def floor(**tail):
        return dev.select.floor_us(dev.select.LinearProblem(M, K, N, R, **tail), gpu) * gpu.bandwidth / 1e6

    assert floor(training=True) - floor() == pytest.approx(2 * M * R)
    assert floor(training=True, activation="relu") == floor(training=True), "the pre-activation is computed anew"
    assert floor(residual=True) - floor() == pytest.approx(2 * M * N)
    assert floor(bias=True) - floor() == pytest.approx(2 * N)


# ---- against the formulas of others


BANDWIDTH, FLOPS, NODE = 4.3e12, 790e12, 1.3  # an H200, measured; a node: reported


def roofline(flops: float, moved: float) -> float:
    return max(flops / FLOPS, moved / BANDWIDTH) * 1e6


@pytest.mark.parametrize("M", [1, 16, 64, 512, 4096, 16384, 65536])
@pytest.mark.parametrize(("K", "N"), [(768, 768), (768, 3072), (4096, 4096), (4096, 14336)])
@pytest.mark.parametrize("share", [16, 8, 4])
def test_an_h200_follows_the_roofline(dev, M, K, N, share) -> None:
    R, h200 = K // share, dev.select.device("H200")
    problem = dev.select.LinearProblem(M, K, N, R)
    fused = roofline(2 * M * R * (K + N), 2 * (M * K + R * K + N * R + M * N))
    dense = roofline(2 * M * K * N, 2 * (M * K + K * N + M * N)) + NODE
    pair = (
        roofline(2 * M * K * R, 2 * (M * K + R * K + M * R))
        + roofline(2 * M * R * N, 2 * (M * R + N * R + M * N))
        + 2 * NODE
    )
    assert dev.select.floor_us(problem, h200) == pytest.approx(fused)
    # A product too small to fill the machine may take up to twice its share of the tensor cores.
    assert dense * (1 - 1e-9) <= dev.select.dense_us(problem, h200) <= 2 * dense
    assert pair * (1 - 1e-9) <= legal_costs(dev, problem, h200)["two_gemms"] <= 2 * pair


def test_a_product_of_few_tiles_takes_up_to_twice_its_share(dev, gpu) -> None:
    """In fp32 every one of these is compute-bound."""

    def share(tiles: float) -> float:
        M, K, N = 1024, 4096, int(16 * tiles)
        gemm = dev.select.dense_us(dev.select.LinearProblem(M, K, N, 1, dtype="float32"), gpu) - gpu.node_us
        return gemm / (2 * M * K * N / gpu.flops_float32 * 1e6)

    shares = [share(gpu.sms * fill) for fill in (0.25, 0.5, 0.75, 1, 1.5, 8)]
    assert shares == pytest.approx([2, 2, 4 / 3, 1, 1, 1], rel=0.02)


def test_two_calls_for_a_decoding_layer_of_768_are_slower_than_dense(dev, gpu) -> None:
    problem = dev.select.LinearProblem(1, 768, 768, 96, bias=True)
    calls = {each.kernel: each.microseconds for each in dev.select.candidates(problem, gpu)}["two_gemms"]
    assert dev.select.dense_us(problem, gpu) < calls


@pytest.mark.parametrize(("K", "N", "R"), LAYERS)
def test_costs_agree_with_the_cost_formulas_of_the_library(dev, gpu, K, N, R) -> None:
    shape, no_tokens = Shape(N, K), dev.select.LinearProblem(0, K, N, R)
    weights_us = 2 / gpu.bandwidth * 1e6  # of one in bf16
    assert dev.select.floor_us(no_tokens, gpu) == pytest.approx(shape.params(R) * weights_us)
    M, rank = 1 << 20, 512  # in fp32 compute-bound on every card
    problem = dev.select.LinearProblem(M, K, N, rank, dtype="float32")
    assert dev.select.floor_us(problem, gpu) == pytest.approx(M * shape.flops(rank) / gpu.flops_float32 * 1e6)
    dense = M * max(shape.flops(None) / gpu.flops_float32, 4 * (K + N) / gpu.bandwidth) * 1e6
    assert dev.select.dense_us(problem, gpu) == pytest.approx(dense + gpu.node_us, rel=1e-3)


# ---- names and devices


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("h200", "H200"),
        ("NVIDIA H200", "H200"),
        (" nvidia-h200 ", "H200"),
        ("NVIDIA A100", "A100"),
        ("A100-SXM4-80GB", "A100"),
        ("rtx4090", "RTX 4090"),
        ("rtx 4090", "RTX 4090"),
        ("GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_gpu_has_many_spellings(dev, name, gpu) -> None:
    assert dev.select.device(name).name == gpu


@pytest.mark.parametrize("name", ["h300", "", "H100 PCIe", "NVIDIA GeForce RTX 4090 D", "NVIDIA H200 MIG 1g.18gb"])
def test_an_unknown_gpu_is_refused_with_the_known_ones(dev, name) -> None:
    with pytest.raises(ValueError, match=f"gpu is '{name}', wanted one of A100, L40S, RTX 4090, H100, H200, B200"):
        dev.select.device(name)


def test_the_table_lists_every_gpu_under_the_name_that_the_runtime_reports(dev) -> None:
    assert tuple(d.name for d in dev.select.devices()) == GPUS
    assert all(dev.select.device(d.reported_name).name == d.name for d in dev.select.devices())


REPORTED = {  # SM clock, memory clock (kHz) and bus width, as the driver reports them
    "A100": (1410000, 1593000, 5120),
    "L40S": (2520000, 9001000, 384),
    "RTX 4090": (2520000, 10501000, 384),
    "H100": (1980000, 2619000, 5120),
    "H200": (1980000, 3201000, 6144),
    "B200": (1965000, 3996000, 8192),
}


def test_attributes_alone_come_close_to_the_table(dev, gpu) -> None:
    brand = "NVIDIA GeForce" if "GeForce" in gpu.reported_name else "NVIDIA"
    derived = dev.select.Device.from_attributes(
        f"{brand} Unheard-of",
        gpu.arch // 10,
        gpu.arch % 10,
        gpu.sms,
        *REPORTED[gpu.name],
        int(gpu.l2_bytes),
        gpu.smem_per_block,
    )
    assert (derived.name, derived.arch, derived.sms) == (f"{brand} Unheard-of", gpu.arch, gpu.sms)
    for figure in ("bandwidth", "flops_half", "flops_float32", "flops_float64"):
        assert getattr(derived, figure) == pytest.approx(getattr(gpu, figure), rel=0.1), figure


def test_a_known_name_wins_over_attributes(dev) -> None:
    known = dev.select.Device.from_attributes("NVIDIA H200", 9, 0, 1, 1, 1, 1, 1, 1)
    assert (known.bandwidth, known.sms) == (4.3e12, 132)


@pytest.mark.parametrize(("profile", "share"), [("1g.10gb", 8), ("2g.20gb", 4), ("3g.40gb", 2), ("7g.80gb", 1)])
def test_a_mig_slice_has_its_share_of_the_memory(dev, profile, share) -> None:
    def bandwidth(name: str) -> float:
        return dev.select.Device.from_attributes(name, 8, 0, 14, *REPORTED["A100"], 5 << 20, 163 << 10).bandwidth

    whole, slice_ = bandwidth("NVIDIA A100-SXM4-80GB X"), bandwidth(f"NVIDIA A100-SXM4-80GB MIG {profile}")
    assert slice_ == pytest.approx(whole / share)


def test_a_gpu_without_a_memory_clock_gets_a_finite_cost(dev) -> None:
    """An integrated one: the runtime reports 0, and whatever is divided by that bandwidth would be infinite."""
    card = dev.select.Device.from_attributes("NVIDIA Thor", 11, 0, 20, 1575000, 0, 256, 32 << 20, 227 << 10)
    assert 1e11 < card.bandwidth < 3e11 and "assumed" in card.source
    for problem in problems(dev):
        assert 0 < dev.select.floor_us(problem, card) <= dev.select.select(problem, card).microseconds < 1e9


@pytest.mark.parametrize("arch", [(7, 5), (8, 6), (8, 7), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)])
def test_any_gpu_gets_a_decision(dev, arch) -> None:
    card = dev.select.Device.from_attributes("Some GPU", *arch, 40, 1500000, 5000000, 256, 1 << 22, 1 << 16)
    for problem in problems(dev):
        assert 0 < dev.select.floor_us(problem, card) <= dev.select.select(problem, card).microseconds < 1e9


def test_dtypes_have_torch_names_and_short_ones(dev) -> None:
    def spelled(name: str) -> str:
        return dev.select.LinearProblem(1, 1, 1, 1, dtype=name).dtype

    assert [spelled(n) for n in ("bf16", "half", "fp16", "fp32", "float", "fp64")] == [
        "bfloat16",
        "float16",
        "float16",
        "float32",
        "float32",
        "float64",
    ]
    assert all(spelled(n) == n for n in dev.select.DTYPES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(dtype="int8"), "dtype is 'int8', wanted one of bf16, "),
        (dict(activation="swish"), "activation is 'swish', wanted one of none, relu, gelu, gelu_tanh, silu"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(dev, wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        dev.select.LinearProblem(1, 1, 1, 1, **wrong)


# ---- what `shrank explain` prints


def test_explain_says_what_select_decides(dev, gpu) -> None:
    for problem in problems(dev):
        told, chosen = json.loads(dev.select.explain(problem, gpu)), dev.select.select(problem, gpu)
        grid = {
            "block_m": chosen.grid.tile.block_m,
            "max_rank": chosen.grid.tile.max_rank,
            "blocks_m": chosen.grid.blocks_m,
            "blocks_n": chosen.grid.blocks_n,
        }
        assert told["decision"] == {
            "kernel": chosen.kernel,
            "microseconds": chosen.microseconds,
            "reason": chosen.reason,
            "grid": grid if grid["blocks_n"] else None,
        }
        assert (grid["blocks_n"] > 0) == (chosen.kernel in ("fused", "gemm_expand"))
        assert told["floor_us"] == dev.select.floor_us(problem, gpu)
        assert told["dense_us"] == dev.select.dense_us(problem, gpu)
        assert told["problem"] == {name: getattr(problem, name) for name in told["problem"]}
        assert told["device"] == {name: getattr(gpu, name) for name in told["device"]}
        legal = [c["microseconds"] for c in told["candidates"] if c["legal"]]
        assert legal[1:] == sorted(legal[1:]) and [c["legal"] for c in told["candidates"]] == sorted(
            (c["legal"] for c in told["candidates"]), reverse=True
        )
        assert told["candidates"][0]["kernel"] == chosen.kernel
        assert told["runner_up"] == (told["candidates"][1] if len(legal) > 1 else None)
        assert all(c["legal"] or c["why_not"] for c in told["candidates"])


def test_explain_escapes_the_name_of_a_gpu(dev) -> None:
    name = 'a "quoted\\" GPU\n'
    card = dev.select.Device.from_attributes(name, 9, 0, 1, 1, 1, 64, 1, 1)
    told = json.loads(dev.select.explain(dev.select.LinearProblem(1, 1, 1, 1), card))
    assert told["device"]["name"] == name.replace("\n", " ")
