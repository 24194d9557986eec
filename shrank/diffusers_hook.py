"""diffusers learns about shrank when it is imported, whichever of the two comes first."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from wrapt import register_post_import_hook, wrap_function_wrapper


def join_quantizers(quantizers: ModuleType) -> None:
    """Import shrank.diffusers_models, which enters itself in diffusers' registries."""
    import_module("shrank.diffusers_models")


def join_models(modeling_utils: ModuleType) -> None:
    """Wrap save_pretrained of diffusers' models."""
    wrapper = import_module("shrank.diffusers_models").save_pretrained
    wrap_function_wrapper(modeling_utils.ModelMixin, "save_pretrained", wrapper)


register_post_import_hook(join_quantizers, "diffusers.quantizers.auto")
register_post_import_hook(join_models, "diffusers.models.modeling_utils")
