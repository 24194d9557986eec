"""`shrank explain`: what it asks the extension, and how it shows the answer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from shrank.cli.app import app
from shrank.cli.options import FAILED, USAGE
from shrank.measuring import explain
from shrank.ops import host, native

FACTS = {
    "problem": {
        "M": 16384,
        "K": 768,
        "N": 3072,
        "R": 96,
        "dtype": "bfloat16",
        "activation": "gelu",
        "bias": True,
        "residual": True,
        "training": False,
        "captured": False,
        "aligned": True,
        "gate_R": 0,
        "pivoted": False,
    },
    "device": {"name": "H200", "source": "measured on a Tuesday"},
    "decision": {
        "kernel": "fast",
        "microseconds": 50.0,
        "reason": "it is faster",
        "grid": {"block_m": 64, "max_rank": 96, "blocks_m": 256, "blocks_n": 2},
    },
    "runner_up": {"kernel": "slow", "legal": True, "microseconds": 1250.0},
    "candidates": [
        {"kernel": "fast", "legal": True, "microseconds": 50.0},
        {"kernel": "slow", "legal": True, "microseconds": 1250.0},
        {"kernel": "odd", "legal": False, "why_not": "N is odd"},
    ],
    "floor_us": 40.123,
    "dense_us": 25.0,
    "status": "model; not measured",
}


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What the op was asked; it answers FACTS."""
    calls = []

    def op(*arguments: object) -> str:
        calls.append(arguments)
        return json.dumps(FACTS)

    monkeypatch.setattr(native, "problems", list)
    monkeypatch.setattr(
        explain,
        "torch",
        SimpleNamespace(
            empty=torch.empty,
            ops=SimpleNamespace(shrank=SimpleNamespace(explain=op)),
            cuda=SimpleNamespace(is_available=lambda: True, current_device=lambda: 1),
        ),
    )
    return calls


def run(*arguments: object):
    return CliRunner().invoke(app, ["explain", *(str(a) for a in arguments)])


def test_options_reach_the_op(asked) -> None:
    assert (
        run(
            "--shape",
            "16384,768,3072,96",
            "--dtype",
            "fp16",
            "--gpu",
            "a100",
            "--activation",
            "gelu",
            "--residual",
            "--no-bias",
            "--training",
        ).exit_code
        == 0
    )
    assert run("--shape", "1, 2, 3, 4").exit_code == 0
    assert run("--shape", "1,2,3,4", "--activation", "silu", "--gate", 5).exit_code == 0
    assert run("--shape", "1,2,4,3", "--pivoted").exit_code == 0
    assert run("--shape", "1,2,4,3", "--pivoted", "--gate", 4).exit_code == 0
    assert asked == [
        (16384, 768, 3072, 96, "fp16", "gelu", False, True, True, 0, False, "a100"),
        (1, 2, 3, 4, "bf16", "none", True, False, False, 0, False, "cuda:1"),
        (1, 2, 3, 4, "bf16", "silu", True, False, False, 5, False, "cuda:1"),
        (1, 2, 4, 3, "bf16", "none", True, False, False, 0, True, "cuda:1"),
        (1, 2, 4, 3, "bf16", "none", True, False, False, 4, True, "cuda:1"),
    ]


@pytest.mark.parametrize(
    "more", [["--gate", -1], ["--gate", 4, "--residual"], ["--gate", 4, "--conv", "2,3,8x8,3x3,4,2"]], ids=str
)
def test_a_gate_where_there_can_be_none_is_refused(asked, more: list) -> None:
    shape = [] if "--conv" in more else ["--shape", "1,2,3,4"]
    shown = run(*shape, *more)
    assert shown.exit_code != 0 and "the rank of a gate" in shown.stderr and not asked


@pytest.mark.parametrize(
    "layer", [["--shape", "1,2,4,3", "--gate", 5], ["--shape", "1,2,3,4"], ["--conv", "2,3,8x8,3x3,4,2"]], ids=str
)
def test_pivots_where_there_can_be_none_are_refused(asked, layer: list) -> None:
    shown = run(*layer, "--pivoted")
    assert shown.exit_code != 0 and "pivoted: of a linear layer" in shown.stderr and not asked


def test_pivots_are_shown(asked, monkeypatch) -> None:
    monkeypatch.setitem(FACTS["problem"], "pivoted", True)
    assert "R 96, pivoted" in run("--shape", "1,2,3,4").stdout


def test_a_gate_is_shown(asked, monkeypatch) -> None:
    monkeypatch.setitem(FACTS["problem"], "gate_R", 64)
    assert "R 96, gate of R 64" in run("--shape", "1,2,3,4").stdout


