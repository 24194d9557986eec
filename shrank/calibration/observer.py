"""Hooks on a running model that add up what its layers see, each layer on the smaller side of its weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..linalg import Moments
from ..model.hooks import Hook, input_of
from ..model.survey import Site
from ..util.processes import current
from .moment import Moment
from .sharing import Group, Inputs
from .streams import Masking, MaskOfCall


class Observed:
    """One layer under observation; `leader` is the layer of its group that observes the input they share."""

    def __init__(self, site: Site, leader: Observed | None, group: Group, gradients: bool) -> None:
        self.site, self.leader, self.of_inputs = site, leader or self, group.of_inputs
        self.target, self.shape = site.adapter, site.shape
        self.gradient_of_inputs = group.gradient_of_inputs(site)
        self.data = self.moment(group.of_inputs) if leader is None else None
        self.sums: tuple[Tensor, Tensor] | None = None  # of what `data` is of, and of squares of inputs, float64
        self.gradient = self.moment(self.gradient_of_inputs) if gradients else None
        self.channels = self._empty(1, self.target.input_channels) if group.channels else None
        self.channel_sum: Tensor | None = None
        self.inputs = Inputs()

    def moment(self, of_columns: bool) -> Moment:
        """An empty one of what it is observed by, of its inputs or of its outputs."""
        side = self.shape.in_features if of_columns else self.shape.out_features
        groups = 1 if self.of_inputs else self.shape.groups
        return self._empty(groups, side // groups)

    def _empty(self, groups: int, side: int) -> Moment:
        device = self.site.module.weight.device
        return Moment(groups, side, torch.device("cpu") if device.type == "meta" else device)

    def observe(self, x: Tensor, y: Tensor, mask: MaskOfCall) -> None:
        """Note an input and the output."""
        before = self.leader.inputs.count
        self.leader.inputs.number(x)
        if self.leader is self:
            self._add(x.detach(), y.detach(), mask)
        elif self.leader.inputs.count > before:
            raise RuntimeError(
                f"{self.site.fqn} is called with another input than {self.leader.site.fqn}, although "
                "they had the same when the data was first run: the model does not do the same twice"
            )

    def watch_gradient(self, y: Tensor, mask: MaskOfCall) -> Tensor | None:
        """Have the gradient noted that will reach an output; the output to use instead where another one is needed."""
        if self.gradient is None or not torch.is_grad_enabled():
            return None
        replaced = None
        if not y.requires_grad:
            y.requires_grad_()
            replaced = y.clone()  # a leaf would not bear what the model may do to it in place
        y.register_hook(partial(self._add_gradient, mask))
        return replaced

    def rows_of(self, x: Tensor, y: Tensor, mask: MaskOfCall) -> Tensor:
        """(G, tokens that count, m) of what the layer is observed by: its inputs, or its outputs without bias."""
        if self.of_inputs:
            return self._rows(x, 1, mask)
        bias, y = self.site.module.bias, self.target.tokens(y)
        return self._rows(y if bias is None else y - bias, self.shape.groups, mask, ordered=True)

    def _add(self, x: Tensor, y: Tensor, mask: MaskOfCall) -> None:
        rows = self.rows_of(x, y, mask)
        if not rows.shape[1]:
            return
        if self.of_inputs:
            energy = rows.square().sum(1)
        else:
            energy = self.target.input_energy(x, partial(self._rows, mask=mask))
            energy = energy.view(len(rows), -1) * rows.shape[1]
        self.data.add(rows)
        if self.channels is not None:
            channels = self._rows(x, 1, mask)
            self.channels.add(channels)
            total = channels.sum(1).double()
            self.channel_sum = total if self.channel_sum is None else self.channel_sum + total
        sums = rows.sum(1).double(), energy.double()
        self.sums = sums if self.sums is None else tuple(a + b for a, b in zip(self.sums, sums, strict=True))

    def _add_gradient(self, mask: MaskOfCall, gradient: Tensor) -> None:
        rows = self._rows(gradient.detach(), 1 if self.of_inputs else self.shape.groups, mask)
        if self.gradient_of_inputs:
            rows = rows @ self.target.matrices(self.shape).to(rows)
        self.gradient.add(rows)

    def _rows(self, tensor: Tensor, groups: int, mask: MaskOfCall, ordered: bool = False) -> Tensor:
        """(groups, tokens that count, features of one group), float32."""
        rows = (tensor if ordered else self.target.tokens(tensor)).float()
        counts, rows = mask(tuple(rows.shape[:-1])), rows.reshape(-1, rows.shape[-1])
        if counts is not None:
            rows = rows[counts.to(rows.device)]
        return rows.unflatten(1, (groups, -1)).transpose(0, 1)

    def add_up(self) -> None:
        """As of its moments, which were added up already."""
        if self.data is not None and self.data.rows:
            sums = self.sums
            if sums is None:  # this process saw none of it
                data, energy = self.data.take_mean(), self.shape.in_features
                groups = 1 if self.of_inputs else self.shape.groups
                sums = (data.new_zeros(data.shape[:2]), data.new_zeros(groups, energy // groups))
            self.sums = tuple(current().summed(total.double()) for total in sums)
        if self.channels is not None and self.channels.rows:
            none = self.channels.take_mean().sum(-1).double().zero_()
            self.channel_sum = current().summed(none if self.channel_sum is None else self.channel_sum)

    def moments(self, samples: int) -> Moments:
        leader, tokens = self.leader, self.leader.data.rows
        mean, energy = ((total / tokens).float() for total in leader.sums)
        gradient = self.gradient and self.gradient.take_mean()  # zero where the loss does not depend on the layer
        found = Moments(tokens, leader.data.take_mean(), mean, energy, self.of_inputs, gradient, samples)
        if self.channels is None or not self.channels.rows:
            return found
        channel_mean = (self.channel_sum / self.channels.rows).float()
        return replace(found, channels=self.channels.take_mean(), channel_mean=channel_mean)


class Accumulator:
    """The moments of some layers of a model, added up while it runs with these `hooks`."""

    def __init__(self, groups: list[Group], gradients: bool, masking: Masking) -> None:
        self.samples = 0
        self._layers: list[Observed] = []
        self.masking = masking
        for group in groups:
            leader = None
            for site in group.sites:
                observed = Observed(site, leader, group, gradients)
                leader = leader or (observed if group.of_inputs else None)
                self._layers.append(observed)

    @property
    def reached(self) -> bool:
        """Whether gradients came to any of the layers."""
        return any(layer.gradient is not None and layer.gradient.rows for layer in self._layers)

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        """What to call after the forwards of the layers."""
        yield from self.masking.hooks()
        yield from ((layer.site.module, partial(self._hook, layer)) for layer in self._layers)

    def _hook(self, layer: Observed, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        mask = self.masking.call(layer.site.fqn)
        layer.observe(input_of(args, kwargs), output, mask)
        return layer.watch_gradient(output, mask)

    def check(self, number: int) -> None:
        """ValueError that names this batch and its first layer with an input, output or gradient that is not finite."""
        for what in ("data", "gradient"):
            sums = [(x, m) for x in self._layers if (m := getattr(x, what)) is not None and m.rows]
            if bool(torch.stack([m.is_finite().cpu() for _, m in sums]).all()) if sums else True:
                continue
            layer = next(x for x, m in sums if not m.is_finite())
            raise ValueError(
                f"batch {number}: {layer.site.fqn} has NaN or infinity in its "
                f"{'gradients' if what == 'gradient' else 'inputs' if layer.of_inputs else 'outputs'}"
            )

    def add_up(self) -> None:
        """Over the processes that each saw a share of the data."""
        self.samples = sum(current().exchange(self.samples))
        add_up(self._layers)

    def results(self) -> Iterator[tuple[str, Moments, str]]:
        """(name, moments, name of the layer whose data they are), for every layer that saw any."""
        for layer in self._layers:
            if layer.leader.data.rows:
                yield layer.site.fqn, layer.moments(self.samples), layer.leader.site.fqn


def add_up(layers: Iterable[Observed], others: Iterable[Moment] = ()) -> None:
    """Make what the `current` processes saw of these layers, and in these other moments, one; of one alone, it is."""
    here, layers = current(), list(layers)
    if here.size == 1:
        return
    moments = [m for x in layers for m in (x.data, x.gradient, x.channels) if m is not None] + list(others)
    for moment, *rows in zip(moments, *here.exchange([m.rows for m in moments]), strict=True):
        moment.add_up(sum(rows))
    for layer in layers:
        layer.add_up()
