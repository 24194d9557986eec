"""Teaches transformers to load low-rank models: from_pretrained works unchanged.

transformers' hook for models whose modules differ from their class's own is its quantizer: it travels in config.json
as `quantization_config` and may replace modules of the empty model before the weights are read. This module is
imported as soon as transformers' registry of quantizers exists, when its models may be half imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..compression.apply import attach_empty, merge, unpack
from ..layers.led import LED
from ..layers.packed import PackedLinear
from ..layers.pivots import Pivots
from ..layers.quantized import VALUES
from ..layers.seal import DENSE_NAME
from ..model.adapters import LOW_RANK, target
from ..planning.plan import RankPlan
from ..util import tensor_file
from .checks import METHOD, is_plan
from .transformers_names import as_loaded, is_saved_class, outer, possible_names, resized_layers, seal_patterns

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_AS_PUBLISHED, _AS_IN_MODEL = "published", "model"


@register_quantization_config(METHOD)
class ShrankConfig(QuantizationConfigMixin):
    """The `quantization_config` of a low-rank model: its plan, and whose names its files use for tensors: the model's
    own, or in older files those that transformers' weight conversion gives to published ones."""

    quant_method = METHOD

    def __init__(
        self, plan: dict | RankPlan | None = None, quant_method: str = METHOD, names: str = _AS_PUBLISHED
    ) -> None:
        self.quant_method = quant_method
        self.plan = plan if plan is None or isinstance(plan, RankPlan) else RankPlan.from_dict(plan)
        self.names = names

    @classmethod
    def of(cls, plan: RankPlan) -> ShrankConfig:
        """What a folder written now says."""
        return cls(plan, names=_AS_IN_MODEL)

    def to_dict(self) -> dict:
        return {"quant_method": METHOD, "plan": self.plan and self.plan.to_dict(), "names": self.names}


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
        if self.quantization_config.plan is None:
            raise ValueError("the quantization_config of config.json has no plan, which save_pretrained writes there")

    def update_weight_conversions(self, weight_conversions: list, *model: nn.Module) -> list:
        """Conversions split, fuse and rename the tensors of published files: not those of the model itself.

        model: of transformers 5.19 none, of 5.24 the one that is being loaded.
        """
        if self.quantization_config.names != _AS_IN_MODEL:
            return super().update_weight_conversions(weight_conversions, *model)
        if self.loads_saved_class:
            return []
        return [x for x in weight_conversions if not isinstance(x, WeightConverter)]

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **_) -> nn.Module:
        planned, self.loads_saved_class = self.quantization_config.plan, is_saved_class(model)
        self.stored = _shapes([f for f in checkpoint_files or () if str(f).endswith(".safetensors")])
        plan = as_loaded(planned, model)
        # In a file with seals a dense layer that lacks its weight is a new part of this class, not one without a plan.
        self.may_lack_plans = len(plan) < len(planned) and self.quantization_config.names != _AS_IN_MODEL
        # A seal where the model keeps a dense layer lets transformers decide: an error, or a new layer where it was
        # told to ignore sizes.
        resized = {
            fqn
            for fqn in resized_layers(plan, model)
            if any(f"{name}.{DENSE_NAME}" in self.stored for name in possible_names(fqn, model))
        }
        kept = tuple(layer for layer in plan if layer.fqn not in resized)
        model = attach_empty(model, RankPlan(kept, narrowed=plan.narrowed))
        _check_unplanned(model, self.stored, resized)
        model.all_tied_weights_keys = untied(model, model.all_tied_weights_keys)
        self.ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(self.ignored or ()), *seal_patterns(planned, model)}
        for stage in _stages(model):
            stage._is_hf_initialized = True  # never drawn at random: a factor that is missing is an error
        self.expected = {name: p.shape for name, p in model.named_parameters()}
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Called with the plan of tensor parallelism and that of experts."""
        if plan is model.tp_plan and any(isinstance(m, LED | PackedLinear) for m in model.modules()):
            from .transformers_parallel import make_aware

            make_aware(model, plan)

    def _process_model_after_weight_loading(self, model: nn.Module, **_) -> nn.Module:
        is_split = (getattr(model, "_tp_size", None) or 1) > 1
        self._restore_parallel_plan(model, is_split)
        if not is_split:
            _check_shapes(model, self.expected)
        # transformers only warns of weights that the checkpoint lacks and draws them at random. That is right for parts
        # that the saved class did not have, and where it was told to ignore sizes; elsewhere plan and weights disagree.
        stages = set(_stages(model))
        checked = set(stages)
        if is_saved_class(model) or self.may_lack_plans:
            whole = model if is_saved_class(model) else model.base_model
            checked.update(m for m in whole.modules() if target(m))
        lacking = {name: m for name, m in model.named_modules() if m in checked and _lacks_weights(m)}
        if missing := [
            name for name, m in lacking.items() if m in stages or not self._is_stored_in_another_size(name, model)
        ]:
            raise ValueError(f"the checkpoint lacks weights that its plan asks for: {', '.join(missing[:5])}")
        unpack(model)
        for module in model.modules():
            if isinstance(module, Pivots):
                module.settle()
        # The weights are ordinary ones: float(), half() and training must stay allowed. The config is that of the dense
        # class: models built from it are dense.
        model._keys_to_ignore_on_load_unexpected = self.ignored
        self.stored.clear()
        self.expected.clear()
        model.is_quantized = False
        vars(model).pop("quantization_method", None)
        remove_plan(model.config)
        return model

    def _restore_parallel_plan(self, model: PreTrainedModel, is_split: bool) -> None:
        """Give the plan of tensor parallelism back as the model's class has it."""
        if not hasattr(HfQuantizer, "update_parallel_plan"):
            if is_split:
                raise ValueError("this transformers cannot split low-rank layers between processes: 5.24 can")
        elif any(isinstance(m, LED | PackedLinear) for m in model.modules()):
            from .transformers_parallel import as_published

            as_published(model.tp_plan)

    def _is_stored_in_another_size(self, fqn: str, model: nn.Module) -> bool:
        """Whether the files have a parameter of this module in another shape: of that transformers itself makes an
        error, unless it was told to ignore sizes."""
        return any(
            self.stored.get(f"{name}.{leaf}", p.shape) != tuple(p.shape)
            for leaf, p in model.get_submodule(fqn).named_parameters(recurse=False)
            for name in possible_names(fqn, model)
        )

    def _dequantize(self, model: nn.Module, *_, **__) -> nn.Module:
        return merge(model)


