"""What every way of saving asks of low-rank layers: that they can be loaded again, and a seal for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..layers.plain import why_not_numbers
from ..layers.seal import DENSE_NAME, seal
from ..model.adapters import LOW_RANK
from ..model.feed_forward import narrowed_in

METHOD = "shrank"  # what the config of a saved model calls a plan, where quantized models have their method


def has_low_rank(model: nn.Module) -> bool:
    return any(isinstance(m, LOW_RANK) for m in model.modules())


def needs_plan(model: nn.Module) -> bool:
    """Whether a model has layers of another kind or size than its class gives it."""
    return has_low_rank(model) or any(True for _ in narrowed_in(model))


def seals(model: nn.Module) -> dict[str, Tensor]:
    """A seal for every low-rank layer, under every name that its dense weight would have in `model.state_dict()`."""
    return {
        f"{fqn}.{DENSE_NAME}".lstrip("."): seal(tuple(layer.weight_shape))
        for fqn, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, LOW_RANK)
    }


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
    """Inside, `state_dict()` of the model holds the seals too: for code of others that writes what that returns."""

    def add(layer: nn.Module, state: dict, prefix: str, _: dict) -> None:
        state[prefix + DENSE_NAME] = seal(tuple(layer.weight_shape))

    check_saveable(model)
    handles = [m.register_state_dict_post_hook(add) for m in model.modules() if isinstance(m, LOW_RANK)]
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
        if isinstance(layer, LOW_RANK) and (reason := layer.why_not_plain(sharded=True))
    ]
    if problems:
        raise ValueError(
            "nothing could load these low-rank layers again, and nothing was written:"
            + "".join(f"\n  {line}" for line in problems[:10])
        )


def why_not_data(value: Tensor) -> str:
    """Why a value of a state cannot be loaded again by its name; '' if it can, sharded as it may be."""
    return "" if hasattr(value, "full_tensor") else why_not_numbers(value)
