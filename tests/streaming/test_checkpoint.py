"""A checkpoint compressed from its files is what the model in memory becomes; what stops a run is said."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel

import shrank
from shrank import Anchored, Budget, Calibrate, Checkpoint, auto_fact
from shrank.saving.transformers_folder import load_model, save_model
from shrank.util import tensor_file
from tests.common.models import HF_MODELS, VOCAB, draw, hf_model, seeded, tokens
from tests.common.tolerances import assert_close
from tests.streaming.runs import bits, data, write_source

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 10 tokens")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "dense")


def calls_of(model: nn.Module) -> list[dict]:
    """Two batches, of text the second with padding."""
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": draw(4, 3, 16, 16)}, {"pixel_values": draw(4, 3, 16, 16).flip(-1)}]
    ids = tokens(8, 16)
    padded = torch.ones_like(ids)
    padded[0, 9:] = 0
    decoder = {"decoder_input_ids": tokens(8, 12)} if model.config.is_encoder_decoder else {}
    return [{"input_ids": ids, **decoder}, {"input_ids": ids.flip(0), "attention_mask": padded, **decoder}]


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    here, there = one.state_dict(), other.state_dict()
    assert here.keys() == there.keys()
    for name, value in here.items():
        if value.is_floating_point():
            assert_close(there[name], value, baseline=there[name] if torch.equal(there[name], value) else None)
        else:
            assert torch.equal(there[name], value), name


@pytest.mark.parametrize("anchored", [False, 0.25], ids=["alone", "anchored"])
@pytest.mark.parametrize("family", HF_MODELS)
def test_it_becomes_what_the_model_in_memory_does(family: str, anchored: float, tmp_path) -> None:
    dense, source = hf_model(family), tmp_path / "dense"
    dense.save_pretrained(source)
    # Where several blocks look at one encoder, gradients are added up in another order.
    how = Calibrate(calls_of(dense), loss="none" if family == "t5" else "output")
    expected = auto_fact(load_model(str(source)), 0.6, calibrate=how, anchored=anchored)
    save_model(expected, str(source), tmp_path / "memory")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*in memory")
        mapped = auto_fact(Checkpoint(source), 0.6, calibrate=how, anchored=anchored, stream=tmp_path / "streamed")
    assert mapped.shrank_plan == expected.shrank_plan and mapped.shrank_plan.low_rank
    loaded = load_model(str(tmp_path / "streamed"))
    for model in (mapped, loaded):
        assert_same_model(expected, model)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("memory", "streamed")]
    assert configs[0] == configs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "memory", "streamed"]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_blocks_are_trained_as_they_are_in_memory(family: str, tmp_path) -> None:
    dense, source = hf_model(family), tmp_path / "dense"
    dense.save_pretrained(source)
    how, anchored = Calibrate(calls_of(dense), loss="none"), Anchored(steps=6, learning_rate=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens, and of blocks of t5, which return several tensors
        expected = auto_fact(load_model(str(source)), 0.6, calibrate=how, anchored=anchored)
        found = auto_fact(Checkpoint(source), 0.6, calibrate=how, anchored=anchored, stream=tmp_path / "streamed")
    assert found.shrank_plan == expected.shrank_plan
    assert any("trained further" in x.reason for x in found.shrank_plan.low_rank)
    assert_same_model(expected, found)


def test_gradients_that_come_from_several_blocks_add_up(tmp_path) -> None:
    dense, source = hf_model("t5"), tmp_path / "dense"
    dense.save_pretrained(source)
    how = Calibrate(calls_of(dense), loss="output")
    expected = auto_fact(load_model(str(source)), 0.6, calibrate=how)
    mapped = auto_fact(Checkpoint(source), 0.6, calibrate=how, stream=tmp_path / "streamed")
    assert mapped.shrank_plan.diff(expected.shrank_plan) == {}
    with torch.no_grad():
        assert_close(*(model(**how.data[1]).logits for model in (mapped, expected)))


@pytest.mark.parametrize("rank", [8, 0.5, {"*mlp*": 8, "*": None}], ids=["rank", "keep", "patterns"])
def test_without_data(rank: object, source, tmp_path) -> None:
    expected = auto_fact(load_model(str(source)), rank, min_features=4)
    found = auto_fact(Checkpoint(source), rank, min_features=4, stream=tmp_path / "small")
    assert found.shrank_plan == expected.shrank_plan
    assert_same_model(expected, load_model(str(tmp_path / "small")))


def test_with_a_plan(source, tmp_path) -> None:
    plan = shrank.make_plan(load_model(str(source)), Budget(keep_params=0.5))
    found = auto_fact(Checkpoint(source), plan, calibrate=data(), stream=tmp_path / "small")
    expected = auto_fact(load_model(str(source)), plan, calibrate=data())
    assert found.shrank_plan == expected.shrank_plan
    assert_same_model(expected, load_model(str(tmp_path / "small")))
    wrong = plan.with_rank("lm_head", 4000)
    with pytest.raises(ValueError, match=r"does not fit the model:\n.*lm_head"):
        auto_fact(Checkpoint(source), wrong, stream=tmp_path / "other")
    assert not (tmp_path / "other").exists() and not (tmp_path / "other.streaming").exists()


def test_what_cannot_be_streamed_is_done_in_memory_with_the_reason(tmp_path) -> None:
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    model = seeded(lambda: AlbertModel(AlbertConfig(**sizes, num_hidden_layers=3, vocab_size=VOCAB)))
    model.save_pretrained(tmp_path / "dense")
    batches = [{"input_ids": tokens(4, 8)}]
    with pytest.warns(UserWarning, match="compressed in memory: .* runs several times in one run of the model"):
        small = auto_fact(Checkpoint(tmp_path / "dense"), 0.6, calibrate=batches, stream=tmp_path / "small")
    assert small.shrank_plan.low_rank
    assert_same_model(small, load_model(str(tmp_path / "small")))
    assert not (tmp_path / "small.streaming").exists()


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _without_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    names = tensor_file.read_table(file)[0].keys() - {"model.layers.1.mlp.up_proj.weight"}
    held = {name: tensor.clone() for name, tensor in tensor_file.read(file, names).items()}
    tensor_file.write(file, held, {"format": "pt"})


def _without_a_shard(folder: Path) -> None:
    names = tensor_file.read_table(folder / "model.safetensors")[0]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_truncated, "model.safetensors: not a complete safetensors file"),
        (_without_a_tensor, "lacks weights of the model:\n.*layers.1.mlp.up_proj.weight"),
        (_without_a_shard, "is not complete:\n.*model-00002-of-00002.safetensors: missing"),
    ],
)
def test_a_damaged_source_is_refused_and_nothing_written(damage, told: str, source, tmp_path) -> None:
    shutil.copytree(source, tmp_path / "dense")
    damage(tmp_path / "dense")
    with pytest.raises(ValueError, match=told):
        auto_fact(Checkpoint(tmp_path / "dense"), 8, stream=tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_full_disk_is_said_and_the_run_goes_on_with_room(source, tmp_path, monkeypatch) -> None:
    auto_fact(Checkpoint(source), 0.6, calibrate=data(), anchored=True, stream=tmp_path / "whole" / "small")
    written, save_file = [], tensor_file.save_file

    def full(tensors: dict, path: Path, **further: object) -> None:
        if len(written) == 40:
            path.write_bytes(b"half of it")
            raise tensor_file.SafetensorError("No space left on device (os error 28)")
        written.append(path)
        save_file(tensors, path, **further)

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*what was done is kept in .*small.streaming"):
        auto_fact(Checkpoint(source), 0.6, calibrate=data(), anchored=True, stream=tmp_path / "full" / "small")
    assert not (tmp_path / "full" / "small").exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="that of a run with another rank, share of dense outputs: repeat"):
        auto_fact(Checkpoint(source), 0.7, calibrate=data(), stream=tmp_path / "full" / "small")
    auto_fact(Checkpoint(source), 0.6, calibrate=data(), anchored=True, stream=tmp_path / "full" / "small")
    assert bits(tmp_path / "full") == bits(tmp_path / "whole")


def test_nothing_to_replace_writes_nothing(source, tmp_path) -> None:
    with pytest.warns(UserWarning, match="no layer was replaced: not included"):
        model = auto_fact(Checkpoint(source), 8, include="nothing", stream=tmp_path / "small")
    assert not model.shrank_plan.low_rank and not list(tmp_path.iterdir())


def test_the_gradients_must_reach_a_layer(source, tmp_path) -> None:
    how = Calibrate(data(), loss=lambda output, batch: output.logits.detach().sum())
    with pytest.raises(ValueError, match="the loss depends on no layer"):
        auto_fact(Checkpoint(source), 0.6, calibrate=how, stream=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_wrong_use(source, tmp_path) -> None:
    out = tmp_path / "small"
    with pytest.raises(TypeError, match=r"give shrank.Checkpoint\(folder\), got a Sequential"):
        auto_fact(nn.Sequential(), 8, stream=out)
    with pytest.raises(TypeError, match="say where to write with stream=folder"):
        auto_fact(Checkpoint(source), 8)
    with pytest.raises(TypeError, match="eval_fn="):
        auto_fact(Checkpoint(source), Budget(eval_fn=lambda model: 0.0), stream=out)
    with pytest.raises(TypeError, match="give calibrate= the data itself"):
        auto_fact(Checkpoint(source), 8, calibrate=shrank.calibrate(load_model(str(source)), data()), stream=out)
    with pytest.raises(TypeError, match="submodules"):
        auto_fact(Checkpoint(source), 8, submodules=[], stream=out)
    with pytest.raises(ValueError, match="anchored must lie in"):
        auto_fact(Checkpoint(source), 8, calibrate=data(), anchored=2.0, stream=out)
    (tmp_path / "small.streaming").mkdir()
    (tmp_path / "small.streaming" / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"small\.streaming is in the way"):
        auto_fact(Checkpoint(source), 8, stream=out)
