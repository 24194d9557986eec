"""Which layers of a model see the same, and in how many passes over the data their moments are added up."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ..model.adapters import target
from ..model.hooks import hooked, in_eval_mode, input_of
from ..model.survey import Site
from ..util.processes import current
from ..util.progress import track
from .batches import Batch
from .streams import Masking

# So many rows are added up in float32 before they go to a float64 sum.
ROWS_IN_FLOAT32 = 1 << 16


@dataclass(frozen=True)
class Group:
    """Layers that get the same input; the moments are those of this input, or of each layer's own outputs. Gradients
    are noted at the inputs where these are fewer, but for layers that are `told_apart` by their outputs. `channels`:
    the moment of a convolution's input channels is noted beside."""

    sites: tuple[Site, ...]
    of_inputs: bool
    told_apart: frozenset[str] = frozenset()
    channels: bool = False

    def gradient_of_inputs(self, site: Site) -> bool:
        """Whether the gradients that reach a layer are noted as its inputs feel them."""
        fewer = self.of_inputs and site.shape.out_features > site.shape.in_features
        return fewer and site.fqn not in self.told_apart


@dataclass(frozen=True)
class Sides:
    """On what side layers are observed, whatever is smaller.

    Args:
        inputs: Linear layers, all or those of these names, by their inputs.
        told_apart: Names of layers whose gradients are noted output by output.
        channels: Names of convolutions that are observed by their input channels beside.
    """

    inputs: bool | frozenset[str] = False
    told_apart: frozenset[str] = frozenset()
    channels: frozenset[str] = frozenset()


class Inputs:
    """Tensors that layers are called with, known again while they live and nothing changes them in place."""

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref, int]] = []
        self.count = 0

    def number(self, x: Tensor) -> int:
        """The same number for the same tensor, a new one for a new one."""
        version = 0 if x.is_inference() else x._version  # how often it was changed in place
        alive = [(n, ref, at) for n, ref, at in self._seen if ref() is not None]
        if (known := next((n for n, ref, at in alive if ref() is x and at == version), None)) is None:
            known, self.count = self.count, self.count + 1
            alive.append((known, weakref.ref(x), version))
        self._seen = alive
        return known


@dataclass(frozen=True)
class LayerCalls:
    """How all the data calls the layers: `shared`, those that every call gave the same inputs together, in
    the order of execution; `calls`, how many each had in every batch; `rows`, how many the layer that saw most saw in
    all; `unseen`, those that saw none."""

    shared: list[list[str]]
    calls: dict[str, list[int]]
    rows: int
    unseen: list[str]


def plan_passes(
    sites: list[Site], calls: LayerCalls, gradients: bool, max_memory: int, sides: Sides
) -> list[list[Group]]:
    """The layers in groups that share their inputs, in the order of execution, split so that the moments of each part
    fit into `max_memory` bytes (of a single group, whatever it needs)."""
    by_name = {site.fqn: site for site in sites}
    groups = [group for names in calls.shared for group in _sided([by_name[name] for name in names], sides)]
    return in_passes(groups, calls.rows, lambda group: sum(_entries(group, gradients)), max_memory)


def in_passes(groups: list[Group], rows: int, entries: Callable[[Group], int], max_memory: int) -> list[list[Group]]:
    """Groups split so that the moments of each part, of so many entries and at most so many rows, fit into this."""
    spilled = 1 if rows < ROWS_IN_FLOAT32 else 3  # a float64 sum beside the float32 one
    passes: list[list[Group]] = []
    free = 0
    for group in groups:
        size = 4 * spilled * entries(group)
        if not passes or size > free:
            passes.append([])
            free = max_memory
        passes[-1].append(group)
        free -= size
    return passes


def anchored_entries(group: Group) -> int:
    """Numbers in the moments of a group that is anchored: of what it sees, and of that with what it should see."""
    return 2 * sum(_entries(group, gradients=False))