def test_the_table_holds_the_decision_and_what_it_is_compared_with(asked) -> None:
    shown = run("--shape", "16384,768,3072,96", "--gpu", "h200")
    assert shown.exit_code == 0, shown.stderr
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.stdout.splitlines()]
    for line in (
        "layer M 16384, K 768, N 3072, R 96",
        "bfloat16, gelu, bias, residual",
        "gpu H200",
        "kernel fast",
        "because it is faster",
        "blocks 256 x 2, of 64 tokens, h of rank up to 96 held",
        "predicted 50 us",
        "floor 40.1 us; predicted is 1.25x that",
        "runner-up slow, 1,250 us: 25.00x the predicted time",
        "not possible odd: N is odd",
        "dense layer 25 us: 0.50x the predicted time",
        "figures model; not measured",
        "H200: measured on a Tuesday",
    ):
        assert line in lines


def test_the_table_without_a_runner_up(asked, monkeypatch) -> None:
    monkeypatch.setitem(FACTS, "runner_up", None)
    assert "none" in run("--shape", "1,2,3,4").stdout


def test_json_is_what_the_op_said(asked) -> None:
    assert json.loads(run("--shape", "1,2,3,4", "--json").stdout) == FACTS


@pytest.mark.parametrize("shape", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "1,2,3,-4", "1,2,3,0", "1.5,2,3,4", "1;2;3;4"])
def test_a_bad_shape_is_named(asked, shape) -> None:
    result = run("--shape", shape)
    assert result.exit_code == FAILED and not asked
    assert f"--shape is '{shape}', wanted M,K,N,R" in " ".join(result.stderr.split())


def test_without_a_shape_it_is_a_usage_error() -> None:
    assert run().exit_code == USAGE


def test_without_a_gpu_one_must_be_named(asked, monkeypatch) -> None:
    monkeypatch.setattr(explain.torch.cuda, "is_available", lambda: False)
    result = run("--shape", "1,2,3,4")
    assert result.exit_code == FAILED and "name a GPU with --gpu" in result.stderr


@pytest.fixture
def hidden(monkeypatch) -> None:
    """As if there were no extension."""
    monkeypatch.setattr(native, "problems", lambda: ["it was never built", "the moon is full"])


MAY_HAVE_A_KERNEL = [
    ("--shape", "1,8,16,24"),
    ("--shape", "1,8,16,24", "--activation", "relu", "--dtype", "fp32"),
    ("--shape", "1,2,3,4", "--residual"),
    ("--conv", "2,8,9x7,3x1,16,8", "--training"),
    ("--conv", "2,3,9x7,3x1,16,8"),
    ("--conv", "2,8,9x7,3x1,16,8", "--groups", "2"),
]


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("options", MAY_HAVE_A_KERNEL, ids=" ".join)
def test_without_the_extension_it_says_why_and_how_to_get_one(options: tuple) -> None:
    result = run(*options, "--gpu", "h200")
    told = " ".join(result.stderr.split())
    assert result.exit_code == FAILED
    for part in (
        "decided by the native extension, which is not loaded: it was never built; the moon is full.",
        "CUDA's compiler (nvcc",
        "`SHRANK_BUILD=1 CUDA_HOME=/usr/local/cuda pip install .`",
        "torch 2.10",
    ):
        assert part in told


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize(
    ("options", "kernel", "because"),
    [
        (("--shape", "16,32,64,8", "--dtype", "fp32"), "two_gemms", "no kernel takes float32"),
        (("--shape", "16,32,64,8", "--dtype", "fp64", "--training"), "two_gemms", "no kernel takes float64"),
        (("--shape", "16,30,64,9"), "two_gemms", "K is 30 and R is 9: kernels read 8 numbers at a time"),
        (("--conv", "2,8,9x7,3x1,16,4"), "two_convs", "R is 4: kernels read 8 numbers at a time"),
        (("--conv", "2,8,9x7,3x1,16,8", "--up-groups", "2"), "two_convs", "R is 4: kernels read"),
        (("--conv", "2,8,9x7,3x1,16,8", "--dtype", "float"), "two_convs", "no kernel takes float32"),
        (("--shape", "16,32,64,8", "--gpu", "cpu", "--activation", "gelu"), "two_gemms", "PyTorch's own two calls"),
        (("--conv", "2,8,9x7,3x1,16,8", "--gpu", "CPU", "--residual"), "two_convs", "PyTorch's own two calls"),
    ],
    ids=str,
)
def test_what_no_kernel_runs_is_told_without_the_extension(options: tuple, kernel: str, because: str) -> None:
    shown = run("--gpu", "h200", *options)
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.stdout.splitlines()]
    assert f"kernel {kernel}" in lines and any(line.startswith(f"because {because}") for line in lines)
    assert not any(line.startswith(("predicted", "floor", "dense layer")) for line in lines), "nothing knows them"
    told = json.loads(run("--gpu", "h200", *options, "--json").stdout)
    assert told["decision"]["kernel"] == kernel and told["decision"]["microseconds"] is None


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        (("--shape", "2,576,1536,209", "--dtype", "bf16"), "low_rank_rows"),
        (("--shape", "8,576,1536,209", "--dtype", "fp32", "--pivoted"), "low_rank_rows"),
        (("--shape", "8,576,1536,209", "--dtype", "fp32", "--gate", "100"), "low_rank_rows"),
        (("--shape", "8,576,1536,209", "--dtype", "fp32", "--gate", "100", "--pivoted"), "low_rank_rows"),
        (("--shape", "8,576,1536,8", "--dtype", "fp32", "--gate", "209"), "two_gemms"),
        (("--shape", "8,576,1536,209", "--dtype", "fp32", "--training"), "two_gemms"),
        (("--shape", "9,576,1536,209", "--dtype", "fp32"), "two_gemms"),
        (("--shape", "3,576,1536,209", "--dtype", "bf16"), "two_gemms"),
        (("--shape", "1,576,1536,20", "--dtype", "fp32"), "two_gemms"),
    ],
    ids=str,
)
def test_of_a_cpu_it_tells_what_layers_do(options: tuple, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "IS_HERE", True)
    assert json.loads(run("--gpu", "cpu", *options, "--json").stdout)["decision"]["kernel"] == kernel
    monkeypatch.setattr(host, "IS_HERE", False)
    assert json.loads(run("--gpu", "cpu", *options, "--json").stdout)["decision"]["kernel"] == "two_gemms"


