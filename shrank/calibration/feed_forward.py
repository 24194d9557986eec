"""Which feed-forward blocks a model has: found in what autograd notes of a run, and tried before they are believed.

A block's layers are those that autograd finds behind the input of a layer, and nothing else: no other parameter, no
third layer. Whether its hidden units meet one by one, and go nowhere else, is seen by running the model: other values
of half of the units must change nothing where the consumer does not look at them, and a model without these units must
do what the one with them does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.adapters import target
from ..model.feed_forward import FeedForward, block_name, narrowed_consumer, narrowed_producer, outputs_of
from ..model.hooks import all_trainable, hooked, in_eval_mode, input_of, with_input
from ..model.surgery import reshaped
from ..model.survey import Survey
from ..util import nested
from ..util.closeness import relative_error
from ..util.files import write_text
from ..util.processes import current
from .batches import Batch

_MOST_PRODUCERS = 2
# Of two runs that are alike, and of models whose layers have other sizes: rounding, in float32 and in half precision.
_BEYOND_NOISE, _ROUNDING, _HALF_ROUNDING = 10, 1e-3, 0.1
_FAILS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


def blocks_in(folder: Path, survey: Survey, batches: list[Batch]) -> list[FeedForward]:
    """As `feed_forward_blocks` of the first batch, from the folder if they are there."""
    file, here = folder / "feed_forward.json", current()
    if not all(here.exchange(file.exists())):
        blocks = feed_forward_blocks(survey, batches[0]) if batches else []
        here.agree("a model with the feed-forward blocks", blocks)
        write_text(file, json.dumps([asdict(block) for block in blocks]))
    found = json.loads(file.read_text())
    return [FeedForward(**{**block, "producers": tuple(block["producers"])}) for block in found]


def feed_forward_blocks(survey: Survey, batch: Batch) -> list[FeedForward]:
    """The blocks that a batch, bound to the model, runs through, in the order of execution; those that cannot be
    narrowed with the reason. Runs the model four times."""
    model = survey.model
    layers = {site.fqn: site.module for site in survey.sites() if site.adapter and site.adapter.takes_vectors}
    with in_eval_mode(model):
        with torch.enable_grad(), all_trainable(model):
            found = list(_candidates(layers, _producers(model, layers, batch)))
        with torch.no_grad():
            return _believed(found, _Trial(model, layers, batch))


def _producers(model: nn.Module, layers: dict[str, nn.Module], batch: Batch) -> dict[str, set[str] | None]:
    """The layers that alone are behind the input of each layer, at every call of it; None if there is more."""
    seen: dict[str, set[str] | None] = {}

    def note(fqn: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        found = _behind(input_of(args, kwargs))
        seen[fqn] = found if seen.get(fqn, found) == found else None
        if not output.is_floating_point():
            return None
        leaf = output.detach().requires_grad_()
        leaf.shrank_layer = fqn  # kept with the tensor for as long as the graph has it
        return leaf.clone()  # a leaf would not bear what the model may do to it in place

    with hooked((module, partial(note, fqn)) for fqn, module in layers.items()):
        batch.call(model)
    return seen


def _behind(x: Tensor) -> set[str] | None:
    """The layers that a tensor was computed from; None if it is of more than two, or of anything else that learns."""
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


def _candidates(layers: dict[str, nn.Module], producers: dict[str, set[str] | None]) -> Iterator[FeedForward]:
    """What has the sizes of a block."""
    order = {fqn: number for number, fqn in enumerate(layers)}
    for consumer, found in producers.items():
        if not found or consumer in found:
            continue
        names = tuple(sorted(found, key=order.__getitem__))
        units = _sizes(layers[consumer])[1]
        outputs = {_sizes(layers[name])[0] for name in names}
        stacked = outputs == {2 * units} and len(names) == 1
        if outputs == {units} or stacked:
            yield FeedForward(block_name((*names, consumer)), names, consumer, units, stacked)


def _sizes(module: nn.Module) -> tuple[int, int]:
    shape = target(module).shape()
    return shape.out_features, shape.in_features


def _believed(found: list[FeedForward], trial: _Trial) -> list[FeedForward]:
    """What stands the trial, and what does not with the reason; every layer in one block, the one of most units."""
    order = {block.consumer: number for number, block in enumerate(found)}
    left, good, bad = sorted(found, key=lambda block: -block.units), [], []
    while left:
        tried = _without_common_layers(left)
        for block in _tried(tried, trial):
            (bad if block.reason else good).append(block)
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
    reasons = {key: trial.complaint(group) for key, group in groups.items()}
    by_block = {block.consumer: reasons[key] for key, group in groups.items() for block in group}
    return [replace(block, reason=by_block[block.consumer]) for block in blocks]


class _Trial:
    """The model run with half of the units of some blocks away, in three ways that must agree."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], batch: Batch) -> None:
        self.model, self.layers, self.batch = model, layers, batch

    def complaint(self, blocks: list[FeedForward]) -> str:
        """What keeps these blocks from being narrowed; '' if nothing does."""
        halves = {block: _halves(block.units) for block in blocks}
        ignoring = [(self.layers[b.consumer], partial(_ignoring, gone)) for b, (gone, _) in halves.items()]
        changing = [
            (self.layers[name], partial(_changed, outputs_of(gone, b.units, b.stacked)))
            for b, (gone, _) in halves.items()
            for name in b.producers
        ]
        without = self._outputs((), ignoring)
        if not without:
            return "the model returns nothing to compare"
        other = self._outputs(changing, ignoring)
        if _distance(other, without) > _BEYOND_NOISE * _distance(self._outputs((), ignoring), without):
            return "its hidden units meet each other, or go elsewhere as well"
        try:
            with reshaped(self._narrowed(halves)):
                smaller = self._outputs((), ())
        except _FAILS as error:
            return f"with fewer hidden units the model fails: {type(error).__name__}: {error}"
        bound = _ROUNDING if without[0].dtype in (torch.float32, torch.float64) else _HALF_ROUNDING
        if not _distance(smaller, without) <= bound:
            return "with fewer hidden units the model computes something else"
        return ""

    def _narrowed(self, halves: dict[FeedForward, tuple[Tensor, Tensor]]) -> Iterator[tuple[nn.Module, dict]]:
        for block, (_, kept) in halves.items():
            for name in block.producers:
                module = self.layers[name]
                yield module, narrowed_producer(module, kept, block.units, block.stacked)
            consumer = self.layers[block.consumer]
            adapter = target(consumer)
            yield consumer, narrowed_consumer(consumer, adapter.matrices(adapter.shape())[0][:, kept])

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
    return with_input(args, kwargs, x.index_fill(-1, gone.to(x.device), 0))


def _changed(gone: Tensor, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    gone = gone.to(output.device)
    return output.index_copy(-1, gone, 1 - 2 * output.index_select(-1, gone))


def _distance(some: list[Tensor], others: list[Tensor]) -> float:
    if [t.shape for t in some] != [t.shape for t in others]:
        return torch.inf
    pairs = zip(some, others, strict=True)
    return max((0.0 if torch.equal(a, b) else relative_error(a, b) for a, b in pairs), default=0.0)