def untied(model: nn.Module, tied: dict[str, str]) -> dict[str, str]:
    """Of the parameters that a class ties, target to source, those of which neither is a low-rank layer's."""
    low_rank = {fqn for fqn, module in model.named_modules(remove_duplicate=False) if isinstance(module, LOW_RANK)}
    return {
        one: other
        for one, other in tied.items()
        if low_rank.isdisjoint((one.rpartition(".")[0], other.rpartition(".")[0]))
    }


def remove_plan(config: PreTrainedConfig) -> None:
    """Take the plan out of a config, whose model then is dense."""
    if is_plan(vars(config).get("quantization_config")):
        del vars(config)["quantization_config"]


def _shapes(files: list[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors; ValueError on values of weights of few bits that are none: transformers casts them."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes = tensor_file.read_table(file)[0]
        if wrong := tensor_file.not_of_bytes(file, [n for n in shapes if n.endswith(f"{DENSE_NAME}{VALUES}")]):
            raise ValueError(f"{file}: values are whole numbers of 8 bits, and these are not: {', '.join(wrong[:5])}")
        found |= shapes
    return found


def _stages(model: nn.Module) -> Iterator[nn.Module]:
    """Low-rank and packed layers with all that is in them: Funnel draws the weight of whatever is called Linear, a
    stage without parameters of its own included."""
    for layer in model.modules():
        if isinstance(layer, LOW_RANK | PackedLinear):
            yield from layer.modules()


def _check_unplanned(model: PreTrainedModel, stored: dict, resized: set[str]) -> None:
    """ValueError if the files hold factors of a layer that stays dense in this model, other than a resized one."""
    owners = {outer(name) for name in stored if outer(name) != name}
    dense = {fqn for fqn, module in model.named_modules() if target(module)} - resized
    if unplanned := sorted(fqn for owner in owners for fqn in possible_names(owner, model) if fqn in dense):
        raise ValueError(f"the files hold factors of layers that the plan lacks: {', '.join(unplanned[:5])}")


def _check_shapes(model: PreTrainedModel, expected: dict[str, torch.Size]) -> None:
    """ValueError if loading changed the shape of a parameter: transformers 5.19 asks it only of models without a
    quantizer."""
    if wrong := [
        f"{name} is {tuple(p.shape)} in the files, wanted {tuple(expected[name])}"
        for name, p in model.named_parameters()
        if p.shape != expected.get(name, p.shape)
    ]:
        raise ValueError(f"the checkpoint does not fit its plan: {'; '.join(wrong[:5])}")


def _lacks_weights(module: nn.Module) -> bool:
    """Whether transformers found a weight of the module missing, of which it only warns."""
    # It flags what it loaded. Weights that accelerate moved or offloaded lost the flag.
    return not hasattr(module, "_hf_hook") and any(
        not p.is_meta and not getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)
    )
