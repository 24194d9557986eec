"""Teaches transformers to save and load low-rank models: save_pretrained and from_pretrained work unchanged.

transformers' hook for models whose modules differ from their class's own is its quantizer: it travels in config.json
as `quantization_config` and may replace modules of the empty model before the weights are read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import surgery
from .apply import attach_empty, describe, merge
from .checkpoint import not_finite
from .files import replacing
from .plan import LayerPlan, RankPlan
from .targets import LOW_RANK

METHOD = "shrank"


@register_quantization_config(METHOD)
class ShrankConfig(QuantizationConfigMixin):
    """The `quantization_config` of a low-rank model: its plan."""

    quant_method = METHOD

    def __init__(self, plan: dict | RankPlan, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method
        self.plan = plan if isinstance(plan, RankPlan) else RankPlan.from_dict(plan)

    def to_dict(self) -> dict:
        return {"quant_method": METHOD, "plan": self.plan.to_dict()}


@register_quantizer(METHOD)
class ShrankQuantizer(HfQuantizer):
    """Puts low-rank layers into a model before its weights are loaded."""

    is_trainable = True
    is_compileable = True
    is_qat_trainable = True

    def is_serializable(self, *_, **__) -> bool:
        return True

    def validate_environment(self, *_, **__) -> None:
        if not self.pre_quantized:
            raise ValueError("shrank does not compress while loading: load the dense model, then call auto_fact")

    def _process_model_before_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        model = attach_empty(model, _as_loaded(self.quantization_config.plan, model))
        for _, stage in _stages(model):
            stage._is_hf_initialized = True  # never drawn at random: a factor that is missing is an error
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        if missing := [name for name, module in _stages(model) if _lacks_weights(module)]:
            raise ValueError(f"the checkpoint lacks factors that its plan asks for: {', '.join(missing[:5])}")
        # The weights are ordinary ones: float(), half() and training must stay allowed.
        model.is_quantized = False
        vars(model).pop("quantization_method", None)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module, *_, **__) -> tuple[None, dict]:
        """Called by save_pretrained before it writes config.json: the moment to note what the model is now."""
        model.config.quantization_config = ShrankConfig(describe(model))
        return None, {}

    def _dequantize(self, model: nn.Module, *_, **__) -> nn.Module:
        return merge(model)


def _follow(model: nn.Module) -> None:
    """After a replacement: give every transformers model with low-rank layers the quantizer that saves it, and take it
    from all others."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        low_rank = any(isinstance(m, LOW_RANK) for m in module.modules())
        if low_rank and getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = ShrankQuantizer(ShrankConfig(RankPlan(())))
        elif not low_rank and isinstance(getattr(module, "hf_quantizer", None), ShrankQuantizer):
            del module.hf_quantizer
            vars(module.config).pop("quantization_config", None)


surgery.observers.append(_follow)


def _stages(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for fqn, layer in model.named_modules():
        if isinstance(layer, LOW_RANK):
            yield from ((f"{fqn}.{name}", m) for name, m in layer.named_modules() if m._parameters)


def _lacks_weights(module: nn.Module) -> bool:
    """Whether transformers found a weight of the module missing, of which it only warns."""
    # It flags what it loaded. Weights that accelerate moved or offloaded lost the flag.
    return not hasattr(module, "_hf_hook") and any(
        not p.is_meta and not getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False))


def _as_loaded(plan: RankPlan, model: nn.Module) -> RankPlan:
    """The plan in the names of the model being loaded: a base model may be loaded from a checkpoint of its model with
    a head, and the other way round."""
    names = {fqn for fqn, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    layers: list[LayerPlan] = []
    for layer in plan:
        if layer.fqn in names or not prefix:
            layers.append(layer)
        elif prefix + layer.fqn in names:
            layers.append(_renamed(layer, prefix + layer.fqn))
        elif layer.fqn.startswith(prefix):
            layers.append(_renamed(layer, layer.fqn.removeprefix(prefix)))
        elif any(other.fqn.startswith(prefix) for other in plan) and not any(n.startswith(prefix) for n in names):
            continue  # a layer of the head that the base model does not have
        else:
            layers.append(layer)
    return RankPlan(tuple(layers), plan.other_params)


def _renamed(layer: LayerPlan, fqn: str) -> LayerPlan:
    return replace(layer, fqn=fqn)


def load_model(source: str) -> nn.Module:
    """The model in a folder or hub repository, as the class that wrote it; ValueError or OSError if there is none."""
    import transformers

    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ValueError(f"{source}: no such folder")
    config = transformers.AutoConfig.from_pretrained(source)
    name = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"{source}: transformers {transformers.__version__} has no class {name}")
    return model_class.from_pretrained(source, dtype="auto")


def save_model(model: nn.Module, source: str, folder: str | os.PathLike) -> None:
    """Write the model to a folder, atomically, with the tokenizer and processor files of its source."""
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        for file in Path(source).glob("*") if Path(source).is_dir() else ():
            if file.is_file() and not _is_weights(file) and not (temporary / file.name).exists():
                shutil.copy2(file, temporary / file.name)


def inspect_folder(folder: str | os.PathLike) -> tuple[RankPlan, list[str]]:
    """The plan of a folder that save_pretrained wrote, and what is wrong with the weights; ValueError if it does not
    load."""
    config = Path(folder) / "config.json"
    method = json.loads(config.read_text()).get("quantization_config", {}) if config.is_file() else {}
    if method.get("quant_method") != METHOD:
        raise ValueError(f"{folder}: has no config.json with a plan of shrank")
    model = load_model(str(folder))
    return describe(model), not_finite(model.state_dict())


def _is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf") or \
        file.name.endswith(".index.json")
