"""safetensors.torch.save_model writes of a low-rank model what shrank.save does, and load_model knows such a file.

The hub's model mixin, sentence-transformers' modules and lerobot's policies save so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from types import ModuleType

import safetensors.torch
from torch import nn
from wrapt import register_post_import_hook, wrap_function_wrapper

from ..util import tensor_file
from .checkpoint import METADATA_KEY, content, load, read_header
from .checks import is_compressed, needs_plan, sealing


def save_model(save: Callable, _: object, args: tuple, kwargs: dict) -> None:
    """safetensors.torch.save_model, which of a low-rank model also writes its plan."""
    call = signature(save).bind(*args, **kwargs).arguments
    if not needs_plan(call["model"]):
        return save(*args, **kwargs)
    tensors, metadata = content(call["model"])
    return tensor_file.write(call["filename"], tensors, {**(call.get("metadata") or {}), **metadata})


def load_model(load_dense: Callable, _: object, args: tuple, kwargs: dict) -> tuple[set[str], list[str]]:
    """safetensors.torch.load_model, which makes the model low-rank where the file says so; nothing is missing then,
    and nothing unexpected, however strict it is to be."""
    call = signature(load_dense).bind(*args, **kwargs).arguments
    model, path = call["model"], call["filename"]
    if not tensor_file.has_metadata(path, METADATA_KEY):
        return load_dense(*args, **kwargs)
    if not is_compressed(model) and "" in {layer.fqn for layer in read_header(path).plan.changed}:
        raise ValueError(
            f"{path}: the model itself is a low-rank layer, and no function can turn a "
            f"{type(model).__name__} into one in place; use model = shrank.load(model, path)"
        )
    load(model, path)
    return set(), []


def _accelerate_save(save: Callable, _: object, args: tuple, kwargs: dict) -> None:
    """Accelerator.save_model, whose files load only into low-rank models: with a seal, and into no other in silence."""
    model = signature(save).bind(*args, **kwargs).arguments["model"]
    with sealing(model):
        return save(*args, **kwargs)


def _hub_save(save: Callable, model: object, args: tuple, kwargs: dict) -> object:
    """ModelHubMixin.save_pretrained, whose subclasses write the state in ways of their own: then with seals."""
    if not isinstance(model, nn.Module):
        return save(*args, **kwargs)
    with sealing(model):
        return save(*args, **kwargs)


def _sentence_module_save(save: Callable, module: object, args: tuple, kwargs: dict) -> None:
    """save_torch_weights of sentence-transformers' modules, of which only the safetensors know low-rank layers."""
    if needs_plan(module) and not signature(save).bind(*args, **kwargs).arguments.get("safe_serialization", True):
        raise ValueError(
            f"a {type(module).__name__} with low-rank layers is loaded again only from safetensors; save "
            "with safe_serialization=True"
        )
    return save(*args, **kwargs)


def _wrap(name: str, wrapper: Callable) -> None:
    """Wrap a function of safetensors.torch, also for the modules that have already taken it from there."""
    plain = vars(safetensors.torch)[name]
    wrap_function_wrapper(safetensors.torch, name, wrapper)
    for module in list(sys.modules.values()):
        names = vars(module) if isinstance(module, ModuleType) else {}
        for own in [own for own, value in list(names.items()) if value is plain]:
            names[own] = vars(safetensors.torch)[name]


_wrap("save_model", save_model)
_wrap("load_model", load_model)
register_post_import_hook(
    lambda module: wrap_function_wrapper(module.Accelerator, "save_model", _accelerate_save), "accelerate.accelerator"
)
register_post_import_hook(
    lambda module: wrap_function_wrapper(module.ModelHubMixin, "save_pretrained", _hub_save),
    "huggingface_hub.hub_mixin",
)
register_post_import_hook(
    lambda module: wrap_function_wrapper(module.Module, "save_torch_weights", _sentence_module_save),
    "sentence_transformers.base.modules.module",
)
