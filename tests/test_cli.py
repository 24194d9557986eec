"""The command line on a tiny model in a folder: what it prints, writes and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel
from typer.testing import CliRunner

import shrank
from shrank.cli import app
from shrank.cli_common import DAMAGED, FAILED, NOTHING, USAGE
from tests.common.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:no layer was replaced")
IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "dense"
    config = BertConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=128, max_position_embeddings=32)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("a\nb\n")
    return folder


@pytest.fixture(scope="module")
def small(source: Path) -> Path:
    folder = source.parent / "small"
    assert run("compress", source, "--keep", 0.5, "--out", folder).exit_code == 0
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_plan_prints_a_table_or_json_and_saves(source: Path, tmp_path) -> None:
    shown = run("plan", source, "--rank", 8)
    assert shown.exit_code == 0 and "encoder.layer.0.attention.self.query" in shown.stdout
    data = json.loads(run("plan", source, "--energy", 0.5, "--json", "--save", tmp_path / "p.json").stdout)
    assert shrank.RankPlan.from_dict(data) == shrank.RankPlan.load(tmp_path / "p.json")


def test_plan_options_reach_the_plan(source: Path) -> None:
    data = json.loads(run("plan", source, "--rank", 9, "--include", "*.query", "--include", "*.key", "--exclude",
                          "*.1.*", "--round-to", 8, "--json").stdout)
    chosen = {x["fqn"]: x["rank"] for x in data["layers"] if x["rank"]}
    assert chosen == {f"encoder.layer.0.attention.self.{name}": 8 for name in ("query", "key")}


def test_compress_writes_what_from_pretrained_loads(source: Path, small: Path) -> None:
    expected = shrank.auto_fact(AutoModel.from_pretrained(source), 0.5)
    assert torch.equal(AutoModel.from_pretrained(small)(IDS)[0], expected(IDS)[0])
    assert (small / "vocab.txt").read_text() == "a\nb\n"


def test_compress_follows_a_saved_plan(source: Path, tmp_path) -> None:
    run("plan", source, "--rank", 8, "--include", "*.dense", "--save", tmp_path / "p.json")
    assert run("compress", source, "--plan", tmp_path / "p.json", "--out", tmp_path / "out").exit_code == 0
    low_rank = shrank.describe(AutoModel.from_pretrained(tmp_path / "out")).low_rank
    assert {x.fqn for x in low_rank} == {x.fqn for x in shrank.RankPlan.load(tmp_path / "p.json").low_rank}


def test_merge_is_dense_and_equal(small: Path, tmp_path) -> None:
    assert run("merge", small, "--out", tmp_path / "merged").exit_code == 0
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    assert not shrank.describe(merged).low_rank
    assert_close(merged(IDS)[0], AutoModel.from_pretrained(small)(IDS)[0])


def test_inspect_verifies_folders_and_files(small: Path, tmp_path) -> None:
    assert len(json.loads(run("inspect", small, "--json").stdout)["layers"]) == 13
    shrank.save(AutoModel.from_pretrained(small), tmp_path / "m.safetensors")
    shown = run("inspect", tmp_path / "m.safetensors")
    assert shown.exit_code == 0 and "13 of 13 layers low-rank" in shown.stdout


def test_inspect_finds_damage(small: Path, tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    shrank.save(AutoModel.from_pretrained(small), path)
    path.write_bytes(path.read_bytes()[:-10])
    damaged = run("inspect", path)
    assert damaged.exit_code == DAMAGED and "not a complete safetensors file" in damaged.stderr
    state = load_file(small / "model.safetensors")
    state["pooler.dense.led_unit.0.weight"][0, 0] = float("nan")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text((small / "config.json").read_text())
    save_file(state, bad / "model.safetensors", metadata={"format": "pt"})
    assert "pooler.dense.led_unit.0.weight: holds NaN" in run("inspect", bad).stderr
    assert run("inspect", bad).exit_code == DAMAGED


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (("plan", "SOURCE"), USAGE, "exactly one of --rank, --keep, --energy"),
    (("plan", "SOURCE", "--rank", 8, "--keep", 0.5), USAGE, "got 2"),
    (("plan", "SOURCE", "--keep", 1.5), FAILED, "must lie in (0, 1), got 1.5"),
    (("plan", "SOURCE", "--rank", 1000), NOTHING, "no layer can be replaced"),
    (("compress", "SOURCE", "--rank", 1000, "--out", "new"), NOTHING, "no layer can be replaced"),
    (("compress", "SOURCE", "--rank", 8, "--out", "SOURCE"), FAILED, "exists and is not empty"),
    (("compress", "SOURCE", "--plan", "/none.json", "--out", "new"), FAILED, "none.json"),
    (("merge", "SOURCE", "--out", "new"), NOTHING, "no layer"),
    (("inspect", "SOURCE"), DAMAGED, "no config.json with a plan of shrank"),
    (("plan", "/no/such/folder", "--rank", 8), FAILED, "no such folder"),
    (("bench", "/no/such/folder"), FAILED, "no such folder"),
])
def test_errors_have_a_message_and_a_code(arguments: tuple, code: int, says: str, source: Path, monkeypatch,
                                          tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*(source if a == "SOURCE" else a for a in arguments))
    assert result.exit_code == code and says in " ".join(result.stderr.split())
    assert not (tmp_path / "new").exists()


def test_interruption_leaves_no_output(source: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(BertModel, "save_pretrained", lambda self, folder: (_ for _ in ()).throw(KeyboardInterrupt))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    assert run("compress", source, "--rank", 8, "--out", out, "--force").exit_code != 0
    assert (out / "precious").read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bench_measures_both(source: Path, small: Path) -> None:
    result = run("bench", source, small, "--rounds", 1, "--batch", 2, "--length", 8, "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    dense, low_rank = json.loads(result.stdout)
    assert dense["parameters"] > low_rank["parameters"] and dense["unit"] == "tokens/s"
    assert all(x["throughput"] > 0 and x["peak_memory"] > 2**20 for x in (dense, low_rank))


def test_info_says_why_native_is_off() -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["torch"] == torch.__version__ or facts["torch"] == torch.__version__.split("+")[0]
    assert facts["backend"] == "torch" and facts["why_not_native"]


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "shrank", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("plan", "compress", "inspect", "merge", "bench", "info"))
