"""The command line on a tiny model in a folder: what it prints, writes and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel
from typer.testing import CliRunner

import shrank
from shrank.cli.app import app
from shrank.cli.options import DAMAGED, FAILED, NOTHING, USAGE
from tests.common.models import hf_model
from tests.common.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:no layer was replaced")
OF_EXTRAS = {"transformers", "accelerate", "huggingface_hub", "yaml", "tokenizers", "matplotlib", "PIL", "soundfile"}
IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "dense"
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("a\nb\n")
    return folder


@pytest.fixture(scope="module")
def small(source: Path) -> Path:
    folder = source.parent / "small"
    assert run("compress", source, "--keep", 0.5, "--out", folder).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A causal language model with a tokenizer of words, and two files of texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lm")
    words = [f"w{i}" for i in range(60)]
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, **{w: i + 2 for i, w in enumerate(words)}}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder / "lm")
    hf_model("llama").save_pretrained(folder / "lm")
    order = torch.randint(60, (40, 25), generator=torch.Generator().manual_seed(0)).tolist()
    paragraphs = [" ".join(words[i] for i in row) for row in order]
    (folder / "a.txt").write_text("\n\n".join(paragraphs[:30]))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in paragraphs[30:]))
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_plan_prints_a_table_or_json_and_saves(source: Path, tmp_path) -> None:
    shown = run("plan", source, "--rank", 8)
    assert shown.exit_code == 0 and "encoder.layer.0.attention.self.query" in shown.stdout
    data = json.loads(run("plan", source, "--energy", 0.5, "--json", "--save", tmp_path / "p.json").stdout)
    assert shrank.RankPlan.from_dict(data) == shrank.RankPlan.load(tmp_path / "p.json")


def test_plan_options_reach_the_plan(source: Path) -> None:
    data = json.loads(
        run(
            "plan",
            source,
            "--rank",
            9,
            "--include",
            "*.query",
            "--include",
            "*.key",
            "--exclude",
            "*.1.*",
            "--round-to",
            8,
            "--json",
        ).stdout
    )
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


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("plan", "SOURCE"), USAGE, "exactly one of --rank, --keep, --keep-bytes, --energy"),
        (("plan", "SOURCE", "--rank", 8, "--keep", 0.5), USAGE, "got 2"),
        (("plan", "SOURCE", "--keep", 1.5), FAILED, "must lie in (0, 1), got 1.5"),
        (("plan", "SOURCE", "--rank", 1000), NOTHING, "no layer can be replaced"),
        (("compress", "SOURCE", "--rank", 1000, "--out", "new"), NOTHING, "no layer can be replaced"),
        (("compress", "SOURCE", "--rank", 8, "--out", "SOURCE"), FAILED, "exists and is not empty"),
        (("compress", "SOURCE", "--plan", "/none.json", "--out", "new"), FAILED, "none.json"),
        (("merge", "SOURCE", "--out", "new"), NOTHING, "has no low-rank layer"),
        (("inspect", "SOURCE"), DAMAGED, "no config.json with a plan of shrank"),
        (("plan", "/no/such/folder", "--rank", 8), FAILED, "no such folder"),
        (("bench", "/no/such/folder"), FAILED, "no such folder"),
    ],
)
def test_errors_have_a_message_and_a_code(
    arguments: tuple, code: int, says: str, source: Path, monkeypatch, tmp_path
) -> None:
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


def test_it_starts_with_nothing_but_what_the_package_requires() -> None:
    """As after `pip install shrank`, without an extra."""
    program = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OF_EXTRAS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["shrank", "info"]
import shrank.cli.app
shrank.cli.app.app()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and shrank.__version__ in done.stdout, done.stderr


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "shrank", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("plan", "compress", "inspect", "merge", "bench", "info"))


@pytest.mark.parametrize("anchored", [0.0, 0.25])
def test_compress_with_texts_heals_reports_and_keeps_to_the_budget(anchored, language_model: Path, tmp_path) -> None:
    source, texts = language_model / "lm", language_model / "a.txt"
    done = run(
        "compress",
        source,
        "--keep",
        0.6,
        "--calibrate",
        texts,
        "--loss",
        "lm",
        "--heal",
        3,
        "--report",
        tmp_path / "report.html",
        "--out",
        tmp_path / "small",
        "--max-length",
        20,
        "--anchored",
        anchored,
    )
    assert done.exit_code == 0, done.output
    assert "healed: loss on held-out texts" in done.output and (tmp_path / "report.html").stat().st_size > 10_000
    assert "measured" in (tmp_path / "report.html").read_text()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    layers = shrank.describe(small).low_rank
    dense = sum(
        p.numel() for name, p in AutoModelForCausalLM.from_pretrained(source).named_parameters() if "proj" in name
    )
    assert layers and sum(x.params_after for x in layers) < 0.6 * dense
    assert (tmp_path / "small" / "tokenizer.json").exists()


def test_plan_with_texts(language_model: Path, tmp_path) -> None:
    source, texts = language_model / "lm", language_model / "b.jsonl"
    shown = run(
        "plan",
        source,
        "--keep",
        0.5,
        "--calibrate",
        texts,
        "--loss",
        "none",
        "--json",
        "--report",
        tmp_path / "plan.html",
    )
    plan = shrank.RankPlan.from_dict(json.loads(shown.stdout))
    assert plan.spent[0] <= 0.5 and plan.trade_off and (tmp_path / "plan.html").exists()
    ranks = {x.rank for x in plan.low_rank}
    by_rank = run("plan", source, "--rank", 6, "--calibrate", texts, "--json")
    assert {x["rank"] for x in json.loads(by_rank.stdout)["layers"] if x["rank"]} == {6} != ranks


def test_heal_and_eval(language_model: Path, tmp_path) -> None:
    source, texts, news = language_model / "lm", language_model / "a.txt", language_model / "b.jsonl"
    assert run("compress", source, "--keep", 0.3, "--out", tmp_path / "small").exit_code == 0
    healed = run(
        "heal",
        tmp_path / "small",
        source,
        "--text",
        texts,
        "--steps",
        30,
        "--learning-rate",
        3e-3,
        "--out",
        tmp_path / "healed",
        "--max-length",
        20,
        "--json",
    )
    figures = json.loads(healed.stdout)
    assert figures["after"] < figures["before"]
    arguments = ("--text", texts, "--text", news, "--window", 32)
    found = {
        name: json.loads(run("eval", source, tmp_path / name, *arguments, "--json").stdout)
        for name in ("small", "healed")
    }
    small, better = (found[name][str(tmp_path / name)]["domains"] for name in found)
    assert small.keys() == {"a.txt", "b.jsonl"} and better["a.txt"]["divergence"] < small["a.txt"]["divergence"]
    assert found["small"][str(source)]["domains"]["a.txt"]["agreement"] is None
    shown = run("eval", source, *arguments)
    assert shown.exit_code == 0 and "perplexity" in shown.stdout and "b.jsonl" in shown.stdout


def test_bench_times_layers_for_budgets_of_time(source: Path, tmp_path) -> None:
    path = tmp_path / "table.json"
    shown = run("bench", source, "--layers", path, "--rounds", 1, "--length", 8, "--batch", 2)
    assert shown.exit_code == 0 and "encoder.layer.1.output.dense" in shown.stdout
    assert shrank.LatencyTable.load(path).about["device"] == "cpu"


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (("compress", "--keep", 0.5, "--heal", 3), USAGE, "--heal needs data: --calibrate"),
        (("compress", "--keep", 0.5, "--anchored", 0.5), USAGE, "--anchored needs data: --calibrate"),
        (("compress", "--keep", 0.5, "--anchored", 2, "--calibrate", "TEXTS"), FAILED, "anchored must lie in"),
        (("compress", "--keep", 0.5, "--calibrate", "absent.txt"), FAILED, "absent.txt"),
        (("compress", "--keep", 0.5, "--calibrate", "TEXTS", "--loss", "mse"), FAILED, "'mse'"),
        (("eval",), USAGE, "--text"),
        (("heal",), USAGE, None),
    ],
)
def test_missing_and_wrong_data_is_named(arguments, code, says, language_model: Path, tmp_path) -> None:
    command, *rest = (language_model / "a.txt" if a == "TEXTS" else a for a in arguments)
    out = ("--out", tmp_path / "out") if command == "compress" else ()
    failed = run(command, language_model / "lm", *rest, *out)
    assert failed.exit_code == code and (says is None or says in failed.output)
    assert not (tmp_path / "out").exists()
