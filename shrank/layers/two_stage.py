"""What LED and CED share: a sequence of two stages, the down factor and the up factor with the bias, and in pivoted
storage a third, which puts the outputs of both into their places; and who computes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..ops import cpu, dispatch, host
from ..ops.dispatch import Backend, current_backend
from .few_bits import quantizer, refuse_few_bits
from .pivots import Pivots, run_pivots
from .plain import is_untouched

UNITS = ("led_unit", "ced_unit")  # what the sequence of stages is called, in attributes and checkpoints
BASE = "led_base"  # likewise the layer that a correction is beside
NO_PIVOTED_KERNEL = (
    "backend is native, but it has no kernel for a pivoted convolution whose groups have pivots of one another"
)


class Stored(NamedTuple):
    """What the ops take of a layer: with an order, its factors are pivoted."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    pivot_bias: Tensor | None = None
    order: Tensor | None = None


def checked_rank(rank: int | None, r: int | None, outputs: int | None = None) -> int:
    """The one rank that was given, as `rank` or as the ancestors' `r`; `outputs`: those that pivots are of."""
    if (rank is None) == (r is None):
        raise TypeError(f"give the rank once, as rank= or as r=; got rank={rank}, r={r}")
    rank = r if rank is None else rank
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if outputs is not None and rank >= outputs:
        raise ValueError(f"with pivots the rank must be below the {outputs} outputs, got {rank}")
    return rank


