"""Blocks run one at a time: each takes what the block before it returned, where that is all that it is called with.

One run of the dense model shows which tensors every block gets. Those that the block before it got or returned, the
very same, are handed on. Where a block gets anything else, the model runs from its start to there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.streams import number_of
from ..model.hooks import hooked, in_eval_mode
from ..util import nested
from ..util.processes import current

_PLAIN = (Tensor, type(None), bool, int, float, str, tuple, list, dict, torch.dtype, torch.device)
_ALIKE = 1e-4  # of the numbers that stand for two outputs of about 1: some devices do not add up in one order
Arguments = tuple[tuple, dict]
T = TypeVar("T")


class CannotRunAlone(ValueError):
    """The text says why a block cannot."""


class _Reached(Exception):
    """Ends a run at the block that is to be called next."""


@dataclass(frozen=True)
class _Link:
    """Where a block's arguments come from: the block before it, and `arguments` without data, for each of whose tensors
    `places` has the number among the tensors that the block before it got and returned."""

    before: str
    arguments: Arguments
    places: dict[int, int]

    def filled(self, tensors: list[Tensor]) -> Arguments:
        return nested.mapped(lambda empty: tensors[self.places[id(empty)]], self.arguments)


class Links:
    """How a model calls its blocks, batch by batch.

    Args:
        model: The dense model.
        blocks: The names of its blocks.

    Attributes:
        calls: How often every batch calls them, by its number.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in blocks}
        self._found: dict[tuple[str, int], _Link] = {}
        self._outputs: dict[str, list[float]] = {}  # of the first batch that calls a block
        self._last: tuple[str, list[tuple[Tensor, int]]] | None = None
        self.calls: dict[int, Counter[str]] = {}

    def of(self, block: str, number: int) -> _Link | None:
        """None where the model must run to know what the block gets."""
        link = self._found.get((block, number))
        return link if link and self.calls[number][link.before] == 1 else None

    def numbers(self, block: str) -> list[int]:
        """The batches that call it."""
        return [number for number, calls in self.calls.items() if calls[block]]

    def require_alone(self, block: str, dense: Relay) -> None:
        """CannotRunAlone where the block called by itself would not do what it does in the dense model."""
        numbers = self.numbers(block)
        if any(self.calls[number][block] > 1 for number in numbers):
            raise CannotRunAlone("it runs several times in one run of the model")
        for number in numbers[:1]:
            found, expected = _numbers_of(dense.run(block, number)), self._outputs[block]
            if len(found) != len(expected) or any(abs(a - b) > _ALIKE for a, b in zip(found, expected, strict=True)):
                raise CannotRunAlone("called by itself it returns something else than in the model")
            _require_plain(dense.arguments(block, number))  # also after it may have put something there

    @contextmanager
    def observed(self, number: int) -> Iterator[None]:
        """Inside, the model is to run this batch, once."""
        self.calls[number], self._last = Counter(), None
        with ExitStack() as stack:
            for name, module in self._modules.items():
                enter = partial(self._enter, name, number)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.enter_context(hooked((m, partial(self._leave, name)) for name, m in self._modules.items()))
            yield
        self._last = None

    def _enter(self, block: str, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls[number][block] += 1
        if self._last is None:
            return
        before, held = self._last
        sources = {id(t): place for place, (t, version) in enumerate(held) if _version(t) == version}
        places: dict[int, int] = {}

        def emptied(tensor: Tensor) -> Tensor:
            empty = torch.empty(0, device="meta")
            places[id(empty)] = sources.get(id(tensor), -1)
            return empty

        arguments = nested.mapped(emptied, (args, kwargs))
        if -1 not in places.values() and _is_plain((args, kwargs)):
            self._found[block, number] = _Link(before, arguments, places)

    def _leave(self, block: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self._last = block, [(t, _version(t)) for t in _tensors_of((args, kwargs), output)]
        if block not in self._outputs:
            self._outputs[block] = _numbers_of(output)


class Relay:
    """One model and what the next block to be run is called with, batch by batch.

    Args:
        root: The dense model, or the one that is compressed block by block, as it is now.
        links: Of the dense model.
        batches: The data, each with its place as its number.
    """

    def __init__(self, root: Callable[[], nn.Module], links: Links, batches: list[Batch]) -> None:
        self._root, self._links, self._batches = root, links, batches
        self._held: dict[int, tuple[str, Arguments]] = {}

    @torch.no_grad()
    def arguments(self, block: str, number: int) -> Arguments:
        """What the block is called with in this batch, which calls it once; CannotRunAlone if that is not to be
        known."""
        missing: list[tuple[str, Arguments]] = []
        at, held = block, self._held.get(number)
        while not (held and held[0] == at) and (link := self._links.of(at, number)) is not None:
            missing.append((at, link))
            at = link.before
        arguments = held[1] if held and held[0] == at else self._from_start(at, number)
        for name, link in reversed(missing):
            output = run_alone(self._root().get_submodule(at), arguments)
            at, arguments = name, link.filled(_tensors_of(arguments, output))
        self._held[number] = block, arguments
        return arguments

    @torch.no_grad()
    def run(self, block: str, number: int) -> object:
        """What the block returns in this batch."""
        return run_alone(self._root().get_submodule(block), self.arguments(block, number))

    def changed(self, block: str | None = None) -> None:
        """Forget what depends on this block, or on any, which is another one now."""
        self._held = {number: held for number, held in self._held.items() if held[0] == block}

    def _from_start(self, block: str, number: int) -> Arguments:
        found: list[Arguments] = []

        def reached(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append((args, kwargs))
            raise _Reached

        model = self._root()
        handle = model.get_submodule(block).register_forward_pre_hook(reached, with_kwargs=True)
        try:
            with suppress(_Reached), hooked(()), in_eval_mode(model):
                self._batches[number].call(model)
        finally:
            handle.remove()
        if not found:
            raise CannotRunAlone("the compressed model does not call it where the dense model does")
        _require_plain(found[0])
        return found[0]


def first_reason(attempt: Callable[[], T]) -> tuple[str, T | None]:
    """Why an attempt cannot succeed in one of the processes, "" if it does in all; and what came of it here."""
    reason, result = "", None
    try:
        result = attempt()
    except CannotRunAlone as error:
        reason = str(error)
    return next(filter(None, current().exchange(reason)), ""), result


def run_alone(block: nn.Module, arguments: Arguments) -> object:
    """What a block returns, in eval mode; containers among the arguments are its own."""
    args, kwargs = nested.mapped(lambda t: t, arguments)
    with hooked(()), in_eval_mode(block):
        return block(*args, **kwargs)


def _tensors_of(arguments: Arguments, output: object) -> list[Tensor]:
    return [*nested.tensors(arguments), *nested.tensors(output)]


def _numbers_of(output: object) -> list[float]:
    """What stands for the tensors that a block returns."""
    return [number_of(t) for t in nested.tensors(output) if t.is_floating_point() and t.numel()]


def _version(tensor: Tensor) -> int:
    """How often it was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _require_plain(arguments: Arguments) -> None:
    if not _is_plain(arguments):
        raise CannotRunAlone("it shares an object with other parts of the model")


def _is_plain(arguments: Arguments) -> bool:
    """Whether no object among them holds tensors that outlast the call, as a cache of keys and values does."""
    args, kwargs = arguments
    return all(isinstance(v, _PLAIN) or next(nested.tensors(v), None) is None for v in (*args, *kwargs.values()))
