"""Where a model keeps its modules besides the registry of nn.Module: forward may call them from there.

Lists in lists, dicts, tuples, deques, sets, partials, bound methods, closures, plain objects, modules that nobody
registered: each place is found with a way to put another module there, or said to have none.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ..util.nested import attributes

_ATOMS = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    types.NoneType,
    Tensor,
    type,
    types.ModuleType,
    range,
    types.BuiltinFunctionType,
)
_OPAQUE = ("builtins", "functools", "itertools", "operator")
_REGISTRIES = ("_modules", "_parameters", "_buffers")
_CALLS = ("forward", "__call__")  # methods that every module has


@dataclass(frozen=True)
class Place:
    """Something that holds a value: how to read it and how to write it, or None where it cannot be written."""

    where: str
    get: Callable[[], object]
    put: Callable[[object], None] | None


def references(model: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    """Every module that is held somewhere else than in the registry of a module of the model, with that place."""
    named = {id(module): name for name, module in model.named_modules()}
    seen: set[int] = set()
    for fqn, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if name in _REGISTRIES or isinstance(value, _ATOMS):
                continue
            place = Place(
                f"{fqn}.{name}".lstrip("."), partial(vars(module).get, name), partial(vars(module).__setitem__, name)
            )
            yield from ((held, at) for held, at in _inside(value, place, named, seen) if held is not module)


def _inside(
    value: object, place: Place, registered: Mapping[int, str], seen: set[int]
) -> Iterator[tuple[nn.Module, Place]]:
    """The modules in a value, at any depth."""
    stack = [(value, place)]
    while stack:
        value, place = stack.pop()
        if type(value) in weakref.ProxyTypes:
            value = value.__repr__.__self__
            place = _rebuilt(place, weakref.proxy)
        if isinstance(value, nn.Module):
            yield value, place
            if id(value) in registered:
                continue  # its own attributes are looked at in its turn
        if isinstance(value, _ATOMS) or (not isinstance(value, tuple) and id(value) in seen):
            continue
        seen.add(id(value))
        stack.extend((inner, at) for inner, at in _contents(value, place) if not isinstance(inner, _ATOMS))


def _contents(value: object, place: Place) -> Iterator[tuple[object, Place]]:
    """What a value holds directly, with the places."""
    # No other mappings by their interface: those of accelerate read files. They are objects that hold dicts.
    if isinstance(value, dict | types.MappingProxyType):
        yield from _of_mapping(value, place)
    elif isinstance(value, list | deque):
        for i, inner in enumerate(value):
            if not isinstance(inner, _ATOMS):
                yield inner, Place(f"{place.where}[{i}]", partial(value.__getitem__, i), partial(value.__setitem__, i))
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield inner, _part(place, f"[{i}]", partial(_tuple_with, i), lambda held, i=i: held[i])
    elif isinstance(value, set | frozenset):
        for inner in value:
            yield inner, _part(place, "{}", partial(_set_with, inner), lambda held, inner=inner: inner)
    elif isinstance(value, partial):
        yield (
            value.func,
            _part(place, ".func", lambda held, new: partial(new, *held.args, **held.keywords), lambda held: held.func),
        )
        yield (
            value.args,
            _part(place, ".args", lambda held, new: partial(held.func, *new, **held.keywords), lambda held: held.args),
        )
        yield value.keywords, place
    elif isinstance(value, types.MethodType):
        called = getattr(value.__func__, "__name__", "") in _CALLS
        writable = called or not isinstance(value.__self__, nn.Module)
        at = _part(
            place, ".__self__", lambda held, new: getattr(new, held.__func__.__name__), lambda held: held.__self__
        )
        yield value.__self__, at if writable else Place(at.where, at.get, None)
    elif isinstance(value, weakref.ref):
        plain = type(value) is weakref.ref  # others carry more, such as the key in a weak dictionary
        yield value(), _rebuilt(place, weakref.ref) if plain else Place(place.where, place.get, None)
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value, place)
    elif type(value).__module__ in _OPAQUE:
        for inner in gc.get_referents(value):  # of iterators and caches, whose own parts cannot be exchanged
            yield inner, Place(f"inside {place.where.removeprefix('inside ')}", lambda inner=inner: inner, None)
    else:
        yield from _of_object(value, place)


def _of_mapping(value: Mapping, place: Place) -> Iterator[tuple[object, Place]]:
    for key, inner in list(value.items()):
        held = key() if isinstance(key, weakref.ref) else key
        if isinstance(held, nn.Module):
            yield held, Place(f"a key of {place.where}", lambda held=held: held, None)
        if not isinstance(inner, _ATOMS):
            put = partial(value.__setitem__, key) if isinstance(value, dict) else None
            yield inner, Place(f"{place.where}[{key!r:.40}]", partial(value.__getitem__, key), put)


def _of_function(value: types.FunctionType, place: Place) -> Iterator[tuple[object, Place]]:
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        if cell != types.CellType():  # an empty one holds nothing yet
            at = f"{place.where} (its variable {name})"
            yield cell.cell_contents, Place(at, *(partial(do, cell, "cell_contents") for do in (getattr, setattr)))
    for name in ("__defaults__", "__kwdefaults__", "__dict__"):
        if inner := getattr(value, name):
            yield inner, Place(f"{place.where}.{name}", *(partial(do, value, name) for do in (getattr, setattr)))


def _of_object(value: object, place: Place) -> Iterator[tuple[object, Place]]:
    """Attributes of an object, in its dictionary or in slots; of an unregistered module its registered ones too."""
    for name, inner in attributes(value).items():
        if not isinstance(inner, _ATOMS):
            yield (
                inner,
                Place(
                    f"{place.where}.{name}",
                    partial(object.__getattribute__, value, name),
                    partial(object.__setattr__, value, name),
                ),
            )


def _part(
    place: Place, where: str, changed: Callable[[object, object], object], read: Callable[[object], object]
) -> Place:
    """A part of something that cannot be written itself: it is built anew, from what is there by then."""
    put = None if place.put is None else lambda new: place.put(changed(place.get(), new))
    return Place(place.where + where, lambda: read(place.get()), put)


def _rebuilt(place: Place, make: Callable[[nn.Module], object]) -> Place:
    put = None if place.put is None else lambda new: place.put(make(new))
    return Place(f"a weak reference in {place.where}", place.get, put)


def _tuple_with(index: int, held: tuple, new: object) -> tuple:
    items = (*held[:index], new, *held[index + 1 :])
    return type(held)._make(items) if hasattr(held, "_make") else type(held)(items)


def _set_with(old: object, held: set | frozenset, new: object) -> set | frozenset:
    return type(held)(new if item is old else item for item in held)
