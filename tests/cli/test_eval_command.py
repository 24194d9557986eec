"""shrank eval: which models it is for, and that it asks for no more positions than there are."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from shrank.cli.app import app
from shrank.cli.options import FAILED
from tests.common.model_folders import POSITIONS, write_lines


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("model", "other", "says"),
    [
        ("t5", None, "T5ForConditionalGeneration is no causal language model"),
        ("bert", None, "BertForMaskedLM is no causal language model"),
        ("vit", None, "ViTForImageClassification is no causal language model"),
        ("whisper", None, "WhisperForConditionalGeneration is no causal language model"),
        ("clip", None, "CLIPModel is no causal language model"),
        ("gpt2", "bert", "BertForMaskedLM is no causal language model"),
    ],
)
def test_other_models_are_refused(model: str, other: str | None, says: str, model_folder, data_folder) -> None:
    others = [model_folder(other)] if other else []
    failed = run("eval", model_folder(model), *others, "--text", data_folder / "texts.txt", "--window", 8)
    assert failed.exit_code == FAILED and says in failed.stderr and "Traceback" not in failed.output


def test_a_window_that_is_longer_than_the_positions_is_refused(model_folder, data_folder) -> None:
    arguments = ("eval", model_folder("gpt2"), "--text", data_folder / "texts.txt", "--json")
    failed = run(*arguments)
    assert failed.exit_code == FAILED and f"fewer than a window of 512: --window {POSITIONS}" in failed.stderr
    # Continuations are as long as there are positions for, too.
    done = run(*arguments, "--window", POSITIONS)
    (found,) = json.loads(done.stdout).values()
    assert found["domains"]["texts.txt"]["perplexity"] > 1 and 0 <= found["repetition"]["loops"] <= 1


def test_windows_overlap_by_a_stride_and_are_as_few_as_asked_for(model_folder, data_folder) -> None:
    counts = []
    for options in (("--stride", 3), ("--stride", 3, "--limit", 2), ()):
        done = run("eval", model_folder("gpt2"), "--text", data_folder / "texts.txt", "--window", 8, *options, "--json")
        (found,) = json.loads(done.stdout).values()
        counts.append(found["domains"]["texts.txt"]["tokens"])
    assert counts[0] % 3 == 7 % 3 and counts[1] == 7 + 3 and counts[2] % 7 == 0 and counts[0] >= counts[2]
    failed = run("eval", model_folder("gpt2"), "--text", data_folder / "texts.txt", "--window", 8, "--stride", 9)
    assert failed.exit_code == FAILED and "stride from 1 to window" in failed.stderr


def test_texts_are_read_first_and_named(model_folder, tmp_path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    path = write_lines(tmp_path / "a.jsonl", [{"target": "w1"}])
    for file, says in ((tmp_path / "latin.txt", "latin.txt: is not UTF-8"), (path, "line 1: has no text")):
        failed = run("eval", model_folder("gpt2"), "--text", file)
        assert failed.exit_code == FAILED and says in failed.stderr