@torch.no_grad()
def reset_stages(stages: nn.Sequential, fan_in: int, rank: int) -> None:
    """Draw both stages so that the pair has the output variance of PyTorch's own layers, 1/3 for unit inputs.

    nn.Linear and nn.Conv draw U(-1/sqrt(fan_in), 1/sqrt(fan_in)), a variance of 1/(3 fan_in). Here the first stage
    keeps the input's variance (1/fan_in) and the second one divides it by three (1/(3 rank)); pivots are outputs, so
    that then the first one divides it.
    """
    if stages[0].weight.is_meta:
        return
    first, second = (
        (math.sqrt(1 / fan_in), math.sqrt(3 / rank))
        if is_pivoted(stages)
        else (math.sqrt(3 / fan_in), math.sqrt(1 / rank))
    )
    nn.init.uniform_(stages[0].weight, -first, first)
    nn.init.uniform_(stages[1].weight, -second, second)
    for stage in stages:
        if stage.bias is not None:
            nn.init.uniform_(stage.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def is_pivoted(stages: nn.Sequential) -> bool:
    return len(stages) == 3


def run(
    stages: nn.Sequential,
    x: Tensor,
    kinds: tuple[type[nn.Module], ...],
    in_one_op: Callable[[ModuleType, Tensor], Tensor],
) -> Tensor:
    """Decides who computes a low-rank layer: the stages one by one, or `in_one_op` of the ops and x.

    RuntimeError where the native kernels are insisted on for pivots that they do not know.
    """
    ops = ops_for(stages, kinds, x)
    mixed = is_pivoted(stages) and getattr(stages[2], "mixes_groups", False)
    if ops is None and mixed and current_backend() is Backend.NATIVE:
        raise RuntimeError(NO_PIVOTED_KERNEL)
    return in_one_op(ops, x) if ops else run_stages(stages, x)


def ops_for(stages: nn.Sequential, kinds: tuple[type[nn.Module], ...], x: Tensor) -> ModuleType | None:
    """The module whose op computes these stages of x at once; None where they run one by one."""
    if not is_pivoted(stages):
        factors = factors_of(stages, kinds)
        return ops_of(x, *factors) if factors else None
    stored = stored_factors(stages, kinds)
    if stored is None or not (type(stored.down) is Parameter and type(stored.up) is Parameter):
        _look_at_quantized(stages, x)
    if stored is None or stages[2].mixes_groups:
        return None
    by = ops_of(x, *stored[:4])
    return by if by in (dispatch, host) else None  # oneDNN: the third stage knows where no gather is needed


def _look_at_quantized(stages: nn.Sequential, x: Tensor) -> None:
    """RuntimeError at the first call of pivots of a linear layer that another tool quantized to a few bits."""
    first, second, pivots = stages._modules.values()
    is_linear = isinstance(pivots, Pivots) and pivots.dim == -1
    if is_linear and not pivots.looked_at and (quantizer(first) or quantizer(second)):
        refuse_few_bits(stages, x)


def stored_factors(stages: nn.Sequential, kinds: tuple[type[nn.Module], ...]) -> Stored | None:
    """All that is stored of stages which are all that a layer does, as `factors_of` has it, with pivots or without."""
    if not is_pivoted(stages):
        factors = factors_of(stages, kinds)
        return factors and Stored(*factors)
    first, second, pivots = stages._modules.values()
    if not (type(first) in kinds and type(second) in kinds and type(pivots) is Pivots):
        return None
    if not (is_untouched(first) and is_untouched(second) and is_untouched(pivots)):
        return None
    own, its, places = first._parameters, second._parameters, pivots._buffers
    if "weight" in own and len(its) == 2:
        return Stored(own["weight"], its["weight"], its["bias"], pivots._parameters["bias"], places["order"])
    return Stored(first.weight, second.weight, second.bias, pivots.bias, pivots.order)  # of DataParallel and FSDP


def factors_of(
    stages: nn.Sequential, kinds: tuple[type[nn.Module], ...]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """down, up and bias of stages that are all that a layer does; None of others.

    Such stages are what they were built as, one of `kinds`, without pivots, and nobody hooked or patched them.
    """
    first, second, *others = stages._modules.values()  # iterating over a Sequential takes a microsecond a stage
    if others or type(first) not in kinds or type(second) not in kinds:
        return None
    if not (is_untouched(first) and is_untouched(second)):
        return None
    own, its = first._parameters, second._parameters
    if "weight" in own and len(its) == 2:
        return own["weight"], its["weight"], its["bias"]
    return first.weight, second.weight, second.bias  # of DataParallel and FSDP: tensors in place of the parameters


def ops_of(x: Tensor, down: Tensor, up: Tensor, *others: Tensor | None) -> ModuleType | None:
    """`dispatch` where native kernels may run; on a CPU what is faster than PyTorch's calls, if anything."""
    if may_be_native(down):
        return dispatch
    is_linear = down.dim() == 2
    return cpu.fastest(x, down, up, *others) if is_linear and current_backend() is Backend.AUTO else None


def may_be_native(tensor: Tensor) -> bool:
    """Whether native kernels may run for a tensor: on CUDA, or where they are insisted on."""
    return tensor.is_cuda or current_backend() is Backend.NATIVE


def run_stages(stages: nn.Sequential, x: Tensor) -> Tensor:
    """Each stage runs itself, whatever other tools made of it (LoRA, quantization, offloading)."""
    h = stages[0](x)
    return run_pivots(stages[2], h, stages[1](h)) if is_pivoted(stages) else stages[1](h)


def merged_bias(stages: nn.Sequential) -> Tensor | None:
    """The bias of the layer: a parameter of its second stage, or with pivots a part of it there and a part in the
    third."""
    if not is_pivoted(stages) or stages[2].bias is None:
        return stages[1].bias
    return torch.cat((stages[2].bias, stages[1].bias)).index_select(0, stages[2].order)


def set_stages(
    stages: nn.Sequential, down: Tensor, up: Tensor, bias: Tensor | None, order: Tensor | None = None
) -> None:
    """Make these the parameters, uncopied; order: that of the outputs, for pivots."""
    if (order is None) == is_pivoted(stages):
        raise ValueError(f"the layer was built {'with' if order is None else 'without'} pivots")
    values = [(0, "weight", down), (1, "weight", up), (1, "bias", bias)]
    if order is not None:
        if order.shape != stages[2].order.shape:
            raise ValueError(f"order has shape {tuple(order.shape)}, wanted {tuple(stages[2].order.shape)}")
        parts = (None, None)
        if bias is not None:
            # Clones: safetensors refuses parameters that are slices of one storage.
            parts = [part.clone() for part in _split_bias(bias.detach(), order, len(down))]
        values = [*values[:2], (1, "bias", parts[1]), (2, "bias", parts[0])]
        stages[2].order = order.int()
        stages[2].settle()
    for stage, name, value in values:
        if (value is None) != (stages[stage]._parameters[name] is None):
            raise ValueError(f"the layer was built {'without' if value is not None else 'with'} a {name}")
        if value is not None:
            if value.shape != (expected := stages[stage]._parameters[name].shape):
                raise ValueError(f"{name} of stage {stage} has shape {tuple(value.shape)}, wanted {tuple(expected)}")
            # A parameter is kept as it is: a bias may be shared with another module.
            setattr(stages[stage], name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))


def memory_format(weight: Tensor) -> torch.memory_format:
    """channels_last where the tensor is stored so and not contiguous as well, else contiguous."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    unlike = wanted and not weight.is_contiguous() and weight.is_contiguous(memory_format=wanted)
    return wanted if unlike else torch.contiguous_format


def _split_bias(bias: Tensor, order: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The parts of the pivots and of the other outputs."""
    return bias[order.long().argsort()].split([rank, len(bias) - rank])


def assign_bias(stages: nn.Sequential, bias: Tensor | None) -> None:
    """Give the layer this bias (N,), or none, whether it had one or not."""
    if bias is None:
        parts = (None, None)
    else:
        outputs = len(stages[2].order) if is_pivoted(stages) else len(stages[1].weight)
        if not isinstance(bias, Tensor) or tuple(bias.shape) != (outputs,):
            raise ValueError(
                f"bias is for {outputs} outputs, got "
                f"{tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__}"
            )
        parts = (bias, None)
        if is_pivoted(stages):
            pivots, others = _split_bias(bias.detach(), stages[2].order, stages[2].rank)
            parts = (others.clone(), pivots.clone())
    for stage, part in zip(stages[1:], parts, strict=False):
        made = part if part is None or isinstance(part, nn.Parameter) else nn.Parameter(part, bias.requires_grad)
        stage.register_parameter("bias", made)
