"""transformers learns about shrank when it is imported, whichever of the two comes first."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from wrapt import register_post_import_hook, wrap_function_wrapper

from .targets import LOW_RANK

OLDEST = 5  # the major version whose quantizer interface shrank.hf enters


def join(modeling_utils: ModuleType) -> None:
    """Import shrank.hf, which enters itself in transformers' registries; an older transformers, whose files it could
    not load again, is kept from writing them."""
    version = import_module("transformers").__version__
    if int(version.split(".")[0]) >= OLDEST:
        import_module("shrank.hf")
        return

    def refuse(save, model, args, kwargs):
        if any(isinstance(m, LOW_RANK) for m in model.modules()):
            raise RuntimeError(f"transformers {version} cannot load low-rank models again, {OLDEST} or newer can; "
                               "use shrank.save and shrank.load")
        return save(*args, **kwargs)

    wrap_function_wrapper(modeling_utils.PreTrainedModel, "save_pretrained", refuse)


register_post_import_hook(join, "transformers.modeling_utils")
