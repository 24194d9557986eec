"""The command line on models of texts, images, sounds and of two of them, with data in files."""

from __future__ import annotations

import json

import pytest
import transformers
from torch import nn
from typer.testing import CliRunner

import shrank
from shrank.cli import model_commands
from shrank.cli.app import app
from shrank.cli.options import FAILED, NOTHING, USAGE, module_class, plan_options, trust
from shrank.data.file_batches import batches_from_file
from shrank.model import subclasses
from shrank.saving.transformers_folder import load_model
from tests.common.model_folders import write_lines
from tests.common.zoo import build


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("name", "data", "loss"),
    [
        ("t5", "texts.txt", "lm"),
        ("marian", "texts.txt", "output"),
        ("bart_base", "texts.txt", "output"),
        ("whisper", "spoken", "lm"),
        ("whisper", "sounds", "output"),
        ("wav2vec2", "spoken", "output"),
        ("vit", "images", "output"),
        ("clip", "captioned", "output"),
        ("captioner", "captioned", "lm"),
        ("bert", "texts.txt", "output"),
        ("gpt2", "texts.txt", "lm"),
        ("llava", "captioned", "lm"),
    ],
)
def test_plan_compress_and_heal(name: str, data: str, loss: str, model_folder, data_folder, tmp_path) -> None:
    source, path = model_folder(name), data_folder / data
    options = ("--keep", 0.6, "--calibrate", path, "--loss", loss, "--max-length", 10, "--batch-size", 5)
    planned = run("plan", source, *options, "--json")
    assert planned.exit_code == 0, planned.output
    plan = shrank.RankPlan.from_dict(json.loads(planned.stdout))
    done = run("compress", source, *options, "--out", tmp_path / "small", "--heal", 2, "--report", tmp_path / "a.html")
    assert done.exit_code == 0 and "healed: loss on held-out texts" in done.stdout, done.output
    model_class = getattr(transformers, load_model(str(source)).config.architectures[0])
    small = model_class.from_pretrained(tmp_path / "small")
    assert {x.fqn: x.rank for x in shrank.describe(small).low_rank} == {x.fqn: x.rank for x in plan.low_rank}
    # Its processors came along: the same data can be read for it.
    assert batches_from_file(path, small, str(tmp_path / "small"))
    healed = run(
        "heal",
        tmp_path / "small",
        source,
        "--text",
        path,
        "--steps",
        2,
        "--out",
        tmp_path / "healed",
        "--max-length",
        10,
        "--json",
        *(("--loss", "lm") if loss == "lm" else ()),
    )
    figures = json.loads(healed.stdout)
    assert figures["after"] <= figures["before"] and (tmp_path / "healed" / "config.json").exists()


def test_few_bits(model_folder, data_folder, tmp_path) -> None:
    source, path = model_folder("llama"), data_folder / "texts.txt"
    options = ("--bits", 4, "--group-size", 8, "--calibrate", path, "--max-length", 10)
    planned = json.loads(run("plan", source, "--rank", 8, *options, "--json").stdout)
    done = run("compress", source, "--rank", 8, *options, "--out", tmp_path / "small", "--report", tmp_path / "a.html")
    assert done.exit_code == 0 and "in few bits, bytes" in done.stdout and "8 int4/8" in done.stdout, done.output
    assert "8 int4/8" in (tmp_path / "a.html").read_text()
    shown = json.loads(run("inspect", tmp_path / "small", "--json").stdout)
    assert not shown["problems"]
    storages = {x["fqn"]: x["storage"] for x in planned["layers"] if x["storage"]["grid"]}
    assert storages == {x["fqn"]: x["storage"] for x in shown["layers"]} and storages
    merged = run("merge", tmp_path / "small", "--out", tmp_path / "merged")
    assert merged.exit_code == 0 and f"{len(storages)} layers merged" in merged.stdout, merged.output
    alone = run("compress", source, "--bits", 8, "--out", tmp_path / "dense")  # without a rank
    assert alone.exit_code == 0 and "dense int8" in alone.stdout and "0 of" in alone.stdout, alone.output
    wrong = run("compress", source, "--keep", 0.5, "--bits", 5, "--out", tmp_path / "no")
    assert wrong.exit_code == FAILED and "bits must be 3, 4 or 8, got 5" in wrong.stderr
    assert not (tmp_path / "no").exists()


