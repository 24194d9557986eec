"""Corrections as adapters of peft: on the quantized model they give what the corrected model gives."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import shrank
from tests.common.models import hf_model, hf_outputs, mlp
from tests.common.tolerances import assert_close

CONFIGS = {
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    "int8": Int8WeightOnlyConfig,
}


def quantized(config: str = "int4") -> nn.Module:
    model = hf_model("llama")
    quantize_(model, CONFIGS[config]())
    return model


def several_ranks(fqn: str, _: nn.Module) -> int | None:
    return {"q_proj": 3, "up_proj": 8, "down_proj": 5}.get(fqn.rpartition(".")[2])


@pytest.mark.parametrize("one_rank", [False, True], ids=["own-ranks", "one-rank"])
@pytest.mark.parametrize("config", CONFIGS)
def test_on_the_quantized_model_it_gives_the_same_outputs(config: str, one_rank: bool, tmp_path) -> None:
    base = quantized(config)
    corrected = shrank.correct(copy.deepcopy(base), hf_model("llama"), several_ranks)
    assert (hf_outputs(corrected) - hf_outputs(base)).abs().max() > 1e-4
    shrank.export_lora(corrected, tmp_path / "adapter", base="the/base", one_rank=one_rank)
    served = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(hf_outputs(served.base_model.model), hf_outputs(corrected))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "the/base"
    assert written["r"] == written["lora_alpha"] == 8
    assert set(written["rank_pattern"].values()) == (set() if one_rank else {3, 5})
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    if one_rank:
        assert {value.shape[0] for name, value in held.items() if "lora_A" in name} == {8}


def test_names_that_end_alike_keep_their_own_ranks(tmp_path) -> None:
    model = nn.ModuleDict({"a": mlp(1), "b": nn.ModuleDict({"a": mlp(1)})})
    model.forward = lambda x: model["b"]["a"](model["a"](x))
    base = copy.deepcopy(model)
    quantize_(base, CONFIGS["int4"]())
    ranks = {"a.0": 3, "b.a.0": 5}
    shrank.export_lora(shrank.correct(copy.deepcopy(base), model, ranks), tmp_path)
    served = PeftModel.from_pretrained(base, tmp_path)
    found = {n: m.lora_A["default"].out_features for n, m in served.named_modules() if hasattr(m, "lora_A")}
    assert found == {f"base_model.model.{name}": rank for name, rank in ranks.items()}


def test_what_cannot_be_an_adapter_is_refused_and_nothing_is_written(tmp_path) -> None:
    with pytest.raises(ValueError, match="no layer is corrected"):
        shrank.export_lora(mlp(), tmp_path / "a")
    linear = mlp(1)[0]
    with pytest.raises(ValueError, match="the model itself is a corrected layer"):
        shrank.export_lora(shrank.CorrectedLinear(linear, 2), tmp_path / "a")
    changed = shrank.CorrectedLinear(linear, 2)
    changed.led_unit[0] = nn.Sequential(changed.led_unit[0])
    with pytest.raises(ValueError, match=r"0: a factor of it is a .*Sequential"):
        shrank.export_lora(nn.Sequential(changed), tmp_path / "a")
    assert not (tmp_path / "a").exists()
