"""The files of a compressed model: one for every unit and one for the rest, each written whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from ..planning.plan import LayerPlan, RankPlan
from ..saving.checks import seals
from ..util import tensor_file
from ..util.files import write_text

_METADATA = {"format": "pt"}  # as transformers writes it
INDEX = "model.safetensors.index.json"


def write_shard(file: Path, unit: str, model: nn.Module) -> None:
    """Write a unit, with a seal for every low-rank layer."""
    module, skipped = model.get_submodule(unit), _not_written(model)
    held = {f"{unit}.{key}": value for key, value in {**module.state_dict(), **seals(module)}.items()}
    _write(file, {name: value for name, value in held.items() if name not in skipped})


def write_rest(file: Path, model: nn.Module, units: Iterable[str]) -> None:
    """Write what a model has outside of its units."""
    inside, skipped = tuple(f"{unit}." for unit in units), _not_written(model)
    held = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    _write(file, {name: value for name, value in held.items() if name not in skipped})


def assembled(shards: list[Path], folder: Path) -> None:
    """A folder with these files, which stay where they are, under the names that transformers reads."""
    weight_map, total = {}, 0
    folder.mkdir(parents=True)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _linked(shard, folder / name)
        weight_map |= dict.fromkeys(tensor_file.read_table(shard)[0], name)
        total += shard.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def bare(plan: RankPlan) -> RankPlan:
    """The plan as one reads it off the model that was compressed by it."""
    layers = tuple(LayerPlan(x.fqn, x.kind, x.shape.dense_params, x.shape, x.rank) for x in plan.low_rank)
    return RankPlan(layers, plan.params_before - sum(layer.size for layer in plan.low_rank))


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    tensor_file.write(file, {name: value.detach().contiguous() for name, value in tensors.items()}, _METADATA)


def _not_written(model: nn.Module) -> set[str]:
    """Names that transformers does not save: of tied tensors only the one that the others are tied to is."""
    state = model.state_dict()
    tied = {name: other for name, other in model.all_tied_weights_keys.items() if {name, other} <= state.keys()}
    return {*(model._keys_to_ignore_on_save or ()), *(n for n, other in tied.items() if _same(state[n], state[other]))}


def _same(one: Tensor, other: Tensor) -> bool:
    return not one.is_meta and one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _linked(old: Path, new: Path) -> None:
    """The same file under another name; a copy where the disk cannot have it so."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)
