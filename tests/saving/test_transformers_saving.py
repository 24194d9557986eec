"""What save_pretrained writes of low-rank models, and what it leaves as it was: configs that others share above all."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoConfig, AutoModel, BertModel, EncoderDecoderConfig, EncoderDecoderModel, LlamaForCausalLM

import shrank
from tests.common.models import hf_inputs, hf_model, hf_outputs, seeded
from tests.common.tolerances import assert_close
from tests.common.zoo import build, outputs


def small(family: str = "llama") -> nn.Module:
    return shrank.auto_fact(hf_model(family), 8)


def stored_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def names_in(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def assert_dense(model: nn.Module, folder: Path) -> None:
    """The model is dense, is saved as such, and loads as such."""
    model.save_pretrained(folder)
    assert "shrank" not in (folder / "config.json").read_text()
    loaded = type(model).from_pretrained(folder)
    assert not shrank.describe(loaded).low_rank
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_teacher_that_shares_the_config_stays_dense(tmp_path):
    teacher = hf_model("llama")
    student = shrank.auto_fact(LlamaForCausalLM(teacher.config), 8)
    before = teacher.config.to_dict()
    for _ in range(2):
        student.save_pretrained(tmp_path / "student")
    assert teacher.config.to_dict() == before and student.config is teacher.config
    assert_dense(teacher, tmp_path / "teacher")
    assert shrank.describe(LlamaForCausalLM.from_pretrained(tmp_path / "student")) == shrank.describe(student)


def test_a_failure_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = small()
    before, config = set(vars(model)), model.config.to_dict()
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert set(vars(model)) == before and model.config.to_dict() == config


MAKE_DENSE = {
    "class of the loaded config": lambda folder, loaded: LlamaForCausalLM(loaded.config),
    "auto class of the loaded config": lambda folder, loaded: AutoModel.from_config(loaded.config),
    "copy of the loaded config": lambda folder, loaded: LlamaForCausalLM(copy.deepcopy(loaded.config)),
    "stored config": lambda folder, loaded: LlamaForCausalLM(AutoConfig.from_pretrained(folder)),
    "auto class of the stored config": lambda folder, loaded: AutoModel.from_config(AutoConfig.from_pretrained(folder)),
    "merged": lambda folder, loaded: shrank.merge(loaded),
}


@pytest.mark.parametrize("make", MAKE_DENSE.values(), ids=MAKE_DENSE)
def test_models_of_a_low_rank_models_config_are_dense(make, tmp_path):
    small().save_pretrained(tmp_path / "small")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "small")
    assert "quantization_config" not in loaded.config.to_dict()
    assert_dense(make(tmp_path / "small", loaded), tmp_path / "dense")


def test_parts_of_a_composite_model(tmp_path):
    encoder = shrank.auto_fact(seeded(lambda: BertModel(hf_model("bert").config)), 8)
    encoder.save_pretrained(tmp_path / "part")
    part = AutoConfig.from_pretrained(tmp_path / "part")
    dense = EncoderDecoderModel(config=EncoderDecoderConfig.from_encoder_decoder_configs(part, part))
    assert_dense(dense, tmp_path / "dense")
    whole = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "part", tmp_path / "part").eval()
    assert len(shrank.describe(whole).low_rank) == 25  # the decoder has no pooler
    whole.save_pretrained(tmp_path / "whole")
    config = stored_config(tmp_path / "whole")
    assert "quantization_config" in config
    assert not any("quantization_config" in config[name] for name in ("encoder", "decoder"))
    inputs = {"input_ids": torch.arange(6)[None], "decoder_input_ids": torch.arange(4)[None]}
    loaded = EncoderDecoderModel.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(loaded(**inputs).logits, whole(**inputs).logits)
    whole.encoder.save_pretrained(tmp_path / "encoder")
    assert shrank.describe(BertModel.from_pretrained(tmp_path / "encoder")) == shrank.describe(encoder)


def test_the_function_of_the_class(tmp_path):
    model = small()
    transformers.PreTrainedModel.save_pretrained(model, tmp_path)
    assert torch.equal(hf_outputs(LlamaForCausalLM.from_pretrained(tmp_path)), hf_outputs(model))


def test_a_state_dict_that_is_given_is_what_is_written(tmp_path):
    model = small()
    model.save_pretrained(
        tmp_path, state_dict={name: value + 1 for name, value in model.state_dict().items() if name != "lm_head.weight"}
    )
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name] + 1) for name, value in loaded.state_dict().items())


def test_every_shard_holds_the_seals_of_its_layers(tmp_path):
    model = small()
    model.half().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    sealed = {f"{layer.fqn}.weight" for layer in shrank.describe(model).low_rank}
    assert sealed <= index.keys() == names_in(tmp_path)
    _, found = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["unexpected_keys"] and not found["missing_keys"] and not found["mismatched_keys"]


def uneven(model: nn.Module) -> nn.Module:
    """The model with other ranks in neighbouring layers, and one of four dense."""
    layers = shrank.make_plan(model, 8, min_features=8).low_rank
    return shrank.auto_fact(
        model,
        {layer.fqn: min(layer.shape.max_rank, 3 + i % 5) for i, layer in enumerate(layers) if i % 4 != 1},
        min_features=8,
    )


CONVERTED = [
    "gte",
    "nomic_bert",
    "jina_embeddings_v3",
    "radio",
    "molmo2_text",
    "tipsv2",
    "lara_mini",
    "inkling2_text",
    "mixtral",
    "llava",
]


@pytest.mark.parametrize("family", CONVERTED)
@pytest.mark.filterwarnings("ignore:the dense weight of a")
def test_weights_that_transformers_would_convert(family, tmp_path):
    dense, inputs = build(family)
    model = uneven(dense)
    expected = outputs(model, inputs)
    with pytest.raises(ValueError, match=r"save_original_format=True: transformers has \d+ rules"):
        model.save_pretrained(tmp_path / "published", save_original_format=True)
    assert not (tmp_path / "published").exists()
    model.save_pretrained(tmp_path / "small")
    assert set(model.state_dict()) <= names_in(tmp_path / "small")
    loaded, found = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not found["unexpected_keys"] and not found["missing_keys"]
    for one, other in zip(outputs(loaded.eval(), inputs), expected, strict=True):
        assert_close(one, other)
    merged = shrank.merge(loaded)
    expected = outputs(merged, inputs)
    merged.save_pretrained(tmp_path / "merged")  # in the published format again
    for one, other in zip(
        outputs(type(model).from_pretrained(tmp_path / "merged").eval(), inputs), expected, strict=True
    ):
        assert_close(one, other)


def test_the_published_format_is_no_matter_where_nothing_is_converted(tmp_path):
    model = small()
    model.save_pretrained(tmp_path, save_original_format=True)
    assert torch.equal(hf_outputs(LlamaForCausalLM.from_pretrained(tmp_path)), hf_outputs(model))


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_older_folders_load(family, tmp_path):
    model = small(family)
    model.save_pretrained(tmp_path)
    config = stored_config(tmp_path)
    assert config["quantization_config"].pop("names") == "model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    sealed = {f"{layer.fqn}.weight" for layer in shrank.describe(model).low_rank}
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name not in sealed}, file, {"format": "pt"})
    assert torch.equal(hf_outputs(type(model).from_pretrained(tmp_path).eval()), hf_outputs(model))


def test_a_model_that_another_quantizer_loaded(tmp_path):
    config = hf_model("llama").config
    config.tie_word_embeddings = False
    seeded(lambda: LlamaForCausalLM(config)).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    kind = transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16, quantization_config=kind)
    shrank.auto_fact(model, 4, min_features=8)
    assert [layer.fqn for layer in shrank.describe(model).low_rank] == ["lm_head"]
    with pytest.raises(ValueError, match=r"was quantized by torchao and has low-rank layers; .*Compress the model in"):
        model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    "layers, cause",
    [(r".*led_unit\.1", r"its up stage is a peft"), (r".*classifier", "adapters are attached to classifier")],
)
def test_adapters_are_not_written_among_the_weights(layers, cause, tmp_path):
    model = shrank.auto_fact(hf_model("bert"), {"*.output.dense": 8})
    wrapped = get_peft_model(model, LoraConfig(target_modules=layers, r=2))
    with pytest.raises(ValueError, match=cause):
        wrapped.get_base_model().save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    wrapped.save_pretrained(tmp_path / "adapters")
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "adapters")
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(hf_outputs(type(merged).from_pretrained(tmp_path / "merged").eval()), hf_outputs(merged))


def test_adapters_of_transformers_own_integration(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.1")  # runs with the peft that is there
    small().save_pretrained(tmp_path / "small")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    model.add_adapter(LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    expected = hf_outputs(model)
    model.save_pretrained(tmp_path / "adapter")
    assert "model.safetensors" not in os.listdir(tmp_path / "adapter")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    loaded.load_adapter(tmp_path / "adapter")
    assert torch.equal(loaded(**hf_inputs(loaded))[0], expected)


def test_a_distributed_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not load distributed checkpoints"):
        small().save_pretrained(tmp_path / "parts", distributed_checkpoint=True)
    assert not (tmp_path / "parts").exists()
