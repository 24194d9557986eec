"""Saving a model with its plan to one safetensors file, and loading it onto a dense model of the same architecture."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..compression.apply import attach_empty, expected_state, unpack
from ..compression.describe import describe
from ..layers.plain import why_not_numbers
from ..layers.quantized import DTYPES, SCALES, is_quantized, packed_state
from ..layers.seal import sealed_names
from ..layers.two_stage import memory_format
from ..planning.plan import RankPlan
from ..util import tensor_file
from ..util.lines import indented
from .checks import check_saveable, seals
from .planned import missing_factors, packed_problems

METADATA_KEY = "shrank"


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself: its plan, tensor shapes, names that share one tensor, and the dtypes of weights
    whose scales are stored in another one."""

    plan: RankPlan
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    dtypes: dict[str, str]


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the model's state and the structure of its low-rank layers to one safetensors file, atomically.

    Args:
        model: Any module with low-rank layers in it, or none.
        path: The file, which is replaced whole or not at all.

    Raises:
        TypeError: Some state is no tensor (a module's `get_extra_state`).
        ValueError: `load` could not read it: stages with adapters, pruned or parametrized ones, or quantized by others
            than shrank, tensors without data.
    """
    tensor_file.write(path, *content(model))


def content(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, with a seal for every low-rank layer, and the metadata of a checkpoint; raises as `save` does."""
    check_saveable(model)
    state = model.state_dict()
    if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise TypeError(f"safetensors hold only tensors; not one: {', '.join(wrong)}")
    if empty := [name for name, value in state.items() if value.is_meta]:
        raise ValueError(f"on the meta device, without data: {', '.join(empty[:5])}")
    if wrong := [f"{name}: {reason}" for name, value in state.items() if (reason := why_not_numbers(value))]:
        raise ValueError(
            "safetensors hold only plain tensors, and what shrank.quantize_factors made; save before quantizing by "
            f"others, gather shards first:{indented(wrong)}"
        )
    tensors, aliases = _without_aliases(packed := packed_state(state))
    dtypes = {
        name: str(value.dtype).removeprefix("torch.")
        for name, value in state.items()
        if is_quantized(value) and packed[name + SCALES].dtype is not value.dtype
    }
    metadata = {"plan": describe(model).to_dict(), "aliases": aliases, "dtypes": dtypes}
    return tensors | seals(model), {METADATA_KEY: json.dumps(metadata)}


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Turn a dense model of the saved architecture into the saved one, in place, and return the root.

    Args:
        model: A model of the architecture that was compressed, with any weights.
        path: A file that `save` wrote.

    Returns:
        The model, or the low-rank layer if `model` itself is a layer that was saved as one.

    Raises:
        ValueError: The file is damaged, is no checkpoint of shrank, or does not fit; the model is then as it was.
    """
    header = read_header(path)
    try:
        expected = expected_state(model, header.plan)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    stored = header.shapes | {alias: header.shapes[name] for alias, name in header.aliases.items()}
    sealed = sealed_names(stored)
    stored = {name: shape for name, shape in stored.items() if name not in sealed or len(shape) != 1}
    _check_names_and_shapes(path, expected, stored)
    held = tensor_file.read(path, {header.aliases.get(name, name) for name in expected})
    state = {name: held[header.aliases.get(name, name)] for name in expected}
    if wrong := [
        f"{name}: {state[name].dtype} in the file, {expected[name].dtype} in the model"
        for name in expected
        if state[name].is_floating_point() != expected[name].is_floating_point()
    ]:
        raise ValueError(f"{path}: does not fit the model:{indented(wrong)}")
    if wrong := [
        name
        for name, value in state.items()
        if name.endswith("_unit.2.order") and not torch.equal(value.sort().values.long(), torch.arange(len(value)))
    ]:
        raise ValueError(f"{path}: no permutation of outputs: {', '.join(wrong[:5])}")
    wrong = [f"{name}: a dtype of what the file does not hold" for name in header.dtypes if name + SCALES not in state]
    if wrong := wrong + packed_problems(header.plan, state):
        raise ValueError(f"{path}: does not fit the model:{indented(wrong)}")
    model = attach_empty(model, header.plan)
    if any(t.is_meta for t in model.state_dict().values()):
        for name, dtype in header.dtypes.items():
            state[name + SCALES] = state[name + SCALES].to(getattr(torch, dtype))
        model.load_state_dict(_as_parameters(state, model), assign=True)
    else:
        model.load_state_dict(state)
    return unpack(model)


def read_header(path: str | os.PathLike) -> Header:
    """The plan and the tensor table of a checkpoint that `save` wrote; ValueError says what is wrong with the file."""
    shapes, metadata = tensor_file.read_table(path)
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path}: holds no plan; it was not written by shrank.save")
    try:
        content = json.loads(metadata[METADATA_KEY])
        if not isinstance(content, dict):
            raise ValueError("the plan is not a JSON object")
        plan, aliases = RankPlan.from_dict(content.get("plan")), content.get("aliases", {})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(aliases, dict) or not all(isinstance(n, str) and n in shapes for n in aliases.values()):
        raise ValueError(f"{path}: shared tensors refer to names that the file does not hold: {aliases!r:.200}")
    dtypes, known = content.get("dtypes", {}), [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    if not isinstance(dtypes, dict):
        raise ValueError(f"{path}: dtypes of weights must be an object, got {dtypes!r:.200}")
    if wrong := [value for value in dtypes.values() if value not in known]:
        raise ValueError(f"{path}: weights are {', '.join(known)}, got {wrong[0]!r:.80}")
    return Header(plan, shapes, aliases, dtypes)


def inspect_file(path: str | os.PathLike) -> tuple[RankPlan, list[str]]:
    """The plan of a file that `save` wrote, and what is wrong with its tensors; ValueError if it cannot be read."""
    header = read_header(path)
    missing = missing_factors(header.plan, header.shapes)
    problems = [f"{name}: missing, or not of the planned shape" for name in missing]
    state = tensor_file.read(path, header.shapes)
    return header.plan, problems + not_finite(state) + packed_problems(header.plan, state)


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """A line for every tensor that holds NaN or infinity."""
    return [
        f"{name}: holds NaN or infinity"
        for name, tensor in packed_state(state).items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def tensor_names(path: str | os.PathLike) -> list[str]:
    """Names of the tensors in any safetensors file; ValueError if it is damaged or is none."""
    return list(tensor_file.read_table(path)[0])


def _as_parameters(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state for assignment to a model without data: one parameter for all its names, in the layout planned."""
    made: dict[int, nn.Parameter] = {}
    for name, old in model.named_parameters(remove_duplicate=False):
        value = state[name].contiguous(memory_format=memory_format(old))
        state[name] = made.setdefault(id(old), nn.Parameter(value, old.requires_grad))
    return state


def _without_aliases(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under one name each, owning their memory, and the other names of those that have several."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        owns_all = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        tensors[name] = tensor.detach() if owns_all else tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _check_names_and_shapes(path, expected: dict[str, Tensor], stored: dict[str, tuple]) -> None:
    problems = [f"{name}: missing" for name in expected if name not in stored]
    problems += [f"{name}: unknown to the model" for name in stored if name not in expected]
    problems += [
        f"{name}: {stored[name]} in the file, {tuple(expected[name].shape)} in the model"
        for name in expected
        if name in stored and tuple(expected[name].shape) != stored[name]
    ]
    if problems:
        raise ValueError(f"{path}: does not fit the model:{indented(problems)}")