@pytest.mark.usefixtures("hidden")
def test_the_problem_is_told_as_the_extension_tells_it() -> None:
    told = json.loads(
        run(
            "--shape",
            "16,32,64,8",
            "--gpu",
            "cpu",
            "--dtype",
            "bfloat16",
            "--residual",
            "--activation",
            "gelu",
            "--json",
        ).stdout
    )
    assert told["problem"] == FACTS["problem"] | {"M": 16, "K": 32, "N": 64, "R": 8}
    assert told.keys() == FACTS.keys()
    told = json.loads(
        run(
            "--conv", "2,8,9x7,3x1,16,4", "--stride", "2x1", "--padding", "1x0", "--groups", 2, "--gpu", "cpu", "--json"
        ).stdout
    )
    assert told["problem"] == CONV["problem"]


def test_a_cpu_needs_no_extension_and_no_figures_even_where_they_are(asked) -> None:
    assert run("--shape", "16,32,64,8", "--gpu", "cpu").exit_code == 0
    assert asked == []


@pytest.mark.parametrize("extension", ["hidden", "asked"])
@pytest.mark.parametrize(
    ("option", "typo", "meant"),
    [
        ("gpu", "H20", "H200"),
        ("gpu", "nvidia h-2000", "H200"),
        ("gpu", "RTX4080", "RTX 4090"),
        ("gpu", "cuda", "cuda:0"),
        ("gpu", "NVIDIA A100-SXM4-40GB", "A100"),
        ("gpu", "abacus", None),
        ("gpu", "", None),
        ("dtype", "bf61", "bf16"),
        ("dtype", "BF16", "bf16"),
        ("dtype", "torch.bfloat16", "bfloat16"),
        ("dtype", "bflaot16", "bfloat16"),
        ("dtype", "double", None),
        ("activation", "gellu", "gelu"),
        ("activation", "swish", "silu"),
        ("activation", "GELU", "gelu"),
        ("activation", "gelu_new", "gelu_tanh"),
        ("activation", "tanh", "gelu_tanh"),
        ("activation", "42", None),
    ],
)
def test_a_typo_is_told_the_nearest_right_name(
    extension: str, option: str, typo: str, meant: str | None, request
) -> None:
    calls = request.getfixturevalue(extension)
    result = run("--shape", "16,32,64,8", "--gpu", "h200", f"--{option}", typo)
    told = " ".join(result.stderr.split())
    assert result.exit_code == FAILED and f"{option} is '{typo}', wanted one of " in told
    assert told.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in told
    assert not calls, "the extension is not asked"


@pytest.mark.parametrize("gpu", ["a100", "NVIDIA A100-SXM4-80GB", "rtx4090", "RTX 4090", "nvidia-h200", "cuda:3"])
def test_a_gpu_may_be_spelled_as_people_and_as_cuda_do(gpu: str, asked) -> None:
    assert run("--shape", "16,32,64,8", "--gpu", gpu).exit_code == 0
    assert asked[0][-1] == gpu


