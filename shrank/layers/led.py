"""LED: the low-rank twin of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Linear
from torch.nn.functional import linear

from ..linalg import Factors, PivotedFactors, Shape
from ..ops.dispatch import Backend, low_rank_linear, setting
from .low_rank import LowRankLayer
from .two_stage import NO_PIVOTED_KERNEL, Pivots, checked_rank, reset_stages, run_pivots, run_stages

NATIVE = Backend.NATIVE


class LED(LowRankLayer):
    """y = (x @ down.T) @ up.T + bias; x: (..., in_features), down: (rank, in_features), up: (out_features, rank).

    Drawn from scratch, its outputs have the variance that nn.Linear's have. `r` is the ancestors' name of `rank`.
    pivot: `down` holds `rank` rows of the weight itself and up (out_features - rank, rank) gives the others in terms of
    them: the same matrices in fewer numbers. Raises ValueError on a rank below 1, or of all outputs with pivots.
    Source: Winata et al., ICASSP 2020 (linear encoder-decoder); Zhao et al., ICML 2025 (PIFA).
    """

    unit = "led_unit"
    kind = "Linear"

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
        # (benchmarks/speed/bench_inference.py).
        stages = self._modules["led_unit"]._modules
        first, second = stages["0"], stages["1"]
        a, b = first.__dict__, second.__dict__
        own, others = a["_parameters"], b["_parameters"]
        # DataParallel and FSDP take the parameters away and leave tensors in their places, which the stages know.
        if type(first) is Linear and type(second) is Linear and "weight" in own and len(others) == 2 and not (
            a["_forward_hooks"] or a["_forward_pre_hooks"] or a["_backward_hooks"] or a["_backward_pre_hooks"]
            or b["_forward_hooks"] or b["_forward_pre_hooks"] or b["_backward_hooks"] or b["_backward_pre_hooks"]
            or "forward" in a or "forward" in b
        ):
            down, up, bias = own["weight"], others["weight"], others["bias"]
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
    def rank(self) -> int:
        return self.built_with(0, "out_features")

    @property
    def shape(self) -> Shape:
        return Shape(self.out_features, self.in_features, pivoted=self.pivoted)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def dense_weight(self) -> Tensor:
        """up @ down, in the layout of the dense layer's weight."""
        if not self.pivoted:
            return self.up @ self.down
        return torch.cat((self.down, self.up @ self.down)).index_select(0, self.led_unit[2].order)

    def factors(self) -> Factors | PivotedFactors:
        if self.pivoted:
            return PivotedFactors(self.down[None], self.up[None], self.order, 1.0)
        return Factors(self.down[None], self.up[None], 0.0, 1.0)

    def take(self, factors: Factors | PivotedFactors, bias: Tensor | None) -> None:
        self.set_factors(factors.down[0], factors.up[0], bias, getattr(factors, "order", None))

    def blocks_of(self, weight: Tensor) -> Tensor:
        return weight[None]

    def extra_repr(self) -> str:
        pivoted = ", pivoted" if self.pivoted else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{pivoted}"


class LEDConv1D(LED):
    """The twin of transformers' Conv1D, whose weight is stored as (in_features, out_features)."""

    kind = "Conv1D"

    @property
    def nx(self) -> int:
        return self.in_features

    @property
    def nf(self) -> int:
        return self.out_features

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def dense_weight(self) -> Tensor:
        return super().dense_weight().mT if self.pivoted else self.down.mT @ self.up.mT

    def blocks_of(self, weight: Tensor) -> Tensor:
        return weight.mT[None]
