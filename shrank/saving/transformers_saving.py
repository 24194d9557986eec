"""Teaches transformers to save low-rank models: save_pretrained writes their plan, and a seal for every layer.

What is written is that of a stand-in, which shares the model's modules and has a config of its own: the model, and
other models that share its config, never carry a plan, whatever happens while it is saved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from inspect import BoundArguments, signature
from pathlib import Path

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import PreTrainedModel
from wrapt import wrap_function_wrapper

from ..compression.describe import describe
from ..layers.quantized import packed_state
from ..planning.plan import RankPlan
from ..util.lines import indented
from .checks import check_saveable, is_plan, needs_plan, seals, stand_in_for, why_not_data
from .transformers_loading import ShrankConfig, ShrankQuantizer, remove_plan
from .transformers_widths import configs_in, plain_as_possible

_save_plainly = PreTrainedModel.save_pretrained


def save_pretrained(save: Callable, model: PreTrainedModel, args: tuple, kwargs: dict) -> object:
    """save_pretrained of any model of transformers: for what it has become, which nothing knows before."""
    changed = needs_plan(model)
    ours = isinstance(getattr(model, "hf_quantizer", None), ShrankQuantizer)
    if not (changed or ours or any(is_plan(vars(c).get("quantization_config")) for c in configs_in(model.config))):
        return save(*args, **kwargs)
    stand_in = _stand_in(model)
    call = signature(_save_plainly).bind(stand_in, *args, **kwargs)
    if changed and not getattr(model, "_hf_peft_config_loaded", False):  # else only adapters are written
        _check(model, call)
        if (plan := plain_as_possible(stand_in, describe(model))).layers:
            stand_in.config.quantization_config = ShrankConfig.of(plan)
            _pack(model, call)
    return _save_plainly(*call.args, **call.kwargs)


def _pack(model: PreTrainedModel, call: BoundArguments) -> None:
    """Have the state written as files have it, with seals; ValueError if they cannot."""
    state = dict(call.arguments.get("state_dict") or model.state_dict())
    if wrong := [f"{name}: {reason}" for name, value in state.items() if (reason := why_not_data(value))]:
        raise ValueError(
            "safetensors hold only plain tensors, and what shrank.quantize_factors made; save before quantizing by "
            f"others:{indented(wrong)}"
        )
    call.arguments["state_dict"] = packed_state(state) | seals(model)
    if "save_original_format" in signature(_save_plainly).parameters:
        call.arguments["save_original_format"] = False


def save_config(model: PreTrainedModel, plan: RankPlan, folder: Path) -> None:
    """Write the configs that `save_pretrained` writes of a model whose layers became what this plan says."""
    config = _stand_in(model).config
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.quantization_config = ShrankConfig.of(plan)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _stand_in(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a config of its own, without plans and without a quantizer of shrank, which reads and does not
    write."""
    stand_in = stand_in_for(model)
    stand_in.config = copy.deepcopy(model.config)
    for config in configs_in(stand_in.config):
        remove_plan(config)
    if isinstance(vars(stand_in).get("hf_quantizer"), ShrankQuantizer):
        # With it goes what it knew of names: a model that was merged is saved as any other of its class.
        del stand_in.hf_quantizer
        vars(stand_in).pop("_weight_conversions", None)
    return stand_in


def _check(model: PreTrainedModel, call: BoundArguments) -> None:
    """ValueError, before anything is written, on what from_pretrained could not load again."""
    check_saveable(model)
    for fqn, module in model.named_modules():
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is not None and not isinstance(quantizer, ShrankQuantizer):
            method = quantizer.quantization_config.quant_method
            raise ValueError(
                f"{fqn or 'the model'} was quantized by {getattr(method, 'value', method)} and has low-rank layers; "
                "transformers loads only one of the two again. Compress the model in floating point and save that, "
                "then quantize what from_pretrained loads"
            )
    if adapted := [fqn for fqn, module in model.named_modules() if type(module).__module__.startswith("peft.tuners")]:
        raise ValueError(
            f"adapters are attached to {', '.join(adapted[:5])}, where from_pretrained would find no "
            "weights under the layers' names; save them by PeftModel.save_pretrained, or merge them "
            "first: PeftModel.merge_and_unload()"
        )
    if call.arguments.get("distributed_checkpoint"):
        raise ValueError(
            "transformers does not load distributed checkpoints of models with a plan; save with "
            "distributed_checkpoint=False, which gathers the weights"
        )
    if call.arguments.get("save_original_format") and (rules := get_model_conversion_mapping(model, add_legacy=False)):
        raise ValueError(
            f"save_original_format=True: transformers has {len(rules)} rules that turn the weights of a "
            f"{type(model).__name__} into those of the published format, and they know only dense weights; leave it "
            "out, or merge the model first"
        )


wrap_function_wrapper(PreTrainedModel, "save_pretrained", save_pretrained)
