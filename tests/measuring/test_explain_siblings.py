"""What is said of several layers of one input: each as alone, and which of them run together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shrank.cli.app import app
from shrank.cli.options import FAILED
from shrank.measuring import explain_siblings

ROOT = Path(__file__).parents[2]


def run(*arguments: object):
    return CliRunner().invoke(app, ["explain", *(str(a) for a in arguments)])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `explain` was asked; layers of a rank below 100 take the kernels for a few rows."""
    calls = []

    def explain(shape: tuple, dtype: str, gpu: str | None, bias: bool, pivoted: bool) -> dict:
        calls.append((shape, dtype, gpu, bias, pivoted))
        kernel = "shrink_expand" if shape[3] < 100 else "fused"
        decision = {"kernel": kernel, "microseconds": 2.5, "reason": f"rank {shape[3]}"}
        return {
            "problem": dict(zip("MKNR", shape, strict=True)) | {"dtype": dtype, "pivoted": pivoted},
            "device": {"name": gpu},
            "decision": decision,
        }

    monkeypatch.setattr(explain_siblings, "explain", explain)
    return calls


def siblings(*ranks: int) -> list[str]:
    return [part for rank in ranks for part in ("--sibling", f"64,{rank}")]


@pytest.mark.parametrize(
    ("ranks", "together"),
    [
        ((8, 16, 24), [[0, 1, 2]]),
        ((8, 16), [[0, 1]]),
        ((8, 200, 24), [[0, 2]]),
        ((200, 8), []),
        ((200, 300), []),
        ((8, 16, 24, 32), [[0, 1, 2]]),  # and the fourth alone
        ((8, 200, 16, 24, 32, 40), [[0, 2, 3], [4, 5]]),
    ],
)
def test_layers_for_few_rows_run_together_three_at_a_time(ranks: tuple, together: list, asked: list) -> None:
    first, *others = ranks
    options = ("--shape", f"1,32,128,{first}", *siblings(*others), "--gpu", "h200", "--dtype", "fp16", "--no-bias")
    told = json.loads(run(*options, "--json").stdout)
    assert told["together"] == together and len(told["layers"]) == len(ranks)
    assert asked[0] == ((1, 32, 128, first), "fp16", "h200", False, False)
    assert asked[1:] == [((1, 32, 64, rank), "fp16", "h200", False, False) for rank in others]
    shown = run(*options).stdout
    assert all(f"R {rank} " in shown and f"rank {rank}" in shown for rank in ranks)
    assert shown.count("none") == len(ranks) - sum(map(len, together))


def test_pivoted_layers_and_others_run_together(asked: list) -> None:
    options = ("--shape", "1,32,128,16", "--pivoted", "--sibling", "64,8", "--sibling", "64,24p", "--gpu", "h200")
    assert json.loads(run(*options, "--json").stdout)["together"] == [[0, 1, 2]]
    assert [each[0][3] for each in asked if each[4]] == [16, 24]
    shown = run(*options).stdout
    assert "R 16p" in shown and "R 24p" in shown and "R 8 " in shown


def test_as_many_run_together_as_the_kernels_take() -> None:
    header = (ROOT / "csrc/select/shrink_expand_tile.h").read_text()
    assert int(re.search(r"kMostLayers = (\d+);", header)[1]) == explain_siblings.MOST_TOGETHER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sibling", "64"), "--sibling is '64', wanted N,R"),
        (("--sibling", "64,0"), "two whole numbers above 0"),
        (("--sibling", "64,8", "--residual"), "with nothing after them"),
        (("--sibling", "64,8", "--activation", "relu"), "with nothing after them"),
        (("--sibling", "64,8", "--training"), "in inference"),
        (("--sibling", "64,8", "--gate", "8"), "of linear layers in inference"),
        (("--sibling", "64,8q"), "p of a pivoted layer"),
        (("--sibling", "p"), "p of a pivoted layer"),
    ],
)
def test_other_siblings_are_refused(options: tuple, message: str, asked: list) -> None:
    done = run("--shape", "1,32,64,8", "--gpu", "h200", *options)
    assert done.exit_code == FAILED and message in " ".join(done.output.split())
    assert not asked


def test_of_a_cpu_each_runs_alone() -> None:
    told = json.loads(run("--shape", "1,576,1536,209", *siblings(209), "--gpu", "cpu", "--json").stdout)
    assert told["together"] == [] and len(told["layers"]) == 2
