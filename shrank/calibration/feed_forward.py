"""Which blocks of units a model has: found in what autograd notes of a run, and tried before they are believed.

A block's layers are those that autograd finds behind the input of a layer, and nothing else that learns except modules
that treat every unit by itself. Where it does not follow from their sizes which columns belong to a unit, as with
heads, the model is run with other values of the first unit. Whether the units meet one by one, and go nowhere else, is
seen by running the model: other values of half of the units must change nothing where the consumer does not look at
them, and a model without these units must do what the one with them does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.adapters import target
from ..model.carriers import is_shared, narrowed_carrier, units_carried
from ..model.feed_forward import FeedForward, block_name, narrowed_consumer, narrowed_producer
from ..model.hooks import all_trainable, hooked, in_eval_mode, input_of, with_input, without_caches
from ..model.refusals import why_not_shape
from ..model.surgery import reshaped
from ..model.survey import Site, Survey
from ..util import nested
from ..util.closeness import relative_error
from ..util.files import write_text
from ..util.processes import current
from .batches import Batch

_MOST_PRODUCERS = 3  # those of queries, keys and values
# Of two runs that are alike, and of models whose layers have other sizes: rounding, in float32 and in half precision.
_BEYOND_NOISE, _ROUNDING, _HALF_ROUNDING = 10, 1e-3, 0.1
_FAILS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
# Of the largest change of an input, what is more than rounding.
_CHANGED = 1e-4
# Inputs of a layer behind flattened channels that are observed one by one: their moment is 0.5 GB in float64.
_MOST_INPUTS = 8192


def blocks_in(folder: Path, survey: Survey, batches: list[Batch]) -> list[FeedForward]:
    """As `feed_forward_blocks` of the first batch, from the folder if they are there."""
    file, here = folder / "blocks.json", current()
    if not all(here.exchange(file.exists())):
        blocks = feed_forward_blocks(survey, batches[0]) if batches else []
        here.agree("a model with the same blocks", blocks)
        write_text(file, json.dumps([asdict(block) for block in blocks]))
    lists = ("producers", "rows", "carriers")
    found = json.loads(file.read_text())
    return [FeedForward(**{**block, **{name: tuple(block[name]) for name in lists}}) for block in found]


def feed_forward_blocks(survey: Survey, batch: Batch) -> list[FeedForward]:
    """The blocks that a batch, bound to the model, runs through, in the order of execution; those that cannot be
    narrowed with the reason. Runs the model six times, and more where something only looks like a block."""
    model, sites = survey.model, {site.fqn: site for site in survey.sites() if site.adapter}
    between = {
        fqn: module
        for fqn, module in model.named_modules()
        if (_may_carry(sites[fqn]) if fqn in sites else units_carried(module) is not None or is_shared(module))
    }
    layers = {fqn: site.module for fqn, site in sites.items() if fqn not in between}
    with in_eval_mode(model), without_caches(model):
        with torch.enable_grad(), all_trainable(model):
            behind = _behind_inputs(model, layers | between, batch)
        with torch.no_grad():
            trial = _Trial(model, layers, between, batch)
            return _believed(_candidates(layers, between, behind, trial), trial)


def _may_carry(site: Site) -> bool:
    """Whether a layer is a depthwise convolution that nothing but its shape keeps from becoming low-rank."""
    return units_carried(site.module) is not None and site.why_not() == why_not_shape(site.shape)


def _behind_inputs(model: nn.Module, modules: dict[str, nn.Module], batch: Batch) -> dict[str, set[str] | None]:
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


def _candidates(
    layers: dict[str, nn.Module],
    between: dict[str, nn.Module],
    behind: dict[str, set[str] | None],
    trial: _Trial,
) -> list[FeedForward]:
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
    def block(self) -> FeedForward | None:
        """With one input of the consumer for each unit, if the sizes allow it; None if not, or of three producers: what
        could be queries, keys and values."""
        units, stacked = self.inputs, self.outputs == [2 * self.inputs]
        if len(self.producers) == _MOST_PRODUCERS or not (stacked or set(self.outputs) == {units}):
            return None
        return self._made(units, (), 1, stacked=stacked)

    def with_columns(self, touched: list[int]) -> FeedForward | None:
        """With those inputs of the consumer for the first unit that its first outputs change."""
        if any(self.of_channels):  # whose units are known: some of its positions may show no change
            units, each = self.outputs[0], self.inputs // self.outputs[0]
            strided = not set(touched) <= set(range(each))
            reason = "" if self.inputs <= _MOST_INPUTS else f"{self.inputs} inputs are too many to observe"
            return self._made(units, (), each, strided=strided, reason=reason)
        each = len(touched)
        units = self.inputs // each if each else 0
        if units < 2 or touched != list(range(each)) or any(n % units for n in (self.inputs, *self.outputs)):
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
    ) -> FeedForward | None:
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
        return FeedForward(
            block_name(layers), self.producers, self.consumer, units, stacked, reason, rows, columns, strided, carriers
        )


def _believed(found: list[FeedForward], trial: _Trial) -> list[FeedForward]:
    """What stands the trial, and what does not with the reason; every layer in one block, the one of most weights."""
    order = {block.consumer: number for number, block in enumerate(found)}
    left, good, bad = sorted(found, key=lambda block: -trial.weights(block)), [], []
    while left:
        tried = _without_common_layers(left)
        for block in _tried([block for block in tried if not block.reason], trial):
            (bad if block.reason else good).append(block)
        bad += [block for block in tried if block.reason]
        taken = {layer for block in good for layer in block.layers}
        left = [block for block in left if block not in tried and taken.isdisjoint(block.layers)]
    bad = [block for block in _without_common_layers(bad) if taken.isdisjoint(block.layers)] if found else []
    return sorted(good + bad, key=lambda block: order[block.consumer])


def _without_common_layers(blocks: Iterable[FeedForward]) -> list[FeedForward]:
    """Every layer in one block, the first."""
    kept, taken = [], set()
    for block in blocks:
        if taken.isdisjoint(block.layers):
            kept.append(block)
            taken.update(block.layers)
    return kept


def _tried(blocks: list[FeedForward], trial: _Trial) -> list[FeedForward]:
    """The blocks, all at once if that goes well, else those with like names in like modules together; with the
    reason where not."""
    if not trial.complaint(blocks):
        return blocks
    groups: dict[object, list[FeedForward]] = {}
    for block in blocks:
        kind = type(trial.model.get_submodule(block.name))
        groups.setdefault((re.sub(r"\d+", "*", block.consumer), kind, block.units), []).append(block)
    reasons = {fqn: reason for group in groups.values() for fqn, reason in _reasons(group, trial).items()}
    return [replace(block, reason=reasons[block.consumer]) for block in blocks]


def _reasons(blocks: list[FeedForward], trial: _Trial) -> dict[str, str]:
    """What keeps each of these blocks, by its consumer, from being narrowed. They are alike, so that none is tried
    alone where the first and the last cannot be narrowed either."""
    reason = trial.complaint(blocks)
    if not reason or len(blocks) == 1 or all(trial.complaint([block]) for block in (blocks[0], blocks[-1])):
        return {block.consumer: reason for block in blocks}
    half = len(blocks) // 2
    return _reasons(blocks[:half], trial) | _reasons(blocks[half:], trial)


class _Trial:
    """The model run with other values of units, and with half of the units of some blocks away, in three ways that must
    agree. layers: those that a block may have; between: what may be between them."""

    def __init__(
        self, model: nn.Module, layers: dict[str, nn.Module], between: dict[str, nn.Module], batch: Batch
    ) -> None:
        self.model, self.modules, self.batch = model, layers | between, batch

    def weights(self, block: FeedForward) -> int:
        """Those of the block's layers."""
        return sum(self.modules[name].weight.numel() for name in block.layers)

    def touched(self, layers: list[tuple[tuple[str, ...], str]]) -> dict[str, list[int]]:
        """Which inputs of each consumer change with the first outputs of its producers, ascending."""
        clean: dict[str, list[Tensor]] = {consumer: [] for _, consumer in layers}
        changed: dict[str, Tensor] = {}

        def note(fqn: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            clean[fqn].append(input_of(args, kwargs).detach().clone())

        def compare(fqn: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            expected = clean[fqn].pop(0)
            change = (input_of(args, kwargs) - expected).abs().float().flatten(0, -2).amax(0)
            changed[fqn] = torch.maximum(changed[fqn], change) if fqn in changed else change
            return with_input(args, kwargs, expected)  # so that the layers after it see no change

        if layers:
            names = dict.fromkeys(name for producers, _ in layers for name in producers)
            first = [(self.modules[name], partial(_changed, torch.zeros(1, dtype=torch.long))) for name in names]
            self._outputs((), [(self.modules[fqn], partial(note, fqn)) for fqn in clean])
            self._outputs(first, [(self.modules[fqn], partial(compare, fqn)) for fqn in clean])
        return {fqn: (x > _CHANGED * x.max()).nonzero()[:, 0].tolist() for fqn, x in changed.items()}

    def complaint(self, blocks: list[FeedForward]) -> str:
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

    def _inputs_of(self, block: FeedForward, units: Tensor) -> Tensor:
        inputs = target(self.modules[block.consumer]).input_channels
        return block.columns_of(units, inputs).flatten()

    def _narrowed(self, halves: dict[FeedForward, tuple[Tensor, Tensor]]) -> Iterator[tuple[nn.Module, dict]]:
        for block, (_, kept) in halves.items():
            for name in block.producers:
                yield self.modules[name], narrowed_producer(self.modules[name], block.outputs_of(name, kept))
            for name in block.carriers:
                yield self.modules[name], narrowed_carrier(self.modules[name], kept)
            consumer = self.modules[block.consumer]
            adapter = target(consumer)
            matrix = adapter.matrices(shape := adapter.shape())[0]
            columns = block.columns_of(kept, shape.in_features).flatten().sort().values
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


def _distance(some: list[Tensor], others: list[Tensor]) -> float:
    if [t.shape for t in some] != [t.shape for t in others]:
        return torch.inf
    pairs = zip(some, others, strict=True)
    return max((0.0 if torch.equal(a, b) else relative_error(a, b) for a, b in pairs), default=0.0)
