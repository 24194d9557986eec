"""LoRA of peft beside low-rank layers: the usual names work, merging is exact, adapters fit dense models too."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

import shrank
from shrank import LED
from tests.common.corrected import RANK, STORAGES, corrected
from tests.common.models import draw, hf_inputs, hf_model, hf_outputs, mlp, seeded
from tests.common.tolerances import assert_close

DRAWN = {"r": 4, "init_lora_weights": False}


def logits(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def named_mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(OrderedDict(fc1=nn.Linear(32, 48), act=nn.GELU(), fc2=nn.Linear(48, 32))))


@pytest.fixture
def llama() -> nn.Module:
    return shrank.auto_fact(hf_model("llama"), 8, min_features=8)


def test_the_default_config_finds_low_rank_layers(llama, tmp_path) -> None:
    before = hf_outputs(llama)
    tuned = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", r=4))
    names = [name for name, m in tuned.named_modules() if isinstance(m, LED)]
    assert any(name.endswith("q_proj.base_layer") for name in names)
    assert torch.equal(hf_outputs(tuned.base_model.model), before)  # an adapter starts at zero
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(draw(*parameter.shape))
    changed = hf_outputs(tuned.base_model.model)
    assert (changed - before).abs().max() > 1e-3
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(shrank.auto_fact(hf_model("llama"), 8, min_features=8), tmp_path)
    assert_close(hf_outputs(again.base_model.model), changed)
    PeftModel.from_pretrained(hf_model("llama"), tmp_path)  # the same names on the dense model


@pytest.mark.parametrize("kind", ["plain", "pivoted", "conv1d"])
def test_merging_adds_the_rank_and_is_exact(kind: str) -> None:
    build = (lambda: hf_model("gpt2")) if kind == "conv1d" else named_mlp
    model = shrank.auto_fact(build(), 8, min_features=8, pivot=kind == "pivoted")
    fqn = next(x.fqn for x in model.shrank_plan.low_rank)
    x = draw(3, model.get_submodule(fqn).in_features)
    tuned = inject_adapter_in_model(LoraConfig(target_modules=[fqn], **DRAWN), model).eval()
    layer = tuned.get_submodule(fqn)
    apart = layer(x)
    assert (apart - layer.base_layer(x)).abs().max() > 1e-3
    layer.merge(safe_merge=True)
    assert_close(layer(x), apart)
    assert_close(layer.base_layer(x), apart)
    assert layer.base_layer.rank == 8 + 4 and not layer.base_layer.pivoted
    layer.unmerge()
    assert layer.base_layer.rank == 8 and torch.equal(layer(x), apart)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_merging_into_a_correction_adds_to_its_rank_and_leaves_its_base(storage) -> None:
    model, x = corrected(named_mlp(), storage), draw(3, 32)
    base = model.fc1.base
    tuned = inject_adapter_in_model(LoraConfig(target_modules=["fc1"], **DRAWN), model).eval()
    apart = tuned.fc1(x)
    assert (apart - tuned.fc1.base_layer(x)).abs().max() > 1e-3
    tuned.fc1.merge(safe_merge=True)
    assert (tuned.fc1(x) - apart).norm() < 1e-2 * apart.norm()  # of factors that were on a grid, products are not now
    assert tuned.fc1.base_layer.rank == RANK + 4 and tuned.fc1.base_layer.base is base
    tuned.fc1.unmerge()
    assert tuned.fc1.base_layer.rank == RANK and torch.equal(tuned.fc1(x), apart)


def test_merge_and_unload_leaves_a_low_rank_model_that_saves_and_loads(llama, tmp_path) -> None:
    tuned = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", **DRAWN)).eval()
    before = hf_outputs(tuned.base_model.model)
    merged = tuned.merge_and_unload()
    assert_close(hf_outputs(merged), before)
    merged.save_pretrained(tmp_path)
    assert_close(hf_outputs(type(merged).from_pretrained(tmp_path)), before)
    assert_close(hf_outputs(shrank.merge(merged)), before)


def test_dora_and_convolutions_are_refused_in_words() -> None:
    model = shrank.auto_fact(named_mlp(), 8)
    tuned = inject_adapter_in_model(LoraConfig(target_modules=["fc1"], use_dora=True, **DRAWN), model)
    with pytest.raises(ValueError, match=r"only plain LoRA.*shrank.merge"):
        tuned.fc1.merge()
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(32, 64, 3)))
    net = shrank.auto_fact(seeded(lambda: net), 8, allow_slower=True)
    with pytest.raises(ValueError, match=r"target its stages, as NAME.ced_unit.1"):
        inject_adapter_in_model(LoraConfig(target_modules=["conv"], **DRAWN), net)
    inject_adapter_in_model(LoraConfig(target_modules=["conv.ced_unit.1"], **DRAWN), net)(draw(1, 32, 8, 8))


def test_adapters_and_their_bases_stay_dense() -> None:
    dense = hf_model("llama")
    inputs = hf_inputs(dense)
    tuned = get_peft_model(
        copy.deepcopy(dense),
        LoraConfig(
            task_type="CAUSAL_LM", r=32, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=["lm_head"]
        ),
    )
    before = logits(tuned.eval(), inputs)
    shrank.auto_fact(tuned, 10**9, allow_growth=True)
    plan = tuned.shrank_plan
    for layer in plan:
        adapted = "q_proj" in layer.fqn or "lm_head" in layer.fqn
        assert (layer.rank is None) == (adapted or layer.kind == "Embedding"), layer
        assert not adapted or "adapter of peft: merge that first" in layer.reason
    assert_close(logits(tuned, inputs), before)
    assert_close(hf_outputs(tuned.merge_and_unload()), hf_outputs(tuned.base_model.model))


def test_merging_a_model_with_an_adapter_on_a_stage_is_refused() -> None:
    model = shrank.auto_fact(mlp(), 8)
    inject_adapter_in_model(LoraConfig(target_modules=["0.led_unit.1"], **DRAWN), model)
    x = draw(2, 32)
    before = model(x)
    with pytest.raises(ValueError, match=r"0: its up stage is a peft.*merge the adapter first"):
        shrank.merge(model)
    assert isinstance(model[2], LED) and torch.equal(model(x), before)
    with pytest.raises(RuntimeError, match="its up stage is a peft"):
        _ = model[0].up
    assert model[0].weight.dtype == torch.float32  # what T5 asks at every call
    model[0].led_unit[1].merge()
    model[0].led_unit[1] = model[0].led_unit[1].base_layer
    assert_close(shrank.merge(model)(x), before)
