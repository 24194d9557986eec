"""CorrectedLinear: a linear layer of few bits, and what rounding took from it in two factors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..linalg import AS_IT_IS, Factors, Shape, Storage
from ..ops import reference
from .foreign import dtype_of, sizes_of, tensors_of, weight_of
from .low_rank import LowRankLayer
from .quantized import storage_of
from .two_stage import BASE, checked_rank, factors_of, ops_of, run_stages


class CorrectedLinear(LowRankLayer):
    """A linear layer as it is, and two factors that add what its weight lost: y = base(x) + (x @ down.T) @ up.T.

    x is (..., in_features), y (..., out_features), `down` (rank, in_features), `up` (out_features, rank). The factors
    are the weights of `led_unit[0]` and `led_unit[1]`, two nn.Linear without biases; a bias is the base's. Built from
    scratch, the second factor is zero: nothing is added.

    Args:
        base: Any module that has `in_features` and `out_features` and multiplies by a matrix: nn.Linear, plain or with
            a weight of torchao, or a quantized layer of another library.
        rank: R, at least 1.
        device: Of the factors; by default that of the base's weight.
        dtype: Of the factors; by default that of the base's weight, or of what else it holds in floating point.

    Raises:
        ValueError: The rank is below 1.
        TypeError: The base is no linear layer.

    Source:
        ZeroQuant-V2 (Yao et al., 2023), LQER (Zhang et al., ICML 2024).
    """

    unit = "led_unit"
    stage_kinds = (nn.Linear,)
    kind = "Linear"
    takes_ends = False  # the op's residual is what the base computes
    scales_with_a_factor = False

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank, sizes = checked_rank(rank, None), sizes_of(base)
        if sizes is None:
            raise TypeError(f"a {type(base).__name__} has no in_features and out_features: only linear layers have")
        self.out_features, self.in_features = sizes
        made = {"device": device or next((t.device for t in tensors_of(base)), None), "dtype": dtype or dtype_of(base)}
        self.led_base = base
        self.led_unit = nn.Sequential(
            nn.Linear(self.in_features, rank, bias=False, **made),
            nn.Linear(rank, self.out_features, bias=False, **made),
        )
        nn.init.zeros_(self.led_unit[1].weight)

    @property
    def base(self) -> nn.Module:
        """The layer that is corrected."""
        return self._modules[BASE]

    def forward(self, x: Tensor) -> Tensor:
        residual = self.base(x)
        factors = factors_of(self.stages, self.stage_kinds)
        if factors and _fit(x, residual, factors[1]) and (ops := ops_of(x, *factors, residual)):
            return ops.low_rank_linear(x, *factors, "none", residual)
        return run_stages(self.stages, x) + residual

    def finished(self, x: Tensor, activation: str, residual: Tensor | None = None) -> Tensor:
        return reference.finished(self(x), activation, residual)

    def plain_factors(self) -> None:
        """The factors are not all that the layer does."""

    @property
    def rank(self) -> int:
        return self.built_with(0, "out_features")

    @property
    def shape(self) -> Shape:
        return Shape(self.out_features, self.in_features)

    @property
    def storage(self) -> Storage:
        """How it is stored, as plans say it."""
        base, factors = storage_of(self.base) or AS_IT_IS, super().storage
        return Storage(base.grid, True, factors.grid, base.activations)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def bias(self) -> Tensor | None:
        """That of the base."""
        return getattr(self.base, "bias", None)

    def dense_weight(self) -> Tensor:
        return weight_of(self.base, self.stages[0].weight.dtype) + self.up @ self.down

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def grouped(self) -> tuple[Tensor, Tensor]:
        return self.down[None], self.up[None]

    def ungrouped(self, factors: Factors) -> tuple[Tensor, Tensor]:
        return factors.down[0], factors.up[0]

    def blocks_of(self, weight: Tensor) -> Tensor:
        return weight[None]

    def why_not_saved(self) -> str:
        base, reason = storage_of(self.base), super().why_not_saved()
        if reason or (base and super().storage.activations in (None, base.activations)):
            return reason
        if base:
            return "its base and its factors round what they multiply in two ways"
        kind = type(self.base)
        return (
            f"its base is a {kind.__module__}.{kind.__qualname__} with weights that shrank did not put on a grid: save "
            "the model without corrections (shrank.uncorrect) as it came, and these by shrank.export_lora"
        )

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        yield "base", self.base
        yield from super().parts()

    def assign(self, name: str, value: Tensor | None) -> None:
        if name == "weight":
            raise ValueError(
                "CorrectedLinear.weight cannot be assigned: it is that of a base and what its factors add; merge the "
                "model first"
            )
        self.base.bias = value

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _fit(x: Tensor, residual: Tensor, up: Tensor) -> bool:
    """Whether the op takes as its residual what the base computed."""
    return residual.dtype is x.dtype and residual.shape == (*x.shape[:-1], up.shape[0])