def observe_calls(
    model: nn.Module,
    sites: list[Site],
    batches: list[Batch],
    masking: Masking,
    others: Iterable[Site] = (),
    around: Callable[[int], AbstractContextManager] = lambda number: nullcontext(),
) -> LayerCalls:
    """Run all the batches, which are bound to the model, and look at what its layers are called with.

    others: layers that are not asked about, whose shapes masks may have as well. around: in which the batch of a number
    runs.
    """
    here = current()
    # Of every batch the numbers of each layer's inputs, in the order of the first calls.
    seen: dict[int, dict[str, list[int]]] = {}
    rows, inputs = {site.fqn: 0 for site in sites}, Inputs()

    def note(site: Site, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        leading = tuple(target(module).tokens(output).shape[:-1])
        mask = masking.call(site.fqn)(leading)
        rows[site.fqn] += math.prod(leading) if mask is None else int(mask.sum())
        seen[number].setdefault(site.fqn, []).append(inputs.number(input_of(args, kwargs)))

    def match(site: Site, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        masking.call(site.fqn)(tuple(target(module).tokens(output).shape[:-1]))

    hooks = [
        *masking.hooks(),
        *((site.module, partial(note, site)) for site in sites),
        *((site.module, partial(match, site)) for site in others),
    ]
    share = here.share(enumerate(batches))
    masking.prepare(batch for _, batch in share)
    with in_eval_mode(model), hooked(hooks):
        for number, batch in track(share, "looking at the data"):
            seen[number] = {}
            masking.begin(batch)
            with around(number):
                batch.call(model)
    parts = here.exchange((seen, rows))
    rows = {name: sum(part[name] for _, part in parts) for name in rows}
    in_order = dict(sorted(pair for part, _ in parts for pair in part.items()))
    return _together(list(in_order.values()), rows, sites)


def _together(seen: list[dict[str, list[int]]], rows: dict[str, int], sites: list[Site]) -> LayerCalls:
    """What all batches say: of each, the numbers of every layer's inputs."""
    calls = {name: [len(batch.get(name, ())) for batch in seen] for name in rows}
    inputs: dict[str, list[tuple[int, int]]] = {}
    for number, batch in enumerate(seen):
        for name, numbers in batch.items():
            inputs.setdefault(name, []).extend((number, n) for n in numbers)
    shared: dict[object, list[str]] = {}
    vectors = {site.fqn for site in sites if site.adapter.takes_vectors}
    for name, numbers in inputs.items():
        if rows[name]:
            shared.setdefault(tuple(numbers) if name in vectors else name, []).append(name)
    unseen = [name for name, n in rows.items() if not n]
    return LayerCalls(list(shared.values()), calls, max(rows.values(), default=0), unseen)


def _sided(sites: list[Site], sides: Sides) -> list[Group]:
    """The layers with one input as a group that observes it; or each alone, if their outputs are fewer numbers and
    nobody insists on the inputs."""
    if not sites[0].adapter.takes_vectors:
        return [Group((site,), False, channels=site.fqn in sides.channels) for site in sites]
    shapes = [site.shape for site in sites]
    insisted = sides.inputs is True or any(site.fqn in (sides.inputs or ()) for site in sites)
    if insisted or shapes[0].in_features ** 2 <= sum(shape.out_features**2 for shape in shapes):
        return [Group(tuple(sites), True, sides.told_apart & {site.fqn for site in sites})]
    return [Group((site,), False) for site in sites]


def _entries(group: Group, gradients: bool) -> Iterator[int]:
    """Numbers in the moments of a group."""
    shapes = [site.shape for site in group.sites]
    if group.channels:
        yield group.sites[0].adapter.input_channels ** 2
    if group.of_inputs:
        yield shapes[0].in_features ** 2
    for site, shape in zip(group.sites, shapes, strict=True):
        outputs = shape.out_features**2 // shape.groups
        if not group.of_inputs:
            yield outputs
        if gradients:
            yield shape.in_features**2 if group.gradient_of_inputs(site) else outputs
