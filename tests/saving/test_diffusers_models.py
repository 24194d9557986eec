"""diffusers: models and pipelines with low-rank layers are saved and loaded, and configs stay those of dense models."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
import torch.nn.utils.prune
from safetensors.torch import load_file, save_file
from torch import nn

import shrank
from shrank.saving import diffusers_hook
from tests.common.models import draw, seeded
from tests.common.tolerances import assert_close

UNet = diffusers.UNet2DModel
WEIGHTS = "diffusion_pytorch_model.safetensors"


def unet() -> nn.Module:
    return seeded(
        lambda: UNet(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


def small(pivot: bool = False) -> nn.Module:
    return shrank.auto_fact(unet(), 0.5, allow_slower=True, pivot=pivot)


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(draw(1, 4, 8, 8), 1).sample


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert shrank.describe(one) == shrank.describe(other)
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    assert_close(output(one), output(other))


@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "20KB"}, {"variant": "small"}, {"safe_serialization": False}],
    ids=["plain", "sharded", "variant", "pickled"],
)
@pytest.mark.parametrize("pivot", [False, True])
def test_round_trip(options, pivot, tmp_path):
    saved = small(pivot)
    before = dict(saved.config)
    saved.save_pretrained(tmp_path, **options)
    assert before.items() <= saved.config.items() and "quantization_config" not in saved.config
    loaded, found = UNet.from_pretrained(tmp_path, variant=options.get("variant"), output_loading_info=True)
    assert not any(found.values())
    assert_same(loaded, saved)
    assert loaded.half().float().train().training and all(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert shrank.describe(UNet.from_pretrained(tmp_path / "again")) == shrank.describe(saved)
    assert UNet.from_pretrained(tmp_path / "again", torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_function_of_the_class(tmp_path):
    saved = small()
    diffusers.ModelMixin.save_pretrained(saved, tmp_path)
    assert_same(UNet.from_pretrained(tmp_path), saved)


def test_pipeline(tmp_path):
    saved = small()
    diffusers.DDPMPipeline(saved, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    assert_same(diffusers.DDPMPipeline.from_pretrained(tmp_path).unet, saved)


def test_models_of_its_config_are_dense(tmp_path):
    small().save_pretrained(tmp_path / "small")
    loaded = UNet.from_pretrained(tmp_path / "small")
    stored = UNet.load_config(tmp_path / "small")
    for model in (UNet.from_config(loaded.config), UNet.from_config(stored), shrank.merge(loaded)):
        model.save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
        assert not shrank.describe(UNet.from_pretrained(tmp_path / "dense")).low_rank


@pytest.mark.parametrize("lost", ["led_unit.0.weight", "ced_unit.1.weight", "conv_norm_out.weight"])
def test_missing_weights_are_an_error(lost, tmp_path):
    small().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[next(name for name in tensors if name.endswith(lost))]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights that its plan asks for"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}])
def test_a_folder_without_its_plan_is_an_error(options, tmp_path):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size mismatch"):
        UNet.from_pretrained(tmp_path, **options)


def test_what_could_not_be_loaded_is_refused(tmp_path):
    pruned = small()
    layer = next(m for m in pruned.modules() if isinstance(m, shrank.LED))
    torch.nn.utils.prune.l1_unstructured(layer[0], "weight", 0.3)
    quantized = small()
    quantized.hf_quantizer = diffusers.quantizers.auto.DiffusersAutoQuantizer.from_config(
        diffusers.QuantoConfig(weights_dtype="int8"), pre_quantized=False
    )
    for model, options, cause in (
        (pruned, {}, "down stage is pruned"),
        (quantized, {}, "was quantized by"),
        (small(), {"use_flashpack": True}, "flashpack"),
    ):
        with pytest.raises(ValueError, match=cause):
            model.save_pretrained(tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


def test_a_diffusers_without_quantizers_is_kept_from_writing():
    with pytest.raises(RuntimeError, match="has no quantizers"):
        diffusers_hook._refuse(lambda: None, small(), (), {})
    assert diffusers_hook._refuse(lambda: "saved", unet(), (), {}) == "saved"
