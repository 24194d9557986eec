"""Which parts of a student are trained, and which are run again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..layers.quantized import is_quantized
from ..model.adapters import LOW_RANK
from ..model.hooks import recomputing
from ..model.notes import NARROWED, noted
from .distance import common_blocks


def outermost_blocks(student: nn.Module) -> list[nn.Module]:
    """What the module lists of a model hold, those inside of others left out; ValueError without any."""
    names: list[str] = []
    parts = {id(m) for layer in student.modules() if isinstance(layer, LOW_RANK) for m in layer.modules()}
    for name in common_blocks(student, student):
        inner = any(name.startswith(f"{other}.") for other in names)
        if name and not inner and id(student.get_submodule(name)) not in parts:
            names.append(name)
    if not names:
        raise ValueError("recompute: the student has no blocks, entries of a ModuleList or Sequential, to run again")
    return [student.get_submodule(name) for name in names]


@contextmanager
def run_again(student: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """Runs of these blocks keep nothing for the backward pass, which runs them again: without the caches of
    transformers, to which a second run would add."""
    configs = {id(c): c for m in student.modules() if getattr(c := getattr(m, "config", None), "use_cache", False)}
    try:
        for config in configs.values():
            config.use_cache = False
        with recomputing(blocks):
            yield
    finally:
        for config in configs.values():
            config.use_cache = True


def trained_parameters(student: nn.Module, train: str) -> dict[str, nn.Parameter]:
    """The parameters to train, by name, each once."""
    changed = [m for m in student.modules() if isinstance(m, LOW_RANK) or noted(m, NARROWED) is not None]
    inside = {id(p) for m in changed for p in m.parameters()}
    chosen = {
        name: p
        for name, p in student.named_parameters()
        if p.is_floating_point() and not is_quantized(p) and (train == "all" or id(p) in inside)
    }
    if not chosen:
        raise ValueError("the student has no low-rank or narrowed layers to train: compress it first")
    return chosen
