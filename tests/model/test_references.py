"""Modules that a model also keeps outside the registry: replaced wherever forward calls them from, or left dense."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import shrank
from shrank import LED
from tests.common.models import draw, seeded
from tests.common.tolerances import assert_close

Pair = namedtuple("Pair", ["layer", "scale"])


@dataclass(frozen=True)
class Step:
    layer: nn.Module


class Slotted:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def run(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Unregistered(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def in_closure(layer: nn.Module) -> Callable:
    def run(x: Tensor) -> Tensor:
        return layer(x)

    return run


def by_default(layer: nn.Module) -> Callable:
    def run(x: Tensor, layer: nn.Module = layer, *, again: nn.Module = layer) -> Tensor:
        return layer(x)

    return run


def cached(layer: nn.Module) -> Callable:
    run = functools.lru_cache(lambda x: [layer])
    run(1)
    return run


# How a layer is hidden, and how forward calls it from there.
HIDDEN: dict[str, tuple[Callable, Callable]] = {
    "attribute": (lambda m: m, lambda held, x: held(x)),
    "list": (lambda m: [m], lambda held, x: held[0](x)),
    "list-in-list": (lambda m: [[1, [m]]], lambda held, x: held[0][1][0](x)),
    "dict-of-lists": (lambda m: {"a": [m]}, lambda held, x: held["a"][0](x)),
    "defaultdict": (lambda m: defaultdict(list, a=[m]), lambda held, x: held["a"][0](x)),
    "ordered-dict": (lambda m: OrderedDict(a=m), lambda held, x: held["a"](x)),
    "user-dict": (lambda m: UserDict(a=m), lambda held, x: held["a"](x)),
    "user-list": (lambda m: UserList([m]), lambda held, x: held[0](x)),
    "deque": (lambda m: deque([m]), lambda held, x: held[0](x)),
    "set": (lambda m: {m}, lambda held, x: next(iter(held))(x)),
    "frozenset": (lambda m: frozenset({m}), lambda held, x: next(iter(held))(x)),
    "tuple": (lambda m: (m, m, 3), lambda held, x: held[1](x)),
    "tuple-in-tuple": (lambda m: ((2, (m,)),), lambda held, x: held[0][1][0](x)),
    "namedtuple": (lambda m: Pair(m, 2.0), lambda held, x: held.layer(x) * held.scale / 2),
    "list-of-namedtuples": (lambda m: [Pair(m, 2.0)], lambda held, x: held[0].layer(x) * held[0].scale / 2),
    "partial": (functools.partial, lambda held, x: held(x)),
    "partial-argument": (lambda m: functools.partial(lambda f, x: f(x), m), lambda held, x: held(x)),
    "partial-keyword": (lambda m: functools.partial(lambda x, f: f(x), f=m), lambda held, x: held(x)),
    "bound-forward": (lambda m: m.forward, lambda held, x: held(x)),
    "bound-method": (lambda m: Slotted(m).run, lambda held, x: held(x)),
    "closure": (in_closure, lambda held, x: held(x)),
    "default": (by_default, lambda held, x: held(x)),
    "list-of-closures": (lambda m: [in_closure(m)], lambda held, x: held[0](x)),
    "namespace": (lambda m: SimpleNamespace(layer=m), lambda held, x: held.layer(x)),
    "frozen-dataclass": (Step, lambda held, x: held.layer(x)),
    "slots": (Slotted, lambda held, x: held.run(x)),
    "objects-in-dict": (lambda m: {1: Slotted(m)}, lambda held, x: held[1].run(x)),
    "unregistered-module": (lambda m: [Unregistered(m)], lambda held, x: held[0](x)),
    "iterator": (lambda m: itertools.cycle([m]), lambda held, x: next(held)(x)),
    "cache": (cached, lambda held, x: held(1)[0](x)),
    "weak-reference": (weakref.ref, lambda held, x: held()(x)),
    "weak-proxy": (weakref.proxy, lambda held, x: held(x)),
}
each_way = pytest.mark.parametrize(("hide", "call"), HIDDEN.values(), ids=HIDDEN)


class Net(nn.Module):
    """Calls its one layer only from where it is hidden."""

    def __init__(self, hide: Callable, call: Callable) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32)])
        self.__dict__["held"], self.call = hide(self.layers[0]), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.held, x)


@each_way
def test_what_forward_calls_is_replaced_wherever_it_is(hide: Callable, call: Callable) -> None:
    net, x = seeded(lambda: Net(hide, call)), draw(3, 32)
    kind = type(net.held)
    shrank.auto_fact(net, 4)
    (layer,) = net.layers
    assert isinstance(layer, LED) and type(net.held) in (kind, LED)
    assert_close(net(x), layer(x))
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    net(x)
    handle.remove()
    # A bound forward skips hooks, as it did on the dense layer.
    assert len(calls) == (kind.__name__ != "method" or isinstance(net.held.__self__, Slotted))
    assert_close(shrank.merge(net)(x), layer(x))
    assert type(net.layers[0]) is nn.Linear


FIXED = {
    "key": (lambda m: {m: 1.0}, "a key of held"),
    "weak-key": (lambda m: weakref.WeakKeyDictionary({m: 1.0}), "a key of held.data"),
    "weak-value": (lambda m: weakref.WeakValueDictionary({"a": m}), "held.data"),
    "mapping-proxy": (lambda m: MappingProxyType({"a": m}), "held"),
    "iterator": (lambda m: iter((m,)), "inside held"),
    "other-method": (lambda m: m.extra_repr, "held.__self__"),
}


@pytest.mark.parametrize(("hide", "where"), FIXED.values(), ids=FIXED)
def test_a_layer_that_cannot_be_replaced_everywhere_stays_dense(hide: Callable, where: str) -> None:
    net = seeded(lambda: Net(hide, lambda held, x: x))
    with pytest.warns(UserWarning, match="no layer was replaced"):
        shrank.auto_fact(net, 4)
    reason = net.shrank_plan["layers.0"].reason
    assert f"forward may call it from {where}" in reason and "nothing can be put in its place" in reason
    assert type(net.layers[0]) is nn.Linear


def test_two_layers_in_one_tuple_and_a_cycle() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    net.pair = Pair(net[0], (net[1], net[0]))
    net.ring = [net]
    net.ring.append(net.ring)
    shrank.auto_fact(net, 4)
    assert net.pair == Pair(net[0], (net[1], net[0])) and isinstance(net.pair.scale[0], LED)
    assert net.ring[0] is net and net.ring[1] is net.ring


def test_other_models_are_left_alone() -> None:
    net, other = (seeded(lambda: nn.Sequential(nn.Linear(32, 32))) for _ in range(2))
    net.teacher, weight = [other], other[0].weight
    shrank.auto_fact(net, 4)
    assert net.teacher == [other] and other[0].weight is weight
    assert torch.equal(other(draw(2, 32)), nn.functional.linear(draw(2, 32), weight, other[0].bias))
