"""What is told without the extension is what csrc/select decides."""

from __future__ import annotations

import json
from itertools import product

import pytest

from shrank.measuring import explain_plain
from shrank.ops.reference import ACTIVATIONS
from tests.csrc.conftest import GPUS

SIZES = (1, 8, 12, 64, 96, 300)


def decided(dev, problem, gpu) -> tuple[dict, str]:
    """The problem as it is told, and the kernel if there is no other."""
    told = json.loads(dev.select.explain(problem, gpu))
    legal = [candidate["kernel"] for candidate in told["candidates"] if candidate["legal"]]
    return told["problem"], legal[0] if len(legal) == 1 else ""


def test_a_linear_layer_that_only_pytorch_can_run(dev, gpu) -> None:
    for K, N, R, dtype, activation, residual in product(
        SIZES, SIZES, SIZES[:5], ("bf16", "fp16", "fp32", "fp64"), ("none", "relu"), (False, True)
    ):
        asked = dev.select.LinearProblem(7, K, N, R, dtype, activation, residual=residual)
        problem, only = decided(dev, asked, gpu)
        reason = explain_plain.why_plain(problem)
        assert (only == "two_gemms") == bool(reason), problem
        if reason:
            assert (
                explain_plain.facts(problem, gpu.name, explain_plain.plain_kernel(problem), reason)["decision"][
                    "kernel"
                ]
                == only
            )


def test_a_convolution_of_which_it_is_told_is_one_that_only_pytorch_can_run(dev, gpu) -> None:
    told = 0
    for C, N, R, up_groups, dtype, activation in product(
        (3, 8, 64), (8, 12, 96), (4, 8, 64), (1, 2, 4), ("bf16", "fp16", "fp32", "fp64"), ("none", "silu")
    ):
        asked = dev.select.ConvProblem(
            2, C, N, R, (1, 9, 7), (1, 3, 3), up_groups=up_groups, dtype=dtype, activation=activation
        )
        problem, only = decided(dev, asked, gpu)
        if explain_plain.why_plain(problem):
            assert only == "two_convs", problem
            told += 1
        else:
            assert only != "two_convs" or up_groups > 1, "of groups that do not fit, the extension alone knows"
    assert told > 100


def test_names_are_those_of_select(dev) -> None:
    assert tuple(explain_plain.GPUS) == GPUS
    for name, reported in explain_plain.GPUS.items():
        assert dev.select.device(name).name == dev.select.device(reported).name == name
        explain_plain.check_names("bf16", "none", reported)
    for what, known in (("dtype", explain_plain.DTYPES), ("activation", ACTIVATIONS)):
        with pytest.raises(ValueError, match=f"{what} is '\\?', wanted one of {', '.join(known)}$"):
            dev.select.LinearProblem(1, 1, 1, 1, **{what: "?"})
    with pytest.raises(ValueError, match=f"wanted one of {', '.join(GPUS)}$"):
        dev.select.device("?")
    for spelling, dtype in explain_plain.DTYPES.items():
        assert (
            json.loads(dev.select.explain(dev.select.LinearProblem(1, 1, 1, 1, spelling), dev.select.device("H200")))[
                "problem"
            ]["dtype"]
            == dtype
        )
