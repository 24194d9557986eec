"""Hooks on a running model that add up what its layers see, each layer on the smaller side of its weight."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .batches import Batch
from .linalg import Moments
from .surgery import Site
from .targets import target

# So many rows are added up in float32 before they go to a float64 sum.
_ROWS_IN_FLOAT32 = 1 << 16


@dataclass(frozen=True)
class Group:
    """Layers that get the same input; the moments are those of this input, or of each layer's own outputs."""

    sites: tuple[Site, ...]
    of_inputs: bool


class _Moment:
    """Sum of x x^T over rows x, for every group of features."""

    def __init__(self) -> None:
        self.rows, self._recent, self._total = 0, None, None

    def add(self, rows: Tensor) -> None:
        """rows: (G, T, m), float32."""
        if self._recent is None:
            self._recent = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
        self._recent.baddbmm_(rows.mT, rows)
        before, self.rows = self.rows, self.rows + rows.shape[1]
        if before // _ROWS_IN_FLOAT32 != self.rows // _ROWS_IN_FLOAT32:
            recent = self._recent.double()
            self._total = recent if self._total is None else self._total.add_(recent)
            self._recent.zero_()

    def is_finite(self) -> Tensor:
        return self._recent.diagonal(dim1=-2, dim2=-1).sum().isfinite()

    def mean(self) -> Tensor:
        return ((self._recent if self._total is None else self._total + self._recent) / self.rows).float()