def test_what_the_data_says_reaches_the_plan(model_folder, data_folder, tmp_path) -> None:
    """Targets are what the decoder's errors are weighted by."""
    lines = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(12)]
    same = write_lines(tmp_path / "same.jsonl", lines)
    other = write_lines(tmp_path / "other.jsonl", [x | {"target": "w7 w7 w7 w7 w7 w7"} for x in lines])
    errors = []
    for path in (same, other):
        made = json.loads(run("plan", model_folder("t5"), "--rank", 8, "--calibrate", path, "--json").stdout)
        errors.append({x["fqn"]: x["error"] for x in made["layers"] if x["rank"]})
    apart = {fqn for fqn in errors[0] if errors[0][fqn] != pytest.approx(errors[1][fqn], rel=1e-3)}
    assert any(fqn.startswith("decoder") for fqn in apart)


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_compress_from_files(name: str, model_folder, data_folder, tmp_path) -> None:
    source, path = model_folder(name), data_folder / ("texts.txt" if name == "llama" else "spoken")
    options = ("--keep", 0.6, "--calibrate", path, "--loss", "none", "--max-length", 10, "--batch-size", 5)
    done = run("compress", source, *options, "--out", tmp_path / "memory", "--json")
    streamed = run(
        "compress", source, *options, "--stream", "--report", tmp_path / "a.html", "--out", tmp_path / "small"
    )
    assert (done.exit_code, streamed.exit_code) == (0, 0), streamed.output
    one, other = (load_model(str(tmp_path / folder)).state_dict() for folder in ("memory", "small"))
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    kept = [
        {file.name for file in (tmp_path / folder).iterdir() if "model" not in file.name}
        for folder in ("memory", "small")
    ]
    assert kept[0] == kept[1] and (tmp_path / "a.html").exists()


def test_what_streaming_does_not_do(model_folder, data_folder, tmp_path) -> None:
    stream = ("--stream", "--out", tmp_path / "small")
    healed = run("compress", model_folder("llama"), "--keep", 0.5, "--calibrate", data_folder, "--heal", 2, *stream)
    assert healed.exit_code == USAGE and "then use shrank heal" in healed.stderr
    nothing = run("compress", model_folder("llama"), "--keep", 0.5, "--include", "none", *stream)
    assert nothing.exit_code == NOTHING and "no layer can be replaced" in nothing.stderr
    assert not list(tmp_path.iterdir())


def test_a_sentence_transformers_folder(model_folder, data_folder, tmp_path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(str(model_folder("roberta")))
    SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())]).save(str(tmp_path / "st"))
    options = ("--keep", 0.6, "--calibrate", data_folder / "texts.txt", "--heal", 2)
    done = run("compress", tmp_path / "st", *options, "--out", tmp_path / "small")
    assert done.exit_code == 0, done.output
    small = SentenceTransformer(str(tmp_path / "small"))
    assert shrank.describe(small).low_rank and len(list(small)) == 2
    assert small.encode(["w1 w2 w3"]).shape == (1, words.get_embedding_dimension())


@pytest.mark.parametrize(
    ("command", "model", "rest", "code", "says"),
    [
        (
            "plan",
            "bert",
            ("--calibrate", "texts.txt", "--loss", "lm"),
            FAILED,
            "BertForMaskedLM predicts no next token",
        ),
        ("compress", "clip", ("--calibrate", "captioned", "--loss", "lm"), FAILED, "CLIPModel predicts no next token"),
        ("compress", "clip", ("--calibrate", "images"), FAILED, 'a line of a .jsonl file for it: {"text": "a cat'),
        ("plan", "vit", ("--calibrate", "texts.txt"), FAILED, "texts.txt, text 1: has no image"),
        ("compress", "vit", ("--calibrate", "latin.txt"), FAILED, "latin.txt: is not UTF-8: byte 0xe9 at position 3"),
        ("compress", "vit", ("--calibrate", "images", "--exclude", "*"), NOTHING, "excluded (8 layers)"),
        ("plan", "vit", ("--calibrate", "absent", "--include", "no"), NOTHING, "not included (8 layers)"),
        ("plan", "vit", ("--treat-as-base", "no.such.Linear"), FAILED, "no.such cannot be imported"),
        ("compress", "speech_t5", ("--calibrate", "texts.txt"), FAILED, "its decoder takes decoder_input_values"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    command, model, rest, code, says, model_folder, data_folder, tmp_path
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    places = {"latin.txt": tmp_path} | {name: data_folder for name in ("texts.txt", "captioned", "images", "absent")}
    rest = (places[x] / x if x in places else x for x in rest)
    out = ("--out", tmp_path / "out") if command == "compress" else ()
    failed = run(command, model_folder(model), "--keep", 0.5, *rest, *out)
    assert failed.exit_code == code and says in failed.stderr
    assert "Traceback" not in failed.output and not (tmp_path / "out").exists()


def test_where_nothing_can_be_replaced_the_most_frequent_reasons_are_told(model_folder) -> None:
    failed = run("plan", model_folder("bert"), "--rank", 500)
    assert failed.exit_code == NOTHING
    assert "no layer can be replaced: rank 32 saves nothing (break-even rank 16) (5 layers); " in failed.stderr


def test_warnings_are_lines(model_folder, tmp_path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "w1 w2 w3", "target": "w4"}])
    done = run("plan", model_folder("llama"), "--rank", 4, "--calibrate", path)
    assert done.exit_code == 0
    assert "warning: LlamaForCausalLM has no decoder of its own: the target is left out\n" in done.stderr


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {}),
        (("--pivot",), {"pivot": True}),
        (("--no-pivot",), {"pivot": False}),
    ],
)
def test_options_reach_the_plan(command, flags, expected, model_folder, tmp_path, monkeypatch) -> None:
    seen = {}

    def planned(model, rule, calibration=None, **options):
        seen.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(model_commands, "make_plan" if command == "plan" else "auto_fact", planned)
    out = ("--out", tmp_path / "out") if command == "compress" else ()
    run(command, model_folder("vit"), "--rank", 4, *flags, *out)
    assert seen == expected


