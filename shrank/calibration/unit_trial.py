"""A model run with other values of units, or without some: what shows whether a block may lose them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..model.adapters import target
from ..model.carriers import narrowed_carrier
from ..model.hooks import hooked, input_of, with_input
from ..model.surgery import reshaped
from ..model.unit_blocks import UnitBlock, narrowed_consumer, narrowed_producer
from ..util import nested
from ..util.closeness import relative_error
from .batches import Batch

# Of two runs that are alike, and of models whose layers have other sizes: rounding, in float32 and in half precision.
_BEYOND_NOISE, _ROUNDING, _HALF_ROUNDING = 10, 1e-3, 0.1
_FAILS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
# Of the largest change of an input, what is more than rounding.
_CHANGED = 1e-4


class Trial:
    """The model run with other values of units, and with half of the units of some blocks away, in three ways that must
    agree. layers: those that a block may have; between: what may be between them."""

    def __init__(
        self, model: nn.Module, layers: dict[str, nn.Module], between: dict[str, nn.Module], batch: Batch
    ) -> None:
        self.model, self.modules, self.batch = model, layers | between, batch

    def weights(self, block: UnitBlock) -> int:
        """Those of the block's layers."""
        return sum(self.modules[name].weight.numel() for name in block.layers)

    def touched(self, layers: list[tuple[tuple[str, ...], str]]) -> dict[str, list[list[int]]]:
        """Which inputs of each consumer change with the first outputs of its producers, ascending; and with the last
        ones, counted from the end: one of these units may be dead."""
        if not layers:
            return {}
        first, last = self._touched(layers, 0), self._touched(layers, -1)
        return {fqn: list(both) for (_, fqn), *both in zip(layers, first, last, strict=True)}

    def _touched(self, layers: list[tuple[tuple[str, ...], str]], place: int) -> list[list[int]]:
        clean: dict[str, list[Tensor]] = {consumer: [] for _, consumer in layers}
        changed: dict[str, Tensor] = {}

        def note(fqn: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            clean[fqn].append(input_of(args, kwargs).detach().clone())

        def compare(fqn: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            expected = clean[fqn].pop(0)
            change = (input_of(args, kwargs) - expected).abs().float().flatten(0, -2).amax(0)
            changed[fqn] = torch.maximum(changed[fqn], change) if fqn in changed else change
            return with_input(args, kwargs, expected)  # so that the layers after it see no change

        names = dict.fromkeys(name for producers, _ in layers for name in producers)
        self._outputs((), [(self.modules[fqn], partial(note, fqn)) for fqn in clean])
        self._outputs(
            [(self.modules[name], partial(_changed_at, place)) for name in names],
            [(self.modules[fqn], partial(compare, fqn)) for fqn in clean],
        )
        found = [changed[fqn] if place == 0 else changed[fqn].flip(0) for fqn in clean]
        return [(x > _CHANGED * x.max()).nonzero()[:, 0].tolist() for x in found]

    def complaint(self, blocks: list[UnitBlock]) -> str:
        """What keeps these blocks from being narrowed; '' if nothing does."""
        halves = {block: _halves(block.units) for block in blocks}
        ignoring = [
            (self.modules[b.consumer], partial(_ignoring, self._inputs_of(b, gone))) for b, (gone, _) in halves.items()
        ]
        changing = [
            (self.modules[name], partial(_changed, b.outputs_of(name, gone)))
            for b, (gone, _) in halves.items()
            for name in b.producers
        ]
        without = self._outputs((), ignoring)
        if not without:
            return "the model returns nothing to compare"
        other = self._outputs(changing, ignoring)
        if _distance(other, without) > _BEYOND_NOISE * _distance(self._outputs((), ignoring), without):
            return "its units meet each other, or go elsewhere as well"
        try:
            with reshaped(self._narrowed(halves)):
                smaller = self._outputs((), ())
        except _FAILS as error:
            return f"with fewer units the model fails: {type(error).__name__}: {error}"
        bound = _ROUNDING if without[0].dtype in (torch.float32, torch.float64) else _HALF_ROUNDING
        if not _distance(smaller, without) <= bound:
            return "with fewer units the model computes something else"
        return ""

    def _inputs_of(self, block: UnitBlock, units: Tensor) -> Tensor:
        inputs = target(self.modules[block.consumer]).input_channels
        return block.columns_left(units, inputs)

    def _narrowed(self, halves: dict[UnitBlock, tuple[Tensor, Tensor]]) -> Iterator[tuple[nn.Module, dict]]:
        for block, (_, kept) in halves.items():
            for name in block.producers:
                yield self.modules[name], narrowed_producer(self.modules[name], block.outputs_of(name, kept))
            for name in block.carriers:
                yield self.modules[name], narrowed_carrier(self.modules[name], kept)
            consumer = self.modules[block.consumer]
            adapter = target(consumer)
            matrix = adapter.matrices(shape := adapter.shape())[0]
            columns = block.columns_left(kept, shape.in_features)
            yield consumer, narrowed_consumer(consumer, matrix[:, columns.to(matrix.device)])

    def _outputs(self, hooks: Iterable[tuple[nn.Module, Callable]], before: Iterable) -> list[Tensor]:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices), hooked(hooks, before):
            torch.manual_seed(0)
            return [t for t in nested.tensors(self.batch.call(self.model)) if t.is_floating_point()]


def _halves(units: int) -> tuple[Tensor, Tensor]:
    """Two random halves of the units: those that go, and those that stay, ascending."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(units))
    return order[: units // 2].sort().values, order[units // 2 :].sort().values


def _ignoring(gone: Tensor, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    x = input_of(args, kwargs)
    return with_input(args, kwargs, x.index_fill(target(module).features, gone.to(x.device), 0))


def _changed(gone: Tensor, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    gone, features = gone.to(output.device), target(module).features
    return output.index_copy(features, gone, 1 - 2 * output.index_select(features, gone))


def _changed_at(place: int, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    outputs = output.shape[target(module).features]
    return _changed(torch.tensor([place % outputs]), module, args, kwargs, output)


def _distance(some: list[Tensor], others: list[Tensor]) -> float:
    if [t.shape for t in some] != [t.shape for t in others]:
        return torch.inf
    pairs = zip(some, others, strict=True)
    return max((0.0 if torch.equal(a, b) else relative_error(a, b) for a, b in pairs), default=0.0)
