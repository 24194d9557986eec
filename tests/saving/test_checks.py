"""What cannot be loaded again is refused before anything is written, with the layer and the cause."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import shrank
from shrank.saving.checks import check_saveable, sealing, seals
from tests.common.models import SharedLayer, draw, mlp, seeded


def low_rank(pivot: bool = False) -> nn.Module:
    return shrank.auto_fact(mlp(2), 8, pivot=pivot)


def with_adapter(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=r".*led_unit\.1", r=2)).base_model.model


def pruned(model: nn.Module) -> nn.Module:
    torch.nn.utils.prune.l1_unstructured(model[1].led_unit[0], "weight", 0.3)
    return model


def quantized(model: nn.Module) -> nn.Module:
    quantize_(model, Int8WeightOnlyConfig())
    return model


def quantized_by_torch(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def parametrized(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model[0].led_unit[1])
    return model


def replaced(model: nn.Module) -> nn.Module:
    model[0].led_unit[1] = nn.Sequential(model[0].led_unit[1])
    return model


SPOILED: dict[str, tuple[Callable, str]] = {
    "adapter": (with_adapter, r"0: its up stage is a peft\.tuners\.lora\.layer\.Linear.*merge the adapter first"),
    "pruned": (pruned, r"1: its down stage is pruned.*prune\.remove"),
    "torchao": (
        quantized,
        r"0: its down stage has a weight that is a torchao\.quantization\.\S*Int8Tensor, not plain numbers",
    ),
    "torch.ao": (
        quantized_by_torch,
        r"0: its down stage is a torch\.ao\.nn\.quantized\.dynamic\S+Linear.*before quantizing",
    ),
    "parametrized": (parametrized, r"0: its up stage has a parametrized weight"),
    "replaced": (replaced, r"0: its up stage is a torch\.nn\.modules\.container\.Sequential"),
}


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("spoil, cause", SPOILED.values(), ids=SPOILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_stages_that_are_no_plain_layers(spoil, cause, pivot, tmp_path):
    with pytest.raises(ValueError, match=cause):
        shrank.save(spoil(low_rank(pivot)), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_a_way_out_makes_plain_is_saved(tmp_path):
    model = pruned(low_rank())
    torch.nn.utils.prune.remove(model[1].led_unit[0], "weight")
    shrank.save(model, tmp_path / "model.safetensors")
    assert torch.equal(shrank.load(mlp(2), tmp_path / "model.safetensors")(draw(3, 32)), model(draw(3, 32)))


def test_quantized_dense_layers_are_named_too(tmp_path):
    model = nn.Sequential(low_rank(), quantized(mlp(1)))
    with pytest.raises(ValueError, match=r"1\.0\.weight: is a torchao\S+, not plain numbers"):
        shrank.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_hooks_and_low_rank_stages_are_no_obstacle():
    model = low_rank()
    shrank.auto_fact(model[0].led_unit, 2, min_features=2)
    assert len(shrank.describe(model).low_rank) == 4
    model[1].led_unit[0].register_forward_hook(lambda *_: None)
    check_saveable(model)


def test_every_name_of_a_shared_layer_has_a_seal():
    model = shrank.auto_fact(seeded(SharedLayer), 8)
    assert seals(model).keys() == {"first.weight", "blocks.again.weight", "blocks.other.weight"}


def test_seals_are_in_the_state_only_while_it_is_sealed():
    model = low_rank()
    plain = model.state_dict().keys()
    with pytest.raises(KeyError), sealing(model):
        assert model.state_dict().keys() == plain | {"0.weight", "1.weight"}
        raise KeyError
    assert model.state_dict().keys() == plain
