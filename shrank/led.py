"""LED: the low-rank twin of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Linear
from torch.nn.functional import linear

from .merged_weight import merged_weight
from .ops.api import Backend, low_rank_linear, setting
from .seal import drop_seal
from .stages import (
    NO_PIVOTED_KERNEL,
    Pivots,
    checked_rank,
    is_pivoted,
    merged_bias,
    reset_stages,
    run_pivots,
    run_stages,
    set_stages,
)

NATIVE = Backend.NATIVE


class LED(nn.Module):
    """y = (x @ down.T) @ up.T + bias; x: (..., in_features), down: (rank, in_features), up: (out_features, rank).

    Drawn from scratch, its outputs have the variance that nn.Linear's have. `r` is the ancestors' name of `rank`.
    pivot: `down` holds `rank` rows of the weight itself and up (out_features - rank, rank) gives the others in terms of
    them: the same matrices in fewer numbers. Raises ValueError on a rank below 1, or of all outputs with pivots.
    Source: Winata et al., ICASSP 2020 (linear encoder-decoder); Zhao et al., ICML 2025 (PIFA).
    """

    def __init__(self, in_features: int, out_features: int, rank: int | None = None, bias: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
                 r: int | None = None, pivot: bool = False) -> None:
        super().__init__()
        rank = checked_rank(rank, r, out_features if pivot else None)
        self.in_features = in_features
        self.out_features = out_features
        made = {"device": device, "dtype": dtype}
        self.led_unit = nn.Sequential(
            Linear(in_features, rank, bias=False, **made),
            Linear(rank, out_features - rank if pivot else out_features, bias=bias, **made),
        )
        if pivot:
            self.led_unit.append(Pivots(rank, out_features, -1, bias, **made))
        reset_stages(self.led_unit, fan_in=in_features, rank=rank)

    def forward(self, x: Tensor) -> Tensor:
        # Direct dictionary look-ups: attribute access on modules would cost as much as the product of a small layer
        # (benchmarks/bench_inference.py).
        stages = self._modules["led_unit"]._modules
        first, second = stages["0"], stages["1"]
        a, b = first.__dict__, second.__dict__
        if type(first) is Linear and type(second) is Linear and not (
            a["_forward_hooks"] or a["_forward_pre_hooks"] or a["_backward_hooks"] or a["_backward_pre_hooks"]
            or b["_forward_hooks"] or b["_forward_pre_hooks"] or b["_backward_hooks"] or b["_backward_pre_hooks"]
            or "forward" in a or "forward" in b
        ):
            down, up, bias = a["_parameters"]["weight"], b["_parameters"]["weight"], b["_parameters"]["bias"]
            if len(stages) == 3:
                if setting.backend is NATIVE:
                    raise RuntimeError(NO_PIVOTED_KERNEL)
                h = linear(x, down)
                return run_pivots(stages["2"], h, linear(h, up, bias))
            if down.is_cuda or setting.backend is NATIVE:
                return low_rank_linear(x, down, up, bias)
            return linear(linear(x, down), up, bias)  # as low_rank_linear would, without the cost of asking
        if setting.backend is NATIVE and self.pivoted:
            raise RuntimeError(NO_PIVOTED_KERNEL)
        return run_stages(self.led_unit, x)

    @property
    def down(self) -> Tensor:
        """The first factor (rank, in_features)."""
        return self.led_unit[0].weight

    @property
    def up(self) -> Tensor:
        """The second factor (out_features, rank), with pivots (out_features - rank, rank)."""
        return self.led_unit[1].weight

    @property
    def pivoted(self) -> bool:
        return is_pivoted(self.led_unit)

    @property
    def order(self) -> Tensor | None:
        """With pivots, the place of every output in down and then up (out_features,)."""
        return self.led_unit[2].order if self.pivoted else None

    @property
    def bias(self) -> Tensor | None:
        return merged_bias(self.led_unit)

    @property
    def rank(self) -> int:
        return self.led_unit[0].out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight (out_features, in_features), multiplied out when used."""
        return merged_weight((self.out_features, self.in_features), self.down, self.dense_weight, type(self).__name__)

    def dense_weight(self) -> Tensor:
        """up @ down, in the layout of the dense layer's weight."""
        if not self.pivoted:
            return self.up @ self.down
        return torch.cat((self.down, self.up @ self.down)).index_select(0, self.led_unit[2].order)

    def set_factors(self, down: Tensor, up: Tensor, bias: Tensor | None, order: Tensor | None = None) -> None:
        """Make down (rank, in_features), up (out_features, rank) and bias the parameters, without a copy; with pivots
        up is (out_features - rank, rank) and order (out_features,) gives every output's place in down and then up."""
        set_stages(self.led_unit, down, up, bias, order)

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: object) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        _, _, _, unexpected, _ = rest
        drop_seal(state, prefix, unexpected)

    def __getitem__(self, stage: int) -> nn.Module:
        return self.led_unit[stage]

    def extra_repr(self) -> str:
        pivoted = ", pivoted" if self.pivoted else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{pivoted}"


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
        return super().dense_weight().mT if self.pivoted else self.down.mT @ self.up.mT
