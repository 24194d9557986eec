"""peft learns about low-rank layers when it is imported, whichever of the two comes first."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType

from wrapt import register_post_import_hook


def join(model: ModuleType) -> None:
    """Import shrank.lora, which enters itself where peft chooses LoRA layers; older versions, whose layers are made
    another way, go on refusing low-rank layers in words of their own."""
    layer = import_module("peft.tuners.lora.layer")
    if "config" in inspect.signature(layer.Linear.__init__).parameters:
        import_module("shrank.model.lora")


register_post_import_hook(join, "peft.tuners.lora.model")
