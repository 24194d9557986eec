"""What every way of saving asks of low-rank layers, and of linear layers on a grid: that they can be loaded again, a
seal for each, and weights on a grid as the arrays that files have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..layers.plain import why_not_numbers
from ..layers.quantized import is_quantized, packed_state
from ..layers.seal import DENSE_NAME, seal
from ..model.adapters import LOW_RANK
from ..model.unit_blocks import narrowed_in

METHOD = "shrank"  # what the config of a saved model calls a plan, where quantized models have their method


def is_compressed(model: nn.Module) -> bool:
    """Whether it has low-rank layers, or weights that shrank put on a grid."""
    return any(isinstance(m, LOW_RANK) or is_on_grid(m) for m in model.modules())


def is_on_grid(module: nn.Module) -> bool:
    return is_quantized(module._parameters.get("weight"))


def needs_plan(model: nn.Module) -> bool:
    """Whether a model has layers of another kind or size than its class gives it."""
    return is_compressed(model) or any(True for _ in narrowed_in(model))


def seals(model: nn.Module) -> dict[str, Tensor]:
    """A seal for every low-rank layer, and for every other one on a grid, under every name that its dense weight would
    have in `model.state_dict()`."""
    return {f"{fqn}.{DENSE_NAME}".lstrip("."): seal(shape) for fqn, _, shape in _sealed(model)}


def _sealed(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Every name of every layer that needs a seal, with the shape of its dense weight."""
    parts = {id(m) for x in model.modules() if isinstance(x, LOW_RANK) for _, part in x.parts() for m in part.modules()}
    for fqn, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LOW_RANK):
            yield fqn, layer, tuple(layer.weight_shape)
        elif is_on_grid(layer) and id(layer) not in parts:
            yield fqn, layer, tuple(layer.weight.shape)


def is_plan(value: object) -> bool:
    """Whether the `quantization_config` of a model's config, read or not, is a plan."""
    return (value.get("quant_method") if isinstance(value, dict) else getattr(value, "quant_method", None)) == METHOD


def stand_in_for(model: nn.Module) -> nn.Module:
    """An object that shares all that the model has, and whose own attributes may be set while it is saved: the model
    itself stays as it is, whatever happens meanwhile."""
    stand_in = object.__new__(type(model))
    vars(stand_in).update(vars(model))
    return stand_in


@contextmanager
def sealing(model: nn.Module) -> Iterator[None]:
    """Inside, `state_dict()` of the model is what files have: for code of others that writes what that returns."""
    sealed = {id(layer): shape for _, layer, shape in _sealed(model)}

    def pack(layer: nn.Module, state: dict, prefix: str, _: dict) -> None:
        name = prefix + DENSE_NAME
        if is_on_grid(layer):
            state |= packed_state({name: state.pop(name)})
        if id(layer) in sealed:
            state[name] = seal(sealed[id(layer)])

    check_saveable(model)
    touched = [m for m in model.modules() if id(m) in sealed or is_on_grid(m)]
    handles = [m.register_state_dict_post_hook(pack) for m in touched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_saveable(model: nn.Module) -> None:
    """ValueError if a stage of a low-rank layer is no plain layer: no loader could put together what replaced it."""
    problems = [
        f"{fqn or '(root)'}: {reason}"
        for fqn, layer in model.named_modules()
        if isinstance(layer, LOW_RANK) and (reason := layer.why_not_saved())
    ]
    if problems:
        raise ValueError(
            "nothing could load these low-rank layers again, and nothing was written:"
            + "".join(f"\n  {line}" for line in problems[:10])
        )


def why_not_data(value: Tensor) -> str:
    """Why a value of a state cannot be loaded again by its name; '' if it can, sharded as it may be."""
    return "" if hasattr(value, "full_tensor") else why_not_numbers(value)