def test_the_real_op_answers_where_it_is_loaded() -> None:
    result = run("--shape", "16384,768,3072,96", "--gpu", "h200", "--activation", "gelu", "--json")
    if native.problems():
        assert result.exit_code == FAILED
        return
    told = json.loads(result.stdout)
    assert told["decision"]["kernel"] and told["status"] == "predicted by the model; not measured"
    assert told["device"]["name"] == "H200"
    assert explain.table(told).row_count >= 7
    wrong = run("--shape", "1,2,3,4", "--gpu", "abacus")
    assert wrong.exit_code == FAILED and "gpu is 'abacus', wanted one of A100" in " ".join(wrong.stderr.split())


CONV = {
    "problem": {
        "batch": 2,
        "C": 8,
        "N": 16,
        "R": 4,
        "input": [1, 9, 7],
        "output": [1, 5, 7],
        "kernel": [1, 3, 1],
        "stride": [1, 2, 1],
        "begin": [0, 1, 0],
        "end": [0, 1, 0],
        "dilation": [1, 1, 1],
        "groups": 2,
        "up_groups": 1,
        "dtype": "bfloat16",
        "activation": "none",
        "bias": True,
        "residual": False,
        "training": False,
        "captured": False,
        "channels_last": True,
    },
    "decision": {
        **FACTS["decision"],
        "grid": {"gather": "chunks", "block_m": 64, "max_rank": 32, "blocks_m": 2, "blocks_n": 1},
    },
}


@pytest.fixture
def asked_of_convolutions(asked, monkeypatch) -> list[tuple]:
    def op(*arguments: object) -> str:
        asked.append(arguments)
        return json.dumps(FACTS | CONV)

    monkeypatch.setattr(explain.torch.ops.shrank, "explain_conv", op, raising=False)
    return asked


def test_a_convolution_reaches_its_op_in_three_dimensions(asked_of_convolutions) -> None:
    assert (
        run(
            "--conv",
            "2,8,9x7,3x1,16,4",
            "--stride",
            "2x1",
            "--padding",
            "1:2x0",
            "--groups",
            2,
            "--gpu",
            "h200",
            "--activation",
            "silu",
        ).exit_code
        == 0
    )
    assert run("--conv", "1,8,9,4,16,8", "--padding", "3:0", "--dilation", "2", "--up-groups", 4).exit_code == 0
    assert asked_of_convolutions == [
        (
            2,
            8,
            16,
            4,
            (1, 9, 7),
            (1, 3, 1),
            (1, 2, 1),
            (0, 1, 0),
            (0, 2, 0),
            (1, 1, 1),
            2,
            1,
            "bf16",
            "silu",
            True,
            False,
            False,
            True,
            "h200",
        ),
        (
            1,
            8,
            16,
            8,
            (1, 1, 9),
            (1, 1, 4),
            (1, 1, 1),
            (0, 0, 3),
            (0, 0, 0),
            (1, 1, 2),
            1,
            4,
            "bf16",
            "none",
            True,
            False,
            False,
            True,
            "cuda:1",
        ),
    ]


def test_the_table_of_a_convolution_shows_its_window(asked_of_convolutions) -> None:
    shown = " ".join(run("--conv", "2,8,9x7,3x1,16,4", "--gpu", "h200").stdout.replace("│", " ").split())
    for piece in (
        "2 of 8 channels, 1x9x7",
        "kernel 1x3x1",
        "stride 1x2x1",
        "padding 0:0x1:1x0:0",
        "R 4, N 16",
        "64 pixels, read by chunks",
    ):
        assert piece in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--conv", "2,8,9x7,3x3,16"], "B,C,INPUT"),
        (["--conv", "2,8,9x7,3,16,4"], "as many kernel"),
        (["--conv", "2,8,9x9x9x9,1x1x1x1,16,4"], "at most 3"),
        (["--conv", "2,8,0,3,16,4"], "from 1 on"),
        (["--conv", "2,8,9,3,16,4", "--stride", "1x1"], "--stride"),
        (["--conv", "2,8,9,3,16,4", "--stride", "0"], "--stride"),
        (["--conv", "2,8,9,3,16,4", "--padding", "1:2:3"], "--padding"),
        (["--conv", "2,8,9,30,16,4"], "wanted at least 30 numbers in padded dimension 2"),
        (["--conv", "2,8,9,3,16,4", "--groups", "3"], "groups is 3, wanted a divisor of the 8 channels"),
        (["--conv", "2,8,9,3,16,4", "--up-groups", "0"], "groups are 1 and 0, wanted at least 1"),
        ([], "--shape"),
        (["--conv", "2,8,9,3,16,4", "--shape", "1,2,3,4"], "--shape"),
    ],
)
def test_a_bad_convolution_is_refused_by_name(arguments: list, named: str, asked_of_convolutions) -> None:
    refused = run(*arguments, "--gpu", "h200")
    assert refused.exit_code in (FAILED, USAGE) and named in " ".join(refused.stderr.split())
    assert asked_of_convolutions == []
