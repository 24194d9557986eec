"""The blocks of a model: what it repeats, and may be worked on one after another."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

from torch import nn

from .adapters import target

_NEVER_CALLED = nn.ModuleList | nn.ModuleDict


def blocks_of(model: nn.Module) -> dict[str, str]:
    """The block of every layer that could be low-rank, by their names: the outermost entry of a list of modules that
    holds no more than half of these layers; of what is in no such list, the layer itself."""
    modules = dict(model.named_modules())
    holders = {name: list(accumulate(name.split("."), "{}.{}".format)) for name, m in modules.items() if target(m)}
    held = Counter(name for names in holders.values() for name in names)

    def is_block(name: str) -> bool:
        listed = isinstance(modules[name.rpartition(".")[0]], nn.ModuleList | nn.Sequential)
        return listed and not isinstance(modules[name], _NEVER_CALLED) and 2 * held[name] <= len(holders)

    return {name: next(filter(is_block, names), name) for name, names in holders.items()}
