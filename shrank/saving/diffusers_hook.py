"""diffusers learns about shrank when it is imported, whichever of the two comes first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import nn
from wrapt import register_post_import_hook, wrap_function_wrapper

from .checks import needs_plan


def join_quantizers(quantizers: ModuleType) -> None:
    """Import shrank.diffusers_models, which enters itself in diffusers' registries."""
    import_module("shrank.saving.diffusers_models")


def join_models(modeling_utils: ModuleType) -> None:
    """Wrap save_pretrained of diffusers' models; an older diffusers is kept from writing what it could not load."""
    wrapper = _refuse
    if find_spec("diffusers.quantizers") is not None:
        save = import_module("shrank.saving.diffusers_models").save_pretrained
        wrapper = partial(save, modeling_utils.ModelMixin.save_pretrained)
    wrap_function_wrapper(modeling_utils.ModelMixin, "save_pretrained", wrapper)


def _refuse(save: Callable, model: nn.Module, args: tuple, kwargs: dict) -> object:
    if needs_plan(model):
        raise RuntimeError(
            "this diffusers has no quantizers, through which low-rank models are loaded again; use a "
            "newer one, or shrank.save and shrank.load"
        )
    return save(*args, **kwargs)


register_post_import_hook(join_quantizers, "diffusers.quantizers.auto")
register_post_import_hook(join_models, "diffusers.models.modeling_utils")
