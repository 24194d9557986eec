"""What LED and CED share: two stages, read as factors, and the dense weight and bias that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..linalg import Factors, PivotedFactors, Shape, Storage
from ..ops import reference
from .assigned import assign_weight
from .merged_weight import merged
from .plain import is_untouched, why_no_matrix, why_not_plain
from .quantized import is_quantized, plain, quantized_of, storage_of_both, why_not_alike
from .seal import drop_seal
from .two_stage import (
    Stored,
    assign_bias,
    factors_of,
    is_pivoted,
    merged_bias,
    ops_for,
    run,
    set_stages,
    stored_factors,
)

_NAMES = ("down", "up")


class LowRankLayer(nn.Module):
    """A pair of stages in `unit`; a third puts the outputs of pivoted factors in order.

    Reading `weight` or `bias` gives what the dense layer would have. Assigning to them works as on a dense layer where
    the new weight has factors of the same rank, as after folding a batch norm; else it is a ValueError.
    """

    unit: ClassVar[str]  # the name of the sequence of stages, in attributes and checkpoints
    stage_kinds: ClassVar[tuple[type[nn.Module], ...]]  # that the op computes as well
    takes_ends: ClassVar[bool] = True  # whether an op computes it with what follows it
    scales_with_a_factor: ClassVar[bool] = True  # whether its weight does

    def forward(self, x: Tensor) -> Tensor:
        return run(self.stages, x, self.stage_kinds, self.in_one_op)

    def in_one_op(self, ops: ModuleType, x: Tensor, *end: str | Tensor | None) -> Tensor:
        """What the stages compute, one after the other, by the op that the module `ops` has for them.

        end: what follows them, if anything: activation and residual, as the op takes them.
        """
        raise NotImplementedError

    def finished(self, x: Tensor, activation: str, residual: Tensor | None = None) -> Tensor:
        """activation(self(x)) + residual: in one op, where the op computes the layer and its law has the residual."""
        fits = residual is None or self.takes_residual(x, residual)
        if fits and is_untouched(self) and (ops := ops_for(self.stages, self.stage_kinds, x)):
            return self.in_one_op(ops, x, activation, residual)
        return reference.finished(self(x), activation, residual)

    def plain_factors(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """down, up and bias, where they are all that the stages do: no pivots, no hooks, no stages of other tools."""
        return factors_of(self.stages, self.stage_kinds)

    def stored_factors(self) -> Stored | None:
        """The same with pivots or without."""
        return stored_factors(self.stages, self.stage_kinds)

    def takes_residual(self, x: Tensor, residual: Tensor) -> bool:
        """Whether the op adds a residual of this shape and dtype."""
        return False

    @property
    def stages(self) -> nn.Sequential:
        return self._modules[self.unit]

    @property
    def kind(self) -> str:
        """The class of the dense layer, as plans call it."""
        raise NotImplementedError

    @property
    def shape(self) -> Shape:
        """The layer as a matrix."""
        raise NotImplementedError

    @property
    def down(self) -> Tensor:
        """The first factor, in the layout of the first stage's weight; of one on a grid the numbers it stands for."""
        return self._factor(0)

    @property
    def up(self) -> Tensor:
        """The second factor, in the layout of the second stage's weight; with pivots, of the other outputs only."""
        return self._factor(1)

    @property
    def pivoted(self) -> bool:
        return is_pivoted(self.stages)

    @property
    def order(self) -> Tensor | None:
        """With pivots, the place of every output in down and then up (N,)."""
        return self.stages[2].order if self.pivoted else None

    @property
    def bias(self) -> Tensor | None:
        """That of the dense layer (N,); with pivots, put together from two parts."""
        own = self.stages[1].bias
        if not self.pivoted or own is None:
            return own
        return merged(own, (self.shape.out_features,), self.dense_bias, self, "bias")

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied out when used."""
        like = self.stages[0].weight
        if is_quantized(like):
            like = quantized_of(like).scales  # of the same dtype and device; what scales them scales the product
        if not isinstance(like, Tensor):
            return like  # a method where the stage is quantized, as it would be on the dense layer
        return merged(like, self.weight_shape, self.dense_weight, self, "weight")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense layer's weight."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The product of the factors, in the layout of the dense layer's weight."""
        raise NotImplementedError

    def dense_bias(self) -> Tensor | None:
        """That of the dense layer (N,), put together."""
        return merged_bias(self.stages)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that it is made of, as messages call them."""
        yield from zip(("down", "up", "pivots"), self.stages, strict=False)

    def all_rows(self, product: Tensor) -> Tensor:
        """The dense weight as a matrix (N, K), from the product of the factors: with pivots, of the other rows."""
        if not self.pivoted:
            return product
        return torch.cat((self.down.flatten(1), product)).index_select(0, self.order)

    def grouped(self) -> tuple[Tensor, Tensor]:
        """down and up, group by group: (G, R/G, K/G) and (G, N/G, R/G)."""
        raise NotImplementedError

    def ungrouped(self, factors: Factors | PivotedFactors) -> tuple[Tensor, Tensor]:
        """down and up in the layouts of the stages' weights, from factors group by group."""
        raise NotImplementedError

    def dense_weight_like(self, dense: nn.Module) -> Tensor:
        """The product of the factors, detached, in the layout of this dense layer's weight."""
        return self.dense_weight().detach()

    def factors(self) -> Factors | PivotedFactors:
        """The factors, group by group, as `linalg` has them."""
        if self.pivoted:
            return PivotedFactors(*self.grouped(), self.order, 1.0)
        return Factors(*self.grouped(), 0.0, 1.0)

    def take(self, factors: Factors | PivotedFactors, bias: Tensor | None) -> None:
        """Make these factors, group by group, and this bias (N,) the parameters."""
        order = factors.order if isinstance(factors, PivotedFactors) else None
        self.set_factors(*self.ungrouped(factors), bias, order)

    def set_factors(self, down: Tensor, up: Tensor, bias: Tensor | None, order: Tensor | None = None) -> None:
        """Make down and up, in the layouts of the stages' weights, and bias (N,) the parameters, without a copy; with
        pivots `up` is that of the other outputs and `order` (N,) gives every output's place in down and then up."""
        set_stages(self.stages, down, up, bias, order)

    def blocks_of(self, weight: Tensor) -> Tensor:
        """A dense weight as (G, N/G, K/G), one matrix for each group of the first stage."""
        raise NotImplementedError

    def why_not_saved(self) -> str:
        """What keeps its state from being loaded again; '' if nothing does."""
        return self.why_not_plain(sharded=True)

    def why_not_plain(self, sharded: bool = False) -> str:
        """What keeps the parameters of the stages from being all that the layer does; '' if nothing does.

        sharded: parameters that somebody will gather do.
        """
        for name, stage in zip(_NAMES, self.stages, strict=False):
            if reason := why_not_plain(stage, sharded):
                return f"its {name} stage {reason}"
        return why_not_alike(self.stages)

    @property
    def storage(self) -> Storage:
        """How the factors are stored; ValueError if each is in another way."""
        return storage_of_both(self.stages)

    def built_with(self, number: int, name: str) -> object:
        """An attribute of a stage; of one that peft has adapted, that of the layer inside."""
        stage = self.stages[number]
        stage = stage.get_base_layer() if hasattr(stage, "get_base_layer") else stage
        if not hasattr(stage, name):
            raise RuntimeError(
                f"{type(self).__name__}: its {_NAMES[number]} stage is a {type(stage).__module__}."
                f"{type(stage).__qualname__}, which has no {name}: put a plain layer there first"
            )
        return getattr(stage, name)

    def _factor(self, number: int) -> Tensor:
        stage = self.stages[number]
        if reason := why_no_matrix(stage):
            raise RuntimeError(f"{type(self).__name__}: its {_NAMES[number]} stage {reason}")
        return plain(stage.weight)

    def assign(self, name: str, value: Tensor | None) -> None:
        """Give the layer another dense `weight` or `bias`; ValueError where its factors cannot express it."""
        if name == "weight":
            assign_weight(self, value)
        else:
            assign_bias(self.stages, value)

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("weight", "bias"):
            self.assign(name, value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module; `weight` and `bias` go into the stages."""
        if name in ("weight", "bias"):
            self.assign(name, param)
        else:
            super().register_parameter(name, param)

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: object) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        _, _, _, unexpected, _ = rest
        drop_seal(state, prefix, unexpected)

    def __getitem__(self, stage: int) -> nn.Module:
        return self.stages[stage]
