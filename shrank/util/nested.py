"""Values inside values: what people pass to a model and what it returns, walked and mapped in one way.

Mappings, sequences, sets, named tuples, dataclasses and plain objects are entered; modules, classes and functions are
not.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_CLOSED = (Tensor, nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, str, bytes)


def attributes(value: object) -> dict[str, object]:
    """The attributes that an object itself holds, those in slots among them."""
    slots = (name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ())))
    held = {
        name: getattr(value, name)
        for name in slots
        if name not in ("__dict__", "__weakref__") and not name.startswith("__") and hasattr(value, name)
    }
    return held | dict(getattr(value, "__dict__", {}))


def children(value: object) -> list[tuple[str, object]]:
    """What a value holds, each with the way to it, such as `['x']`, `[0]` or `.x`; [] if it is not entered."""
    if isinstance(value, _CLOSED):
        return []
    if isinstance(value, dict):
        return [(f"[{key!r}]", entry) for key, entry in value.items()] + _own(value, skip=value)
    if isinstance(value, list | tuple | deque):
        return [(f"[{i}]", entry) for i, entry in enumerate(value)] + _own(value)
    if isinstance(value, Set):
        return [("{}", entry) for entry in value]
    if not (own := _own(value)) and isinstance(value, Mapping):
        return [(f"[{key!r}]", entry) for key, entry in value.items()]
    return own


def walk(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The value and all that is in it, each object once, in order, with the way to it."""
    stack, seen = [(path, value)], {}
    while stack:
        path, value = stack.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # kept, so that its id stays its own
        yield path, value
        stack.extend(reversed([(path + way, entry) for way, entry in children(value)]))


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a value, each once."""
    return (entry for _, entry in walk(value) if isinstance(entry, Tensor))


def named(value: object, name: str) -> Iterator[object]:
    """What goes by this name, as a key or an attribute, in a value and in all that it holds."""
    for _, entry in walk(value):
        if isinstance(entry, Mapping):
            if name in entry:
                yield entry[name]
        elif not isinstance(entry, _CLOSED) and name in (held := attributes(entry)):
            yield held[name]
        elif isinstance(entry, tuple) and name in getattr(entry, "_fields", ()):
            yield getattr(entry, name)


def mapped(function: Callable[[Tensor], Tensor], value: object, _done: dict[int, object] | None = None) -> object:
    """The same structure, of the same types, with `function` of every tensor; the value itself is not changed.

    Containers are always copied, so that a model may change its own; other objects where a tensor is in them.
    """
    done = {} if _done is None else _done
    if id(value) in done:
        return done[id(value)][1]
    made = _mapped(function, value, done)
    done[id(value)] = (value, made)
    return made


def _mapped(function: Callable[[Tensor], Tensor], value: object, done: dict) -> object:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):  # whose batch_sizes belong on the CPU
        return value._replace(
            **{
                name: mapped(function, getattr(value, name), done)
                for name in ("data", "sorted_indices", "unsorted_indices")
            }
        )
    if isinstance(value, tuple | Set) and not isinstance(value, _CLOSED):
        entries = [mapped(function, entry, done) for entry in value]
        if all(old is new for old, new in zip(value, entries, strict=True)):
            return value
        return type(value)._make(entries) if hasattr(value, "_make") else type(value)(entries)
    if not isinstance(value, dict | list | deque) and not any(isinstance(e, Tensor) for _, e in walk(value)):
        return value
    if isinstance(value, Mapping) and not isinstance(value, dict) and not attributes(value):
        return type(value)({key: mapped(function, entry, done) for key, entry in value.items()})
    made = copy.copy(value)
    done[id(value)] = (value, made)  # before its entries, which may hold it
    _fill(made, value, lambda entry: mapped(function, entry, done))
    return made


def _fill(made: object, value: object, change: Callable[[object], object]) -> None:
    """Change the entries and attributes of a copy."""
    if isinstance(value, dict):
        for key, entry in list(value.items()):
            made[key] = change(entry)
    elif isinstance(value, list):
        made[:] = [change(entry) for entry in value]
    elif isinstance(value, deque):
        entries = [change(entry) for entry in value]
        made.clear()
        made.extend(entries)
    for name, entry in attributes(value).items():
        if (new := change(entry)) is not entry:
            object.__setattr__(made, name, new)  # of frozen classes too


def _own(value: object, skip: Iterable[object] = ()) -> list[tuple[str, object]]:
    """Attributes, but for those that repeat a key, as in the outputs of transformers."""
    keys = set(skip)
    return [(f".{name}", entry) for name, entry in attributes(value).items() if name not in keys]


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots
