"""transformers models: save_pretrained and from_pretrained just work, in any process, and never load a random layer."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import shrank
from shrank import CED, LED
from tests.common.models import HF_MODELS, hf_inputs, hf_model, hf_outputs
from tests.common.tolerances import assert_close

each_family = pytest.mark.parametrize("family", HF_MODELS)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(level)
    transformers.logging.enable_progress_bar()


def low_rank(family: str) -> nn.Module:
    return shrank.auto_fact(hf_model(family), 0.5)


def low_rank_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (LED, CED))}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert low_rank_names(one) == low_rank_names(other) != set()
    state, wanted = one.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert torch.equal(hf_outputs(one), hf_outputs(other))


LOAD = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "cpu": {"device_map": "cpu"},
    "map": {"device_map": {"": "cpu"}},
}


@each_family
@pytest.mark.parametrize("options", LOAD.values(), ids=LOAD)
def test_round_trip(family, options, tmp_path):
    saved = low_rank(family)
    saved.save_pretrained(tmp_path)
    assert {Path(name).suffix for name in os.listdir(tmp_path)} == {".safetensors", ".json"}
    loaded = type(saved).from_pretrained(tmp_path, **options).eval()
    for parameter in saved.parameters():  # but no buffer: rotary frequencies stay float32
        parameter.data = parameter.data.to(options.get("dtype", torch.float32))
    assert_same(loaded, saved)
    assert not any(p.is_meta for p in loaded.parameters())
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, _ in saved.named_parameters()}


@each_family
def test_sharded_and_saved_again_even_onto_itself(family, tmp_path):
    saved = low_rank(family)
    saved.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    loaded = type(saved).from_pretrained(tmp_path / "one").eval()
    assert_same(loaded, saved)
    for folder in ("two", "one", "one"):
        loaded.save_pretrained(tmp_path / folder)
        loaded = type(saved).from_pretrained(tmp_path / folder).eval()
        assert_same(loaded, saved)


@pytest.mark.parametrize("part", ["bert", "bert.encoder", "bert.encoder.layer.0"])
def test_a_model_factorised_in_part_is_saved_whole(part, tmp_path):
    saved = hf_model("bert")
    shrank.auto_fact(saved.get_submodule(part), 0.5)
    saved.save_pretrained(tmp_path)
    assert_same(type(saved).from_pretrained(tmp_path).eval(), saved)


@pytest.mark.parametrize("part", ["", "bert", "bert.encoder"])
def test_a_model_merged_in_parts_is_saved_plain(part, tmp_path):
    model = low_rank("bert")
    shrank.merge(model.get_submodule(part))
    model.save_pretrained(tmp_path)
    assert ("quantization_config" in json.loads((tmp_path / "config.json").read_text())) == bool(low_rank_names(model))


def test_offloaded_to_disk(tmp_path):
    saved = low_rank("bert")
    saved.save_pretrained(tmp_path)
    places = {
        name: "disk" if name.endswith(".1") else "cpu"
        for name in ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler", "classifier")
    }
    loaded = type(saved).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload").eval()
    assert torch.equal(hf_outputs(loaded), hf_outputs(saved))


def test_tied_embeddings_stay_tied(tmp_path):
    low_rank("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@each_family
def test_a_loaded_model_is_an_ordinary_one(family, tmp_path):
    low_rank(family).save_pretrained(tmp_path)
    model = hf_model(family).from_pretrained(tmp_path)
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "quantization_method")
    half = copy.deepcopy(model).half()
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert {p.dtype for p in half.to(torch.float64).float().parameters()} == {torch.float32}
    output = model.train()(**hf_inputs(model))[0]
    output.square().mean().backward()
    stages = [getattr(model.get_submodule(name), stage) for name in low_rank_names(model) for stage in ("down", "up")]
    assert stages and all(p.grad is not None and p.grad.isfinite().all() for p in stages)
    with torch.no_grad():
        stages[0].add_(1)
    shrank.auto_fact(model.eval(), 2, min_features=2, allow_growth=True)
    model.save_pretrained(tmp_path / "trained")
    assert_same(type(model).from_pretrained(tmp_path / "trained").eval(), model)


@each_family
@pytest.mark.parametrize("undo", [shrank.merge, lambda model: model.dequantize()], ids=["merge", "dequantize"])
def test_back_to_dense(family, undo, tmp_path):
    low_rank(family).save_pretrained(tmp_path / "low")
    model = hf_model(family).from_pretrained(tmp_path / "low").eval()
    expected = hf_outputs(model)
    model = undo(model)
    assert low_rank_names(model) == set() and model.state_dict().keys() == hf_model(family).state_dict().keys()
    assert_close(hf_outputs(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(hf_outputs(type(model).from_pretrained(tmp_path / "dense").eval()), hf_outputs(model))


# What is saved, as which class it is loaded, and how the names of the first become those of the second.
ACROSS = {
    "bert-base-to-head": ("BertModel", "BertForSequenceClassification", "", "bert."),
    "bert-base-to-head-without-pooler": ("BertModel", "BertForMaskedLM", "", "bert."),
    "bert-head-to-base": ("BertForSequenceClassification", "BertModel", "bert.", ""),
    "bert-head-to-head": ("BertForSequenceClassification", "BertForTokenClassification", "", ""),
    "gpt2-base-to-head": ("GPT2Model", "GPT2LMHeadModel", "", "transformer."),
    "gpt2-head-to-base": ("GPT2LMHeadModel", "GPT2Model", "transformer.", ""),
    "llama-base-to-head": ("LlamaModel", "LlamaForCausalLM", "", "model."),
    "llama-head-to-base": ("LlamaForCausalLM", "LlamaModel", "model.", ""),
    "vit-base-to-head": ("ViTModel", "ViTForImageClassification", "", "vit."),
    "vit-head-to-base": ("ViTForImageClassification", "ViTModel", "vit.", ""),
    "t5-base-to-head": ("T5Model", "T5ForConditionalGeneration", "", ""),
    "t5-head-to-encoder": ("T5ForConditionalGeneration", "T5EncoderModel", "", ""),
}


@pytest.mark.parametrize("source, target, old, new", ACROSS.values(), ids=ACROSS)
def test_loading_as_another_class(source, target, old, new, tmp_path):
    source, target = getattr(transformers, source), getattr(transformers, target)
    saved = shrank.auto_fact(source(hf_model(source.config_class.model_type).config), 0.5)
    saved.save_pretrained(tmp_path)
    model = target.from_pretrained(tmp_path)
    stored, state = {new + k.removeprefix(old): v for k, v in saved.state_dict().items()}, model.state_dict()
    factors = {name for name in state if "_unit." in name}
    assert factors and factors <= stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in state.keys() & stored.keys())
    model.save_pretrained(tmp_path / "again")
    assert low_rank_names(target.from_pretrained(tmp_path / "again")) == low_rank_names(model)


LAYER = "bert.encoder.layer.1.output.dense"


def plan_of(config: dict) -> dict:
    return next(layer for layer in config["quantization_config"]["plan"]["layers"] if layer["fqn"] == LAYER)


def renamed(old: str, new: str):
    return lambda tensors, config: tensors.update({new: tensors.pop(old)})


# Changes to the tensors and the config of a good folder.
CORRUPT = {
    "unknown-layer": lambda tensors, config: plan_of(config).update(fqn="bert.encoder.layer.9.output.dense"),
    "unlisted-layer": lambda tensors, config: config["quantization_config"]["plan"]["layers"].remove(plan_of(config)),
    **{
        f"rank-{rank}": lambda tensors, config, rank=rank: plan_of(config).update(rank=rank)
        for rank in (0, 3, 10**9, "8", None)
    },
    "kind": lambda tensors, config: plan_of(config).update(kind="Conv1D"),
    "no-plan": lambda tensors, config: config["quantization_config"].pop("plan"),
    "plan-text": lambda tensors, config: config["quantization_config"].update(plan="all"),
    "version": lambda tensors, config: config["quantization_config"]["plan"].update(format=99),
    "missing-down": lambda tensors, config: tensors.pop(f"{LAYER}.led_unit.0.weight"),
    "missing-up": lambda tensors, config: tensors.pop(f"{LAYER}.led_unit.1.weight"),
    "missing-bias": lambda tensors, config: tensors.pop(f"{LAYER}.led_unit.1.bias"),
    "renamed": renamed(f"{LAYER}.led_unit.0.weight", f"{LAYER}.led_unit.2.weight"),
    "dense-instead": lambda tensors, config: tensors.update(
        {f"{LAYER}.weight": tensors.pop(f"{LAYER}.led_unit.1.weight") @ tensors.pop(f"{LAYER}.led_unit.0.weight")}
    ),
    "transposed": lambda tensors, config: tensors.update(
        {f"{LAYER}.led_unit.1.weight": tensors[f"{LAYER}.led_unit.1.weight"].T.contiguous()}
    ),
}


@pytest.mark.parametrize("change", CORRUPT.values(), ids=CORRUPT)
@pytest.mark.parametrize("cls", ["BertForSequenceClassification", "BertModel"])
def test_corrupt_folders_are_refused(change, cls, tmp_path):
    low_rank("bert").save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    config = json.loads((tmp_path / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError)):
        getattr(transformers, cls).from_pretrained(tmp_path)
