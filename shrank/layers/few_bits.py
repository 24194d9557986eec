"""Pivots that another tool rounded to a few bits, which ruins the other outputs: refused at the first call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .plain import why_not_numbers

_COLUMNS = 64  # of a weight that are looked at
# Share of distinct values among a row's first columns: 0.8 and more in int8, 0.65 in fp8, 0.2 to 0.4 in int4 (torchao,
# normal weights of 128 columns). fp8 has three bits behind the point, int8 seven below a row's largest entry.
_FEWEST_VALUES = 0.7
_SAME = 1e-5  # of a row's largest entry
_WAY_OUT = "shrank.unpivot(model) before quantizing, or compress with pivot=False"


@torch.no_grad()
def refuse_few_bits(stages: nn.Sequential, x: Tensor) -> None:
    """Once for the stages of a pivoted linear layer of which another tool made one: RuntimeError if it has few values.

    What a stage multiplies by, its products with rows of the unit matrix tell, whatever it is made of. A graph that is
    being compiled ends before it, and one that must be whole cannot be made: the values decide.
    """
    if is_compiling():
        raise RuntimeError(f"pivots that were quantized: call the model once before compiling it, or {_WAY_OUT}")
    for name, stage, width in zip(("down", "up"), stages, (x.shape[-1], stages[2].rank), strict=False):
        if not (by := quantizer(stage)):
            continue
        unit = torch.eye(min(width, _COLUMNS), width, dtype=x.dtype, device=x.device)
        rows = (_own(stage)(unit) - _own(stage)(torch.zeros_like(unit))).T.float().sort().values
        steps = rows.diff(dim=1) > _SAME * rows.abs().amax(1, keepdim=True)
        distinct = 1 + steps.sum(1).float().mean().item()
        if distinct < _FEWEST_VALUES * len(unit):
            raise RuntimeError(
                f"a pivoted layer has a {name} stage of {by}, whose rows have about {distinct:.0f} values in "
                f"{len(unit)} weights: rounding pivots so much spoils the other outputs. Call {_WAY_OUT}"
            )
    stages[2].looked_at = True


def quantizer(stage: nn.Module) -> str:
    """The class that another tool put in place of a linear stage, or of its weight, that has numbers of its own; ''
    where there is none.

    Tensors of torch itself (fake, distributed) are not quantized, and what shrank's own plans quantize is priced there.
    """
    own = _own(stage)
    weight = own._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return ""
    weight = getattr(own, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"{type(own).__module__}.{type(own).__qualname__}"
    kind = type(weight.detach())
    torchs = not why_not_numbers(weight) or kind.__module__.startswith(("torch.", "shrank."))
    return "" if torchs else f"{kind.__module__}.{kind.__qualname__}"


def _own(stage: nn.Module) -> nn.Module:
    """The stage without an adapter of peft."""
    return stage.get_base_layer() if hasattr(stage, "get_base_layer") else stage
