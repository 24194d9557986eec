"""`shrank explain`: what it asks the extension, and how it shows the answer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from shrank import _native, explain
from shrank.cli import FAILED, USAGE, app

FACTS = {
    "problem": {"M": 16384, "K": 768, "N": 3072, "R": 96, "dtype": "bfloat16", "activation": "gelu", "bias": True,
                "residual": True, "training": False, "aligned": True},
    "device": {"name": "H200", "source": "measured on a Tuesday"},
    "decision": {"kernel": "fast", "microseconds": 50.0, "reason": "it is faster",
                 "grid": {"block_m": 64, "max_rank": 96, "blocks_m": 256, "blocks_n": 2}},
    "runner_up": {"kernel": "slow", "legal": True, "microseconds": 1250.0},
    "candidates": [{"kernel": "fast", "legal": True, "microseconds": 50.0},
                   {"kernel": "slow", "legal": True, "microseconds": 1250.0},
                   {"kernel": "odd", "legal": False, "why_not": "N is odd"}],
    "floor_us": 40.123, "dense_us": 25.0, "status": "model; not measured",
}


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What the op was asked; it answers FACTS."""
    calls = []

    def op(*arguments: object) -> str:
        calls.append(arguments)
        return json.dumps(FACTS)

    monkeypatch.setattr(_native, "problems", list)
    monkeypatch.setattr(explain, "torch", SimpleNamespace(
        ops=SimpleNamespace(shrank=SimpleNamespace(explain=op)),
        cuda=SimpleNamespace(is_available=lambda: True, current_device=lambda: 1)))
    return calls


def run(*arguments: object):
    return CliRunner().invoke(app, ["explain", *(str(a) for a in arguments)])


def test_options_reach_the_op(asked) -> None:
    assert run("--shape", "16384,768,3072,96", "--dtype", "fp16", "--gpu", "a100", "--activation", "gelu", "--residual",
               "--no-bias", "--training").exit_code == 0
    assert run("--shape", "1, 2, 3, 4").exit_code == 0
    assert asked == [(16384, 768, 3072, 96, "fp16", "gelu", False, True, True, "a100"),
                     (1, 2, 3, 4, "bf16", "none", True, False, False, "cuda:1")]


def test_the_table_holds_the_decision_and_what_it_is_compared_with(asked) -> None:
    shown = run("--shape", "16384,768,3072,96", "--gpu", "h200")
    assert shown.exit_code == 0, shown.stderr
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.stdout.splitlines()]
    for line in ("layer M 16384, K 768, N 3072, R 96", "bfloat16, gelu, bias, residual", "gpu H200", "kernel fast",
                 "because it is faster", "blocks 256 x 2, of 64 tokens, h of rank up to 96 held", "predicted 50 us",
                 "floor 40.1 us; predicted is 1.25x that",
                 "runner-up slow, 1,250 us: 25.00x the predicted time", "not possible odd: N is odd",
                 "dense layer 25 us: 0.50x the predicted time", "figures model; not measured",
                 "H200: measured on a Tuesday"):
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


def test_without_the_extension_all_reasons_are_given(monkeypatch) -> None:
    monkeypatch.setattr(_native, "problems", lambda: ["it was never built", "the moon is full"])
    result = run("--shape", "1,2,3,4", "--gpu", "h200")
    assert result.exit_code == FAILED
    assert "needs the native extension: it was never built; the moon is full" in " ".join(result.stderr.split())


def test_the_real_op_answers_where_it_is_loaded() -> None:
    result = run("--shape", "16384,768,3072,96", "--gpu", "h200", "--activation", "gelu", "--json")
    if _native.problems():
        assert result.exit_code == FAILED
        return
    told = json.loads(result.stdout)
    assert told["decision"]["kernel"] == "fused" and told["device"]["name"] == "H200"
    assert explain.table(told).row_count >= 7
    wrong = run("--shape", "1,2,3,4", "--gpu", "abacus")
    assert wrong.exit_code == FAILED and "gpu is 'abacus', wanted one of A100" in " ".join(wrong.stderr.split())
