"""LED: the low-rank twin of a linear layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import Linear

from .merged_weight import merged_weight
from .ops.api import low_rank_linear


class LED(nn.Module):
    """y = (x @ down.T) @ up.T + bias; x: (..., in_features), down: (rank, in_features), up: (out_features, rank).

    Drawn from scratch, its outputs have the variance that nn.Linear's have. `r` is the ancestors' name of `rank`.
    Raises ValueError on a rank below 1. Source: Winata et al., ICASSP 2020 (linear encoder-decoder).
    """

    def __init__(self, in_features: int, out_features: int, rank: int | None = None, bias: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
                 r: int | None = None) -> None:
        super().__init__()
        rank = checked_rank(rank, r)
        self.in_features = in_features
        self.out_features = out_features
        self.led_unit = nn.Sequential(
            Linear(in_features, rank, bias=False, device=device, dtype=dtype),
            Linear(rank, out_features, bias=bias, device=device, dtype=dtype),
        )
        reset_stages(self.led_unit, fan_in=in_features, rank=rank)

    def forward(self, x: Tensor) -> Tensor:
        # Direct dictionary look-ups: through nn.Module.__getattr__ they would cost more than a small product does
        # (benchmarks/bench_overhead.py).
        stages = self._modules["led_unit"]._modules
        first, second = stages["0"], stages["1"]
        if type(first) is Linear and type(second) is Linear and not (
            first._forward_hooks or first._forward_pre_hooks or first._backward_hooks or first._backward_pre_hooks
            or second._forward_hooks or second._forward_pre_hooks or second._backward_hooks
            or second._backward_pre_hooks
        ):
            parameters = second._parameters
            return low_rank_linear(x, first._parameters["weight"], parameters["weight"], parameters["bias"])
        # A stage that another tool replaced, parametrized or hooked (LoRA, quantization, ...) is asked to run itself.
        return second(first(x))

    @property
    def down(self) -> Tensor:
        """The first factor (rank, in_features)."""
        return self.led_unit[0].weight

    @property
    def up(self) -> Tensor:
        """The second factor (out_features, rank)."""
        return self.led_unit[1].weight

    @property
    def bias(self) -> Tensor | None:
        return self.led_unit[1].bias

    @property
    def rank(self) -> int:
        return self.led_unit[0].out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight (out_features, in_features), multiplied out when used."""
        return merged_weight((self.out_features, self.in_features), self.down, self.dense_weight, type(self).__name__)

    def dense_weight(self) -> Tensor:
        """up @ down, in the layout of the dense layer's weight."""
        return self.up @ self.down

    def set_factors(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        """Make down (rank, in_features), up (out_features, rank) and bias the parameters, without a copy."""
        set_stages(self.led_unit, down, up, bias)

    def __getitem__(self, stage: int) -> nn.Module:
        return self.led_unit[stage]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LEDConv1D(LED):
    """The twin of transformers' Conv1D, whose weight is stored as (in_features, out_features)."""

    @property
    def nx(self) -> int:
        return self.in_features

    @property
    def nf(self) -> int:
        return self.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight (in_features, out_features), multiplied out when used."""
        return merged_weight((self.in_features, self.out_features), self.down, self.dense_weight, type(self).__name__)

    def dense_weight(self) -> Tensor:
        return self.down.mT @ self.up.mT


def checked_rank(rank: int | None, r: int | None) -> int:
    """The one rank that was given, as `rank` or as the ancestors' `r`."""
    if (rank is None) == (r is None):
        raise TypeError(f"give the rank once, as rank= or as r=; got rank={rank}, r={r}")
    rank = r if rank is None else rank
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return rank


@torch.no_grad()
def reset_stages(stages: nn.Sequential, fan_in: int, rank: int) -> None:
    """Draw both stages so that the pair has the output variance of PyTorch's own layers, 1/3 for unit inputs.

    nn.Linear and nn.Conv draw U(-1/sqrt(fan_in), 1/sqrt(fan_in)), a variance of 1/(3 fan_in). Here the first stage
    keeps the input's variance (1/fan_in) and the second one divides it by three (1/(3 rank)).
    """
    if stages[0].weight.is_meta:
        return
    nn.init.uniform_(stages[0].weight, -math.sqrt(3 / fan_in), math.sqrt(3 / fan_in))
    nn.init.uniform_(stages[1].weight, -1 / math.sqrt(rank), 1 / math.sqrt(rank))
    if stages[1].bias is not None:
        nn.init.uniform_(stages[1].bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def set_stages(stages: nn.Sequential, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    for stage, name, value in ((0, "weight", down), (1, "weight", up), (1, "bias", bias)):
        if (value is None) != (stages[stage]._parameters[name] is None):
            raise ValueError(f"the layer was built {'without' if value is not None else 'with'} a {name}")
        if value is not None:
            if value.shape != (expected := stages[stage]._parameters[name].shape):
                raise ValueError(f"{name} of stage {stage} has shape {tuple(value.shape)}, wanted {tuple(expected)}")
            # A parameter is kept as it is: a bias may be shared with another module.
            setattr(stages[stage], name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
