"""LED: the low-rank twin of a linear layer."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.nn import Linear, Parameter
from torch.nn.functional import linear

from ..linalg import Factors, PivotedFactors, Shape
from ..ops import cpu, host, onednn
from ..ops.dispatch import Backend, low_rank_linear, process
from ..ops.linear import LINEAR
from .low_rank import LowRankLayer
from .pivots import Pivots, run_pivots
from .plain import is_untouched
from .two_stage import Stored, checked_rank, ops_of, reset_stages

AUTO, NATIVE = Backend.AUTO, Backend.NATIVE
FEWEST_INPUTS, FEWEST_WEIGHTS, FEWEST_NUMBERS = cpu.FEWEST_INPUTS, cpu.FEWEST_WEIGHTS, cpu.FEWEST_NUMBERS
NEVER = cpu.NEVER


class LED(LowRankLayer):
    """A linear layer whose weight is a product of two factors: y = (x @ down.T) @ up.T + bias.

    x is (..., in_features), y (..., out_features), `down` (rank, in_features), `up` (out_features, rank). The stages
    are `led_unit[0]` and `led_unit[1]`, two nn.Linear. Drawn from scratch, the outputs have the variance of
    nn.Linear's.

    Args:
        in_features: K, inputs.
        out_features: N, outputs.
        rank: R, at least 1; with pivots below `out_features`.
        bias: Whether a bias (out_features,) is added.
        device: Of the parameters.
        dtype: Of the parameters.
        r: The name of `rank` in Greenformer and ShRank; give one of both.
        pivot: Store the same matrices in fewer numbers: `down` holds `rank` rows of the weight itself, and `up`
            (out_features - rank, rank) gives the other rows in terms of them.

    Raises:
        ValueError: The rank is below 1, or with pivots not below the outputs.
        TypeError: The rank is not given, or given twice.

    Source:
        Winata et al., ICASSP 2020 (linear encoder-decoder); pivots: Zhao et al., ICML 2025 (PIFA).
    """

    unit = "led_unit"
    stage_kinds = (Linear,)
    kind = "Linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int | None = None,
        pivot: bool = False,
    ) -> None:
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
        # two_stage.run, inlined for stages that own their parameters: attribute access on modules and more calls (as of
        # current_backend) would cost as much as the product of a small layer (benchmarks/speed/bench_inference.py). All
        # else goes there, and tests/layers/test_run.py holds both to the same answers.
        own = self.__dict__  # a module's attribute takes three times as long as an entry of its dictionary
        stages = own["_modules"]["led_unit"].__dict__["_modules"]
        first, second = stages["0"], stages["1"]
        a, b = first.__dict__, second.__dict__
        its, others = a["_parameters"], b["_parameters"]
        # DataParallel and FSDP take the parameters away and leave tensors in their places, which the stages know.
        if (
            type(first) is type(second) is Linear
            and "weight" in its
            and len(others) == 2
            and not (
                a["_forward_hooks"]
                or a["_forward_pre_hooks"]
                or a["_backward_hooks"]
                or a["_backward_pre_hooks"]
                or b["_forward_hooks"]
                or b["_forward_pre_hooks"]
                or b["_backward_hooks"]
                or b["_backward_pre_hooks"]
                or "forward" in a
                or "forward" in b
            )
        ):
            down, up, bias = its["weight"], others["weight"], others["bias"]
            backend, large, by = process.backend, False, None
            inputs = own["in_features"]
            if inputs >= FEWEST_INPUTS and backend is AUTO and type(x) is Tensor and not is_grad_enabled():
                weights = a["out_features"] * (inputs + own["out_features"])
                # Under a compiler no size is read, on which the graph would depend.
                large = (
                    weights >= FEWEST_WEIGHTS.get(x.dtype, NEVER)
                    or is_compiling()
                    or x.numel() * weights >= FEWEST_NUMBERS
                )
                if large:
                    by = cpu.fastest(x, down, up, bias)
            if len(stages) == 2:
                if by:
                    return by.low_rank_linear(x, down, up, bias)
                if down.is_cuda or backend is NATIVE:
                    return low_rank_linear(x, down, up, bias)
                if large and is_compiling() and cpu.is_faster_in_a_graph(x, down, up):
                    return LINEAR.overload(x, down, up, bias)
                return linear(linear(x, down), up, bias)  # as low_rank_linear would, without the cost of asking
            pivots = stages["2"]
            if by is host:
                if type(pivots) is Pivots and is_untouched(pivots) and cpu.is_plain(pivots.bias, x.dtype):
                    return self.in_one_op(host, x)
            elif backend is not NATIVE and not down.is_cuda and type(down) is type(up) is Parameter:
                product = onednn.product if by else linear
                h = product(x, down)
                return run_pivots(pivots, h, product(h, up, bias))
        return super().forward(x)

    def in_one_op(self, ops: ModuleType, x: Tensor, *end: str | Tensor | None) -> Tensor:
        first, second, *third = self.stages._modules.values()
        down, up, bias = first.weight, second.weight, second.bias
        if not third:
            return ops.low_rank_linear(x, down, up, bias, *end)
        (pivots,) = third
        return ops.low_rank_pivoted(x, down, up, pivots.order, bias, pivots.bias, *end)

    def gated(self, value: LED, x: Tensor, activation: str) -> Tensor:
        """activation(self(x)) * value(x): in one op, where ops compute both layers."""
        if is_untouched(self) and is_untouched(value):
            gate, factors = self.stored_factors(), value.stored_factors()
            if gate and factors and (ops := _ops_of_both(x, gate, factors)):
                pivots = {"gate_pivot_bias": gate.pivot_bias, "gate_order": gate.order}
                pivots |= {"pivot_bias": factors.pivot_bias, "order": factors.order}
                return ops.low_rank_gated(x, *gate[:3], *factors[:3], activation=activation, **pivots)
        return self.finished(x, activation) * value(x)

    def takes_residual(self, x: Tensor, residual: Tensor) -> bool:
        return residual.shape == (*x.shape[:-1], self.out_features) and residual.dtype == x.dtype

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
        return self.all_rows(self.up @ self.down)

    def grouped(self) -> tuple[Tensor, Tensor]:
        return self.down[None], self.up[None]

    def ungrouped(self, factors: Factors | PivotedFactors) -> tuple[Tensor, Tensor]:
        return factors.down[0], factors.up[0]

    def blocks_of(self, weight: Tensor) -> Tensor:
        return weight[None]

    def extra_repr(self) -> str:
        pivoted = ", pivoted" if self.pivoted else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{pivoted}"


def _ops_of_both(x: Tensor, gate: Stored, value: Stored) -> ModuleType | None:
    by = ops_of(x, *value[:4], *gate[:4])
    are_pivoted = gate.order is not None or value.order is not None
    return None if by is onednn and are_pivoted else by  # the third stage knows where no gather is needed


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
