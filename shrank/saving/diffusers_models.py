"""Teaches diffusers to save and load low-rank models, alone and in pipelines.

As in transformers, its hook is the quantizer, which travels in config.json. This module is imported as soon as
diffusers' registry of quantizers exists, when its models may be half imported.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from inspect import signature
from typing import TYPE_CHECKING

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ..compression.apply import attach_empty, merge, unpack
from ..compression.describe import describe
from ..layers.pivots import Pivots
from ..layers.seal import sealed_names
from ..planning.plan import RankPlan
from ..util.lines import indented
from .checks import METHOD, check_saveable, is_plan, needs_plan, sealing, stand_in_for

if TYPE_CHECKING:
    from diffusers import ModelMixin

_CONFIG = "quantization_config"


class _Method(str, Enum):
    """diffusers asks a method for its value."""

    SHRANK = METHOD


class DiffusersConfig(QuantizationConfigMixin):
    """The `quantization_config` of a low-rank model: its plan."""

    def __init__(self, plan: dict | RankPlan | None = None, quant_method: str = METHOD) -> None:
        self.quant_method = _Method(quant_method)
        self.plan = plan if isinstance(plan, RankPlan) else RankPlan.from_dict(plan)

    def to_dict(self) -> dict:
        return {"quant_method": METHOD, "plan": self.plan.to_dict()}

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.plan.low_rank)} low-rank layers)"


class LowRankQuantizer(DiffusersQuantizer):
    """Puts low-rank layers into a model before its weights are loaded."""

    is_serializable = True
    is_trainable = True
    is_compileable = True
    use_keep_in_fp32_modules = True

    def validate_environment(self, *_, **__) -> None:
        if not self.pre_quantized:
            raise ValueError("shrank does not compress while loading: load the dense model, then call auto_fact")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        sealed = sealed_names(loaded_keys)
        return [name for name in loaded_keys if name not in sealed]

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        # diffusers only warns of them, and leaves them without data.
        if missing_keys:
            raise ValueError(f"the checkpoint lacks weights that its plan asks for: {indented(sorted(missing_keys))}")
        return missing_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **_) -> None:
        attach_empty(model, self.quantization_config.plan)

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> None:
        unpack(model)
        for module in model.modules():
            if isinstance(module, Pivots):
                module.settle()
        # The weights are ordinary ones, and the config that of the dense class.
        model.is_quantized = False
        vars(model).pop("quantization_method", None)
        _set_plan(model, None)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return merge(model)


def save_pretrained(save_plainly: Callable, save: Callable, model: ModelMixin, args: tuple, kwargs: dict) -> None:
    """ModelMixin.save_pretrained, plain as a function of the model and bound to it: of a low-rank model it also writes
    the plan, and a seal for every layer."""
    quantizer, low_rank = getattr(model, "hf_quantizer", None), needs_plan(model)
    ours = isinstance(quantizer, LowRankQuantizer)
    if not (low_rank or ours or is_plan(model.config.get(_CONFIG))):
        return save(*args, **kwargs)
    if low_rank:
        check_saveable(model)
        if quantizer is not None and not ours:
            raise ValueError(
                f"the model was quantized by {quantizer.quantization_config.quant_method} and has "
                "low-rank layers; diffusers loads only one of the two again. Compress the model in "
                "floating point and save that, then quantize what from_pretrained loads"
            )
        if signature(save_plainly).bind(model, *args, **kwargs).arguments.get("use_flashpack"):
            raise ValueError("flashpack casts every tensor to one dtype; save low-rank models as safetensors")
    stand_in = stand_in_for(model)
    if ours:
        del stand_in.hf_quantizer
    _set_plan(stand_in, describe(model) if low_rank else None)
    with sealing(model):
        return save_plainly(stand_in, *args, **kwargs)


def _set_plan(model: ModelMixin, plan: RankPlan | None) -> None:
    """Make this the plan of a model's config, an object of its own: others may hold the old one."""
    config = {name: value for name, value in model.config.items() if name != _CONFIG}
    model._internal_dict = type(model.config)(config | ({_CONFIG: DiffusersConfig(plan)} if plan else {}))


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DiffusersConfig
AUTO_QUANTIZER_MAPPING[METHOD] = LowRankQuantizer