class Casting(nn.Linear):
    """A subclass that a user would name."""


@pytest.mark.parametrize("names", [["all"], ["tests.cli.test_model_commands.Casting"], None])
def test_subclasses_are_trusted_by_name_or_all(names, monkeypatch) -> None:
    monkeypatch.setattr(subclasses, "_trusted", set())
    trust(nn.Sequential(Casting(8, 8), nn.Linear(8, 8)), names)
    assert subclasses.is_trusted(Casting) == (names is not None)


def test_subclasses_are_compressed_where_they_are_trusted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(subclasses, "_trusted", set())
    build("falcon")[0].save_pretrained(tmp_path / "dense")
    failed = run("plan", tmp_path / "dense", "--keep", 0.5)
    assert failed.exit_code == NOTHING and "FalconLinear is a subclass of Linear: if it only casts" in failed.stderr
    done = run("compress", tmp_path / "dense", "--keep", 0.5, "--treat-as-base", "all", "--out", tmp_path / "small")
    assert done.exit_code == 0, done.output
    monkeypatch.setattr(subclasses, "_trusted", set())
    assert shrank.describe(transformers.AutoModel.from_pretrained(tmp_path / "small")).low_rank


def test_classes_are_found_by_name() -> None:
    assert module_class("torch.nn.Linear") is nn.Linear
    assert plan_options(None, include=None, allow_slower=False, round_to=8) == {"round_to": 8}
    for name in ("Linear", "torch.tensor", "torch.nn.NoSuch", "torch.nn.functional", ".Linear", "torch.nn."):
        with pytest.raises(ValueError, match=f"--treat-as-base {name}"):
            module_class(name)


def test_pivots_are_an_option(model_folder) -> None:
    made = [
        json.loads(run("plan", model_folder("vit"), "--rank", 8, flag, "--json").stdout)
        for flag in ("--pivot", "--no-pivot")
    ]
    pivoted = [{x["shape"]["pivoted"] for x in plan["layers"] if x["rank"]} for plan in made]
    assert pivoted == [{True}, {False}]


def test_a_share_of_the_bytes(model_folder, data_folder, tmp_path) -> None:
    source, texts = model_folder("llama"), data_folder / "texts.txt"
    options = ("--keep-bytes", 0.12, "--calibrate", texts, "--max-length", 10, "--batch-size", 5)
    planned = run("plan", source, *options, "--json")
    assert planned.exit_code == 0, planned.output
    plan = shrank.RankPlan.from_dict(json.loads(planned.stdout))
    done = run("compress", source, *options, "--out", tmp_path / "small", "--report", tmp_path / "a.html")
    assert done.exit_code == 0, done.output
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    described = {x.fqn: (x.rank, x.storage) for x in shrank.describe(small).changed}
    assert described == {x.fqn: (x.rank, x.storage) for x in plan.changed}
    assert any(storage.grid for _, storage in described.values())


def test_blocks_are_narrowed_alike_or_each(model_folder, data_folder, tmp_path) -> None:
    options = ("--calibrate", data_folder / "texts.txt", "--keep", 0.4, "--no-pivot", "--max-length", 10)
    call = ("compress", model_folder("llama"), *options)
    result = run(*call, "--out", tmp_path / "small", "--narrow", "uniform")
    assert result.exit_code == 0, result.output
    assert "blocks narrowed" in result.output
    assert run(*call, "--out", tmp_path / "other", "--narrow", "all").exit_code == 2
