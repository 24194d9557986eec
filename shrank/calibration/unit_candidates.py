"""What has the sizes of a block of units: found in what autograd notes of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ..model.adapters import target
from ..model.carriers import units_carried
from ..model.hooks import hooked, input_of
from ..model.unit_blocks import UnitBlock, block_name
from .batches import Batch
from .unit_trial import Trial

_MOST_PRODUCERS = 3  # those of queries, keys and values
# Inputs of a layer behind flattened channels that are observed one by one: their moment is 0.5 GB in float64.
_MOST_INPUTS = 8192


def behind_inputs(model: nn.Module, modules: dict[str, nn.Module], batch: Batch) -> dict[str, set[str] | None]:
    """Those of these modules that alone are behind the input of each, at every call of it; None if there is more."""
    seen: dict[str, set[str] | None] = {}

    def note(fqn: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
        x = input_of(args, kwargs)
        found = _behind(x) if isinstance(x, Tensor) else None
        seen[fqn] = found if seen.get(fqn, found) == found else None
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        leaf = output.detach().requires_grad_()
        leaf.shrank_layer = fqn  # kept with the tensor for as long as the graph has it
        return leaf.clone()  # a leaf would not bear what the model may do to it in place

    with hooked((module, partial(note, fqn)) for fqn, module in modules.items()):
        batch.call(model)
    return seen


def _behind(x: Tensor) -> set[str] | None:
    """The modules that a tensor was computed from; None if it is of too many, or of anything else that learns."""
    found: set[str] = set()
    stack, seen = [x.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            layer = getattr(node.variable, "shrank_layer", None)
            if layer is None:
                return None
            found.add(layer)
            if len(found) > _MOST_PRODUCERS:
                return None
        stack.extend(function for function, _ in node.next_functions)
    return found or None


def candidates(
    layers: dict[str, nn.Module],
    between: dict[str, nn.Module],
    behind: dict[str, set[str] | None],
    trial: Trial,
) -> list[UnitBlock]:
    """What has the sizes of a block."""
    order = {fqn: number for number, fqn in enumerate(layers)}
    found = []
    for consumer in behind:
        if consumer in layers and (sources := _sources(consumer, between, behind)):
            producers, passed = sources
            if consumer not in producers:
                names = tuple(sorted(producers, key=order.__getitem__))
                found.append(_Sketch(names, tuple(fqn for fqn in between if fqn in passed), consumer, trial.modules))
    touched = trial.touched([(sketch.producers, sketch.consumer) for sketch in found if sketch.is_unclear])
    blocks = [
        sketch.with_columns(touched[sketch.consumer]) if sketch.consumer in touched else sketch.block
        for sketch in found
    ]
    return [block for block in blocks if block is not None]


def _sources(
    consumer: str, between: dict[str, nn.Module], behind: dict[str, set[str] | None]
) -> tuple[set[str], set[str]] | None:
    """The layers behind the input of a layer, and the modules between them and it; None if there is more."""
    producers: set[str] = set()
    passed: set[str] = set()
    stack = [consumer]
    while stack:
        if not (found := behind.get(stack.pop())):
            return None
        producers |= {fqn for fqn in found if fqn not in between}
        stack.extend(fqn for fqn in found if fqn in between and fqn not in passed)
        passed |= {fqn for fqn in found if fqn in between}
    return (producers, passed) if producers and len(producers) <= _MOST_PRODUCERS else None


@dataclass(frozen=True)
class _Sketch:
    """Layers that may be a block: what is behind the input of one of them."""

    producers: tuple[str, ...]
    between: tuple[str, ...]
    consumer: str
    modules: dict[str, nn.Module]

    @property
    def outputs(self) -> list[int]:
        return [target(self.modules[name]).shape().out_features for name in self.producers]

    @property
    def inputs(self) -> int:
        return target(self.modules[self.consumer]).input_channels

    @property
    def of_channels(self) -> list[bool]:
        """Of the producers and the consumer: whether they are convolutions."""
        return [not target(self.modules[name]).takes_vectors for name in (*self.producers, self.consumer)]

    @property
    def is_unclear(self) -> bool:
        """Whether it does not follow from the sizes which columns a unit has."""
        *producers, consumer = self.of_channels
        if consumer or self.block is not None:
            return False
        return not any(producers) or (len(set(self.outputs)) == 1 and self.inputs % self.outputs[0] == 0)

    @property
    def block(self) -> UnitBlock | None:
        """With one input of the consumer for each unit, if the sizes allow it; None if not, or of three producers: what
        could be queries, keys and values."""
        units, stacked = self.inputs, self.outputs == [2 * self.inputs]
        if len(self.producers) == _MOST_PRODUCERS or not (stacked or set(self.outputs) == {units}):
            return None
        return self._made(units, (), 1, stacked=stacked)

    def with_columns(self, touched: list[list[int]]) -> UnitBlock | None:
        """With those inputs of the consumer for the first unit that its first outputs change, or for the last one."""
        if any(self.of_channels):  # whose units are known: some of its positions may show no change
            units, each = self.outputs[0], self.inputs // self.outputs[0]
            strided = not set(touched[0] or touched[1]) <= set(range(each))
            reason = "" if self.inputs <= _MOST_INPUTS else f"{self.inputs} inputs are too many to observe"
            return self._made(units, (), each, strided=strided, reason=reason)
        each = max((len(some) for some in touched if some == list(range(len(some)))), default=0)
        units = self.inputs // each if each else 0
        if units < 2 or any(n % units for n in (self.inputs, *self.outputs)):
            return None
        rows = tuple(n // units for n in self.outputs)
        return self._made(units, () if set(rows) == {1} else rows, each)

    def _made(
        self,
        units: int,
        rows: tuple[int, ...],
        inputs: int,
        stacked: bool = False,
        strided: bool = False,
        reason: str = "",
    ) -> UnitBlock | None:
        """The block, unless its convolutions are in groups or something between that learns is neither of so many units
        nor small."""
        layers = (*self.producers, self.consumer)
        if units < 2 or any(target(self.modules[name]).shape().groups > 1 for name in layers):
            return None
        carriers = tuple(name for name in self.between if units_carried(self.modules[name]) == units)
        if carriers and (rows or stacked):
            return None
        for name in set(self.between) - set(carriers):
            numbers = max((p.numel() for p in self.modules[name].parameters()), default=0)
            if units_carried(self.modules[name]) is not None or numbers >= self.inputs:
                return None
        columns = inputs * target(self.modules[self.consumer]).taps
        return UnitBlock(
            block_name(layers), self.producers, self.consumer, units, stacked, reason, rows, columns, strided, carriers
        )
