"""Teaches transformers to save and load low-rank models: save_pretrained and from_pretrained work unchanged.

transformers' hook for models whose modules differ from their class's own is its quantizer: it travels in config.json
as `quantization_config` and may replace modules of the empty model before the weights are read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from wrapt import wrap_function_wrapper

from .apply import attach_empty, describe, merge
from .checkpoint import not_finite, tensor_names
from .files import replacing
from .plan import RankPlan
from .stages import Pivots
from .targets import LOW_RANK, target

METHOD = "shrank"


@register_quantization_config(METHOD)
class ShrankConfig(QuantizationConfigMixin):
    """The `quantization_config` of a low-rank model: its plan."""

    quant_method = METHOD

    def __init__(self, plan: dict | RankPlan | None = None, quant_method: str = METHOD) -> None:
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

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **_) -> nn.Module:
        plan = _as_loaded(self.quantization_config.plan, model)
        self.dropped_layers = len(plan) < len(self.quantization_config.plan)
        model = attach_empty(model, plan)
        _check_unplanned(model, [f for f in checkpoint_files or () if str(f).endswith(".safetensors")])
        for stage in _stages(model):
            stage._is_hf_initialized = True  # never drawn at random: a factor that is missing is an error
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        # transformers only warns of weights that the checkpoint lacks and draws them at random. That is right for parts
        # that the saved class did not have; anywhere else plan and weights disagree.
        checked = set(_stages(model))
        if _is_saved_class(model) or self.dropped_layers:
            whole = model if _is_saved_class(model) else model.base_model
            checked.update(m for m in whole.modules() if target(m))
        if missing := [name for name, m in model.named_modules() if m in checked and _lacks_weights(m)]:
            raise ValueError(f"the checkpoint lacks weights that its plan asks for: {', '.join(missing[:5])}")
        for module in model.modules():
            if isinstance(module, Pivots):
                module.settle()
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


@partial(wrap_function_wrapper, PreTrainedModel, "save_pretrained")
def _save_pretrained(save: Callable, model: PreTrainedModel, args: tuple, kwargs: dict) -> object:
    """Before a model is saved, give it the quantizer that writes its plan if it has low-rank layers, else take it away.

    At no other time is it known what the model has become: parts of it may have been compressed or merged on their own.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            low_rank = any(isinstance(m, LOW_RANK) for m in module.modules())
            quantizer = getattr(module, "hf_quantizer", None)
            if low_rank and quantizer is None:
                module.hf_quantizer = ShrankQuantizer(ShrankConfig(RankPlan(())))
            elif not low_rank and isinstance(quantizer, ShrankQuantizer):
                del module.hf_quantizer
                vars(module.config).pop("quantization_config", None)
    return save(*args, **kwargs)


def _stages(model: nn.Module) -> Iterator[nn.Module]:
    for layer in model.modules():
        if isinstance(layer, LOW_RANK):
            yield from (m for m in layer.modules() if m._parameters)


def _check_unplanned(model: PreTrainedModel, files: list[str]) -> None:
    """ValueError if the files hold factors of a layer that stays dense in this model."""
    owners = {_outer(name) for file in files for name in tensor_names(file) if _outer(name) != name}
    dense = {fqn for fqn, module in model.named_modules() if target(module)}
    if unplanned := sorted(fqn for owner in owners for fqn in _possible_names(owner, model) if fqn in dense):
        raise ValueError(f"the files hold factors of layers that the plan lacks: {', '.join(unplanned[:5])}")


def _possible_names(fqn: str, model: PreTrainedModel) -> tuple[str, str, str]:
    """A saved layer's name in the model being loaded: the same, or with the base model's prefix more or less."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return fqn, prefix + fqn, fqn.removeprefix(prefix)


def _is_saved_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or ())


def _lacks_weights(module: nn.Module) -> bool:
    """Whether transformers found a weight of the module missing, of which it only warns."""
    # It flags what it loaded. Weights that accelerate moved or offloaded lost the flag.
    return not hasattr(module, "_hf_hook") and any(
        not p.is_meta and not getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False))


def _as_loaded(plan: RankPlan, model: nn.Module) -> RankPlan:
    """The plan in the names of the model being loaded: a base model may be loaded from a checkpoint of its model with
    a head, and the other way round. Another class than the saved one may lack some of the layers."""
    names = {fqn for fqn, _ in model.named_modules()}
    layers = []
    for layer in plan:
        fqn = next((name for name in _possible_names(layer.fqn, model) if _outer(name) in names), layer.fqn)
        if _outer(fqn) in names or _is_saved_class(model):
            layers.append(replace(layer, fqn=fqn))
    return RankPlan(tuple(layers))


def _outer(fqn: str) -> str:
    """The layer of the dense model to which a name belongs: stages of low-rank layers are not in it."""
    return re.split(r"\.?(?:led|ced)_unit\.", fqn)[0]


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