class _Observed:
    """One layer under observation; `leader` is the layer of its group that observes the input they share."""

    def __init__(self, site: Site, leader: _Observed | None, of_inputs: bool, gradients: bool) -> None:
        self.site, self.leader, self.of_inputs = site, leader or self, of_inputs
        self.target = target(site.module)
        self.shape = self.target.shape()
        self.data, self.sums = _Moment(), None
        self.gradient = _Moment() if gradients else None
        # Behind more outputs than inputs the gradients are needed only as the inputs feel them.
        self.gradient_of_inputs = of_inputs and self.shape.out_features > self.shape.in_features
        self.input: weakref.ref | None = None

    def see(self, x: Tensor, y: Tensor, batch: Batch) -> Tensor | None:
        """Note an input and the output; the output to use instead where gradients need another one."""
        chosen = partial(self._rows, mask=batch.mask_for(tuple(self.target.tokens(y).shape[:-1])))
        self.input = weakref.ref(x)
        if self.leader is self:
            self._add(x.detach(), y.detach(), chosen)
        elif self.leader.input is None or self.leader.input() is not x:
            raise RuntimeError(f"{self.site.fqn} had the input of {self.leader.site.fqn} in the first batch and "
                               "another later: calibrate them apart, with layers=")
        if self.gradient is None or not torch.is_grad_enabled():
            return None
        replaced = None
        if not y.requires_grad:
            y.requires_grad_()
            replaced = y.clone()  # a leaf would not bear what the model may do to it in place
        y.register_hook(partial(self._add_gradient, chosen))
        return replaced

    def _add(self, x: Tensor, y: Tensor, chosen) -> None:
        module, groups = self.site.module, self.shape.groups
        if self.of_inputs:
            rows = chosen(x, 1)
            energy = rows.square().sum(1)
        else:
            y = self.target.tokens(y)
            rows = chosen(y if module.bias is None else y - module.bias, groups, ordered=True)
            energy = self.target.input_energy(x, chosen).view(groups, -1) * rows.shape[1]
        self.data.add(rows)
        sums = rows.sum(1).double(), energy.double()
        self.sums = sums if self.sums is None else tuple(a + b for a, b in zip(self.sums, sums, strict=True))

    def _add_gradient(self, chosen, gradient: Tensor) -> None:
        rows = chosen(gradient.detach(), 1 if self.of_inputs else self.shape.groups)
        if self.gradient_of_inputs:
            rows = rows @ self.target.matrices(self.shape).to(rows)
        self.gradient.add(rows)

    def _rows(self, tensor: Tensor, groups: int, mask: Tensor | None, ordered: bool = False) -> Tensor:
        """(groups, tokens that count, features of one group), float32."""
        rows = (tensor if ordered else self.target.tokens(tensor)).float()
        rows = rows.reshape(-1, rows.shape[-1])
        if mask is not None and len(mask) == len(rows):
            rows = rows[mask.to(rows.device)]
        return rows.unflatten(1, (groups, -1)).transpose(0, 1)

    def moments(self, samples: int) -> Moments:
        leader, tokens = self.leader, self.leader.data.rows
        mean, energy = (total / tokens for total in leader.sums)
        gradient = None
        if self.gradient is not None:
            # Never reached: the loss does not depend on the layer.
            side = self.shape.in_features if self.gradient_of_inputs else self.shape.out_features
            m = side if self.of_inputs else side // self.shape.groups
            gradient = self.gradient.mean() if self.gradient.rows else torch.zeros(side // m, m, m)
        return Moments(tokens, leader.data.mean(), mean, energy, self.of_inputs, gradient, samples)


class Accumulator:
    """The moments of some layers of a model, added up while it runs inside a `with` block."""

    def __init__(self, groups: list[Group], gradients: bool) -> None:
        self.samples = 0
        self._layers: list[_Observed] = []
        for group in groups:
            leader = None
            for site in group.sites:
                observed = _Observed(site, leader, group.of_inputs, gradients)
                leader = leader or (observed if group.of_inputs else None)
                self._layers.append(observed)

    @property
    def reached(self) -> bool:
        """Whether gradients came to any of the layers."""
        return any(layer.gradient is not None and layer.gradient.rows for layer in self._layers)

    def __enter__(self) -> Accumulator:
        self._handles = [layer.site.module.register_forward_hook(partial(self._hook, layer), with_kwargs=True)
                         for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, number: int, batch: Batch) -> None:
        self._number, self._batch = number, batch

    def _hook(self, layer: _Observed, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        return layer.see(args[0] if args else kwargs["input"], output, self._batch)

    def check(self) -> None:
        """ValueError that names the batch and its first layer with an input, output or gradient that is not finite."""
        for what in ("data", "gradient"):
            sums = [(x, m) for x in self._layers if (m := getattr(x, what)) is not None and m.rows]
            if bool(torch.stack([m.is_finite().cpu() for _, m in sums]).all()) if sums else True:
                continue
            layer = next(x for x, m in sums if not m.is_finite())
            raise ValueError(f"batch {self._number}: {layer.site.fqn} has NaN or infinity in its "
                             f"{'gradients' if what == 'gradient' else 'inputs' if layer.of_inputs else 'outputs'}")

    def results(self) -> Iterator[tuple[str, Moments, str]]:
        """(name, moments, name of the layer whose data they are), for every layer that saw any."""
        for layer in self._layers:
            if layer.leader.data.rows:
                yield layer.site.fqn, layer.moments(self.samples), layer.leader.site.fqn


def plan_passes(model: nn.Module, sites: list[Site], batches: list[Batch], gradients: bool,
                max_memory: int) -> tuple[list[list[Group]], list[str]]:
    """The layers in groups that share an input, in the order of execution, split so that the moments of each part fit
    into `max_memory` bytes (of a single group, whatever it needs); and the layers that the first batch does not reach.
    """
    groups, tokens = _groups(model, sites, batches[0])
    spilled = 1 if tokens * len(batches) < _ROWS_IN_FLOAT32 else 3  # a float64 sum beside the float32 one
    passes: list[list[Group]] = []
    free = 0
    for group in groups:
        size = 4 * spilled * sum(_entries(group, gradients))
        if not passes or size > free:
            passes.append([])
            free = max_memory
        passes[-1].append(group)
        free -= size
    reached = {id(site) for group in groups for site in group.sites}
    return passes, [site.fqn for site in sites if id(site) not in reached]


@torch.no_grad()
def _groups(model: nn.Module, sites: list[Site], batch: Batch) -> tuple[list[Group], int]:
    """Which layers get the same input, and the most tokens that one of them sees, from one run."""
    shared: list[tuple[weakref.ref, list[Site]]] = []  # an input, while it lives, and the layers that got it
    seen: set[int] = set()
    most = 0

    def note(site: Site, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        nonlocal most
        most = max(most, target(module).tokens(output)[..., 0].numel())
        if id(site) in seen:
            return
        seen.add(id(site))
        x = args[0] if args else kwargs["input"]
        if target(module).takes_vectors and (sharing := [group for ref, group in shared if ref() is x]):
            sharing[0].append(site)
        else:
            shared.append((weakref.ref(x), [site]))

    handles = [site.module.register_forward_hook(partial(note, site), with_kwargs=True) for site in sites]
    training = {module: module.training for module in model.modules()}
    try:
        batch.call(model.eval())
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return [group for _, sites in shared for group in _sided(sites)], most


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
