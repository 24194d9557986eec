"""`shrank check` and `shrank tune`: what they show, and their exit codes."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from shrank.cli.app import app
from shrank.cli.options import FAILED
from shrank.measuring import tuning
from shrank.ops import availability, self_check
from shrank.ops.tuned import Measured

RIGHT = {"low_rank_linear fused bfloat16": "", "low_rank_conv expand streamed float16": ""}


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("results", "code"), [(RIGHT, 0), ({**RIGHT, "low_rank_conv numbers float16": "y has NaN"}, FAILED)]
)
def test_check_shows_every_family_and_fails_if_one_is_wrong(monkeypatch, results: dict, code: int) -> None:
    asked = []
    monkeypatch.setattr(self_check, "check_again", lambda device: asked.append(device) or results)
    shown = run("check", "--device", "cuda:1")
    assert shown.exit_code == code and asked == ["cuda:1"]
    assert "expand streamed" in shown.stdout and f"2 of {len(results)} right" in shown.stdout
    assert ("y has NaN" in shown.stdout) == bool(code)
    assert json.loads(run("check", "--json").stdout) == results


def test_check_says_why_no_kernel_can_run() -> None:
    shown = run("check")
    assert shown.exit_code == FAILED and "the native kernels cannot run here" in shown.stderr
    assert availability.why_not_here()[0] in " ".join(shown.stderr.split())


def test_a_check_again_forgets_what_was_found_before(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SHRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(availability, "why_not_here", tuple)
    self_check._keep("cpu", dict.fromkeys(RIGHT, "wrong"))
    monkeypatch.setattr(self_check.check_apart, "checked_apart", lambda device: RIGHT)
    monkeypatch.setattr(self_check, "names", lambda: list(RIGHT))
    monkeypatch.setattr(self_check, "_known", {})
    assert self_check.check_again("cpu") == RIGHT == self_check.kept("cpu")


def test_tune_shows_what_it_measured(monkeypatch, model_folder) -> None:
    measured = Measured("linear M128 K64", "fused", (64, 64, 2), 1.25, 2.5, "today", {})

    @contextmanager
    def tune(device: str):
        done: list[Measured] = []
        yield done
        done.append(measured)

    monkeypatch.setattr(tuning, "tune", tune)
    shown = run("tune", str(model_folder("bert")), "--device", "cpu", "--batch", "1", "--length", "8")
    assert shown.exit_code == 0, shown.stderr
    for text in ("linear M128 K64", "fused 64x64x2", "1.2", "2.5", "1 problems measured"):
        assert text in shown.stdout


def test_tune_says_that_there_is_no_gpu(model_folder) -> None:
    shown = run("tune", str(model_folder("bert")))
    assert shown.exit_code == FAILED and shown.stderr
