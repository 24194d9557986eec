"""Linear layers that a block calls with one input, as attention calls query, key and value, in one op: of blocks whose
forward cannot be traced.

The block's own code runs. While it does, the first of such layers that is called computes the others as well, and these
hand out what is there for them if they are really called with that input, unchanged. Which layers have one input is
seen in the call before: a block that attends to itself may later attend to something else.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from ..layers.led import LED
from ..layers.plain import is_untouched
from ..ops import dispatch
from ..ops.dispatch import Backend, process
from ..util.closeness import distance
from .blocks import DOES_NOT_RUN
from .finish import at_once
from .verify import SIZES, without_traces


class _Running(threading.local):
    """Of each thread, the innermost call of a block that shares inputs."""

    call: Call | None = None


_running = _Running()
NATIVE = Backend.NATIVE


class SharingForward:
    """Stands in for the forward of a block, on its instance.

    Where gradients are on, in graphs that are compiled and where no native kernel may run, it does nothing but call the
    block's own.

    layers: the names of those that were found to have one input; their forwards are `SharedForward`s.
    groups: those that had one input in the call before.
    """

    def __init__(self, block: nn.Module, layers: list[str], groups: list[tuple[LED, ...]] | None = None) -> None:
        self.block, self.layers = block, layers
        self.groups = groups or []

    def __getstate__(self) -> dict[str, object]:
        return {"block": self.block, "layers": self.layers}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.block, self.layers, self.groups = state["block"], state["layers"], []

    def __call__(self, *args: object, **kwargs: object) -> object:
        own = type(self.block).forward
        if is_compiling() or is_grad_enabled() or not _may_be_native((*args, *kwargs.values())):
            return own(self.block, *args, **kwargs)
        outer, call = _running.call, Call(self.groups)
        _running.call = call
        try:
            return own(self.block, *args, **kwargs)
        finally:
            self.groups, _running.call = call.groups(), outer


class SharedForward:
    """Stands in for the forward of a layer in such a block, on its instance."""

    def __init__(self, layer: LED) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer  # on a CPU this is called for nothing, for every layer: it must cost next to nothing
        if is_dynamo_compiling() or (call := _running.call) is None or (y := call.take(layer, x)) is None:
            return type(layer).forward(layer, x)
        return y


class Call:
    """One call of a block: who was called with what, and what is there for those that were not called yet.

    groups: the layers that are expected to have one input.
    """

    def __init__(self, groups: list[tuple[LED, ...]]) -> None:
        self._expected = groups
        self._seen: dict[int, tuple[Tensor, list[LED]]] = {}  # the inputs are held, so that no other has their id
        self._x: Tensor | None = None
        self._state: tuple[object, ...] = ()
        self._left: dict[LED, Tensor] = {}

    def take(self, layer: LED, x: Tensor) -> Tensor | None:
        """The layer's output, if it is there or can be computed with those of others."""
        if not isinstance(x, Tensor) or x.is_inference() or is_grad_enabled():
            return None  # a tensor of inference mode does not know whether it was changed
        self._seen.setdefault(id(x), (x, []))[1].append(layer)
        if not (x is self._x and self._state == _state_of(x)):
            self._x, self._state, self._left = x, _state_of(x), {}
        if layer not in self._left:
            self._compute(layer, x)
        return self._left.pop(layer, None)

    def groups(self) -> list[tuple[LED, ...]]:
        """The layers that had one input."""
        return _several(called for _, called in self._seen.values())

    def _compute(self, layer: LED, x: Tensor) -> None:
        """With those that are expected to be called with the same, and were not computed or called yet."""
        group = next((each for each in self._expected if layer in each), ())
        there = {*self._left, *(each for _, called in self._seen.values() for each in called)}
        layers = tuple(each for each in group if each is layer or (each not in there and _is_as_left(each)))
        if len(layers) > 1 and (outputs := at_once(x, layers)):
            self._left |= zip(layers, outputs, strict=True)


def _may_be_native(given: Iterable[object]) -> bool:
    """Whether native kernels may run for one of these."""
    insisted = process.backend is NATIVE
    return any(isinstance(each, Tensor) and (insisted or each.is_cuda) for each in given)


def _is_as_left(layer: LED) -> bool:
    """Whether a layer would be called with what its block calls it with, and not by another tool."""
    return isinstance(layer.__dict__.get("forward"), SharedForward) and not layer._forward_pre_hooks


def _state_of(x: Tensor) -> tuple[object, ...]:
    """What must be the same for a layer to give the same output for the same input."""
    kind = x.device.type
    stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else None
    return x._version, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), stream


def _several(groups: Iterable[list[LED]]) -> list[tuple[LED, ...]]:
    """The groups of more than one layer."""
    return [group for called in groups if len(group := tuple(dict.fromkeys(called))) > 1]


def share(block: nn.Module, called: list[nn.Module]) -> SharingForward | None:
    """What may stand in for the forward of a block, if one call of it on random inputs shows layers of one input that
    give the same in one op. These have their stand-ins then.

    called: the modules that the block may call itself.
    """
    layers = [each for each in called if isinstance(each, LED) and is_untouched(each) and each.stored_factors()]
    if len(layers) < 2 or "forward" in vars(block) or any(each.is_meta for each in block.parameters()):
        return None
    groups = [each for each in _seen_in(block, layers) if _is_right(each)]
    together = {layer for group in groups for layer in group}
    for each in together:
        each.forward = SharedForward(each)
    names = [name for name, each in block.named_modules() if each in together]
    return SharingForward(block, names, groups) if names else None


def _seen_in(block: nn.Module, layers: list[LED]) -> list[tuple[LED, ...]]:
    """Those that have one input in a call as far as it comes: of what else the forward wants, nothing is known."""
    x = _inputs_of(layers[0])[0]
    wanted = inspect.signature(type(block).forward.__get__(block)).parameters.values()
    needed = [each for each in wanted if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    seen: dict[tuple[tuple[int, int], ...], list[LED]] = {}
    inputs: list[Tensor] = []  # held, so that no other has the id of one

    def note(layer: LED, given: tuple[Tensor, ...]) -> None:
        inputs.extend(given)
        seen.setdefault(tuple((id(each), each._version) for each in given), []).append(layer)

    hooks = [each.register_forward_pre_hook(note) for each in layers]
    try:
        with without_traces(block, x.device), torch.no_grad(), suppress(*DOES_NOT_RUN):
            type(block).forward(block, *[x] * max(1, len(needed)))
    finally:
        for each in hooks:
            each.remove()
    return _several(seen.values())


def _is_right(group: tuple[LED, ...]) -> bool:
    """Whether layers give the same in one op; not all that were called with an input need it to fit."""
    if len({each.in_features for each in group}) > 1:
        return False
    lists = [*zip(*(each.stored_factors() for each in group), strict=True)]
    with torch.no_grad():
        for x in _inputs_of(group[0]):
            together = dispatch.low_rank_linear_multi(x, *lists)
            if any(distance(y, type(layer).forward(layer, x)) for y, layer in zip(together, group, strict=True)):
                return False
    return True


def _inputs_of(layer: LED) -> list[Tensor]:
    like = layer.down
    made = (torch.randn(*size, layer.in_features, generator=torch.Generator().manual_seed(0)) for size in SIZES)
    return [each.to(like.device, like.dtype) for each in made]
