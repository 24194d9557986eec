"""What a block returns, in a file: its tensors, and how they lie in tuples, lists and dicts; and masks behind it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.masks import Mask
from ..util import nested, tensor_file

_LAYOUT, _THINNED, _ROWS = "layout", "thinned", torch.contiguous_format


class Unstreamable(ValueError):
    """A model that cannot be worked on block by block; the text says why."""


def write_value(file: Path, value: object, whose: str) -> None:
    """Write what a block of this name returned; Unstreamable if it is none of what `read_value` can give back."""
    numbers = {id(tensor): number for number, tensor in enumerate(nested.tensors(value))}
    layout = _laid_out(value, numbers, whose)
    tensors = {str(numbers[id(t)]): t.detach().clone(memory_format=_ROWS) for t in nested.tensors(value)}
    tensor_file.write(file, tensors, {_LAYOUT: json.dumps(layout)})


def read_value(file: Path, wanted: Callable[[int], bool], made: Callable[[int, Tensor], Tensor]) -> object:
    """What was written, with `made(number, tensor)` of its tensors. Those of floating point that are not `wanted` are
    zero, and not read."""
    layout = json.loads(tensor_file.read_table(file)[1][_LAYOUT])
    held = tensor_file.read(file, {str(entry["tensor"]) for entry in _tensors_in(layout) if _is_read(entry, wanted)})
    return _rebuilt(layout, held, made)


def thin(file: Path) -> None:
    """Leave of a value only how it lies, and its tensors that are always read."""
    if not is_whole(file):
        return
    layout = tensor_file.read_table(file)[1][_LAYOUT]
    names = {str(entry["tensor"]) for entry in _tensors_in(json.loads(layout)) if _is_read(entry, lambda number: False)}
    tensors = {name: tensor.clone() for name, tensor in tensor_file.read(file, names).items()}
    tensor_file.write(file, tensors, {_LAYOUT: layout, _THINNED: "yes"})


def is_whole(file: Path) -> bool:
    """Whether a value was written, and not thinned."""
    return file.exists() and _THINNED not in tensor_file.read_table(file)[1]


def write_masks(file: Path, masks: dict[int, Iterable[Mask]]) -> None:
    """Write masks of batches, by number."""
    listed = [(number, mask) for number, several in masks.items() for mask in several]
    about = [[number, mask.name, mask.stream, mask.time_first] for number, mask in listed]
    tensors = {str(i): mask.counts.clone(memory_format=_ROWS) for i, (_, mask) in enumerate(listed)}
    tensor_file.write(file, tensors, {_LAYOUT: json.dumps(about)})


def read_masks(file: Path) -> dict[int, list[Mask]]:
    """What was written."""
    names, about = tensor_file.read_table(file)
    held, masks = tensor_file.read(file, names), defaultdict(list)
    for i, (number, name, stream, time_first) in enumerate(json.loads(about[_LAYOUT])):
        masks[number].append(Mask(name, held[str(i)], stream, time_first))
    return masks


def _laid_out(value: object, numbers: dict[int, int], whose: str) -> object:
    if isinstance(value, Tensor):
        return {"tensor": numbers[id(value)], "shape": list(value.shape), "dtype": str(value.dtype).partition(".")[2]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_laid_out(entry, numbers, whose) for entry in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _laid_out(entry, numbers, whose) for key, entry in value.items()}}
    raise Unstreamable(f"{whose} returns a {type(value).__name__}, which no file can hold")


def _tensors_in(layout: dict) -> list[dict]:
    if "tensor" in layout:
        return [layout]
    inner = layout.get("tuple") or layout.get("list") or (layout.get("dict") or {}).values()
    return [found for entry in inner for found in _tensors_in(entry)]


def _is_read(entry: dict, wanted: Callable[[int], bool]) -> bool:
    return wanted(entry["tensor"]) or not getattr(torch, entry["dtype"]).is_floating_point


def _rebuilt(layout: dict, held: dict[str, Tensor], made: Callable[[int, Tensor], Tensor]) -> object:
    if "tensor" in layout:
        number = layout["tensor"]
        found = held.get(str(number))
        if found is None:
            found = torch.zeros(layout["shape"], dtype=getattr(torch, layout["dtype"]))
        return made(number, found)
    if "plain" in layout:
        return layout["plain"]
    if "dict" in layout:
        return {key: _rebuilt(entry, held, made) for key, entry in layout["dict"].items()}
    kind = tuple if "tuple" in layout else list
    return kind(_rebuilt(entry, held, made) for entry in layout[kind.__name__])
