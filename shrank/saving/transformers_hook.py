"""transformers learns about shrank when it is imported, whichever of the two comes first.

Its registry of quantizers may be asked before its models are imported, and is imported by them half-way: so each of the
two is joined on its own.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from wrapt import register_post_import_hook, wrap_function_wrapper

from .checks import needs_plan

OLDEST = 5  # the major version whose quantizer interface transformers_loading enters


def join_quantizers(quantizers: ModuleType) -> None:
    """Import transformers_loading, which enters itself in transformers' registries."""
    if _is_known(_version()):
        import_module("shrank.saving.transformers_loading")


def join_models(modeling_utils: ModuleType) -> None:
    """Import transformers_saving and transformers_models, which wrap what models do; an older transformers, whose files
    it could not load again, is kept from writing them."""
    version = _version()
    if _is_known(version):
        import_module("shrank.saving.transformers_saving")
        import_module("shrank.saving.transformers_models")
        return

    def refuse(save, model, args, kwargs):
        if needs_plan(model):
            raise RuntimeError(
                f"transformers {version} cannot load low-rank models again, {OLDEST} or newer can; "
                "use shrank.save and shrank.load"
            )
        return save(*args, **kwargs)

    wrap_function_wrapper(modeling_utils.PreTrainedModel, "save_pretrained", refuse)


def _version() -> str:
    return import_module("transformers").__version__


def _is_known(version: str) -> bool:
    return int(version.split(".")[0]) >= OLDEST


register_post_import_hook(join_quantizers, "transformers.quantizers.auto")
register_post_import_hook(join_models, "transformers.modeling_utils")
