"""Which layers of a model see the same, and in how many passes over the data their moments are added up."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .batches import Batch
from .hooks import hooked, in_eval_mode, input_of
from .surgery import Site
from .targets import target

# So many rows are added up in float32 before they go to a float64 sum.
ROWS_IN_FLOAT32 = 1 << 16


@dataclass(frozen=True)
class Group:
    """Layers that get the same input; the moments are those of this input, or of each layer's own outputs."""

    sites: tuple[Site, ...]
    of_inputs: bool


def plan_passes(model: nn.Module, sites: list[Site], batches: list[Batch], gradients: bool,
                max_memory: int) -> tuple[list[list[Group]], list[str]]:
    """The layers in groups that share an input, in the order of execution, split so that the moments of each part fit
    into `max_memory` bytes (of a single group, whatever it needs); and the layers that the first batch does not reach.
    """
    shared, tokens = shared_inputs(model, sites, batches[0])
    groups = [group for sites in shared for group in _sided(sites)]
    spilled = 1 if tokens * len(batches) < ROWS_IN_FLOAT32 else 3  # a float64 sum beside the float32 one
    passes: list[list[Group]] = []
    free = 0
    for group in groups:
        size = 4 * spilled * sum(_entries(group, gradients))
        if not passes or size > free:
            passes.append([])
            free = max_memory
        passes[-1].append(group)
        free -= size
    reached = {id(site) for sites in shared for site in sites}
    return passes, [site.fqn for site in sites if id(site) not in reached]


@torch.no_grad()
def shared_inputs(model: nn.Module, sites: list[Site], batch: Batch) -> tuple[list[list[Site]], int]:
    """The layers that one run reaches, in the order of execution, those with one input together; and the most tokens
    that one of them sees."""
    shared: list[tuple[weakref.ref, list[Site]]] = []  # an input, while it lives, and the layers that got it
    seen: set[int] = set()
    most = 0

    def note(site: Site, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        nonlocal most
        most = max(most, target(module).tokens(output)[..., 0].numel())
        if id(site) in seen:
            return
        seen.add(id(site))
        x = input_of(args, kwargs)
        if target(module).takes_vectors and (sharing := [group for ref, group in shared if ref() is x]):
            sharing[0].append(site)
        else:
            shared.append((weakref.ref(x), [site]))

    with in_eval_mode(model), hooked((site.module, partial(note, site)) for site in sites):
        batch.call(model)
    return [sites for _, sites in shared], most


def _sided(sites: list[Site]) -> list[Group]:
    """The layers with one input as a group that observes it, or each alone if their outputs are fewer numbers."""
    if not target(sites[0].module).takes_vectors:
        return [Group((site,), False) for site in sites]
    shapes = [target(site.module).shape() for site in sites]
    if shapes[0].in_features ** 2 <= sum(shape.out_features**2 for shape in shapes):
        return [Group(tuple(sites), True)]
    return [Group((site,), False) for site in sites]


def _entries(group: Group, gradients: bool) -> Iterator[int]:
    """Numbers in the moments of a group."""
    shapes = [target(site.module).shape() for site in group.sites]
    if group.of_inputs:
        yield shapes[0].in_features ** 2
    for shape in shapes:
        outputs = shape.out_features**2 // shape.groups
        if not group.of_inputs:
            yield outputs
        if gradients:
            yield min(shape.in_features**2, outputs) if group.of_inputs else outputs
