"""Why a module, taken alone, cannot be replaced by a low-rank one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations

from ..layers.quantized import is_quantized, storage_of
from ..linalg import Shape
from .adapters import ADAPTERS, LOW_RANK, is_hf_conv1d, is_lazy, target
from .subclasses import base_of, disagreement, is_trusted

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not(module: nn.Module) -> list[str]:
    """Every reason for which this module, taken alone, cannot be replaced; [] means it can."""
    if isinstance(module, LOW_RANK):
        return ["already low-rank"]
    weight = getattr(module, "weight", None)
    if is_lazy(weight):
        return ["its weight is not initialized yet"]
    if target(module) is None:
        return [_why_not_type(module)]
    if is_quantized(weight):
        return [f"its weight is on a grid already ({storage_of(module)})"]
    if type(weight) is not nn.Parameter or "weight" not in module._parameters:
        return [f"its weight is a {type(weight).__name__}, not a plain parameter (weight_norm, pruning, quantization)"]
    reasons = []
    if weight.is_meta:
        reasons.append("its weight is on the meta device (offloaded or not loaded)")
    elif weight.dtype not in _DTYPES:
        reasons.append(f"its weight is {weight.dtype}")
    extra = [n for n, _ in module.named_parameters() if n not in ("weight", "bias")]
    if extra := extra + [n for n, _ in module.named_buffers()]:
        reasons.append(f"it carries extra state: {', '.join(extra)}")
    # weight_norm leaves one of torch behind when its parametrization goes; it only renames entries of old checkpoints.
    loading = [h for h in module._load_state_dict_pre_hooks.values() if h.hook.__module__ != parametrizations.__name__]
    if module._state_dict_hooks or loading:
        reasons.append("it has state-dict hooks, made for a dense weight")
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        reasons.append("its forward was patched on the instance")
    if not reasons and type(module) not in ADAPTERS and is_trusted(type(module)) and (reason := disagreement(module)):
        reasons.append(f"treat_as_base does not hold: {reason}")
    return reasons or why_not_shape(target(module).shape())


def _why_not_type(module: nn.Module) -> str:
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        return f"its {', '.join(module.parametrizations)} is parametrized"
    # Namesakes are common: quantized layers, other packages' Linear.
    name = kind.__qualname__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__qualname__}"
    if (base := base_of(kind)) is not None:
        return (
            f"{name} is a subclass of {base.__name__}: if it only casts or adds up in another order, "
            "shrank.treat_as_base(class) has it checked and taken for its base"
        )
    if any(is_hf_conv1d(c) for c in kind.__mro__):
        return f"{name} is a subclass of transformers' Conv1D"
    return f"{name} is not a supported layer type"


def why_not_shape(shape: Shape) -> list[str]:
    """Every reason for which no layer of this shape can be replaced."""
    if shape.groups > 1 and shape.max_rank == shape.groups:
        return [f"depthwise: each of its {shape.groups} groups already has rank 1"]
    return [] if shape.dense_params else ["it is empty"]
