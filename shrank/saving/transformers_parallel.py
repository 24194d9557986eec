"""Tensor parallelism of transformers for models with low-rank layers: styles that split these as well.

A plan of transformers names styles by wildcards, which stand for the same layer in every block, low-rank here and dense
there. So each style that splits linear layers has a counterpart that looks at the module.
"""

from __future__ import annotations

import re

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from ..layers.led import LED
from ..layers.packed import PackedLinear
from ..layers.tensor_parallel import splittable_stages

# The stage that is split; the other is whole on every process.
_SPLIT_STAGE = {
    "colwise": 1,
    "colwise_gather_output": 1,
    "colwise_rep": 1,
    "packed_colwise": 1,
    "rowwise": 0,
    "rowwise_split_input": 0,
    "rowwise_rep": 0,
    "packed_rowwise": 0,
}
_WHOLE = {"replicate", "all_reduce", "mla_kv_a_proj"}  # what needs nothing of a layer's parameters
_PREFIX, _STAGES, _REFUSED = "shrank_", "shrank_stages", "shrank_of_few_bits"


class LowRankAware(TensorParallelLayer):
    """A style of transformers that splits low-rank layers by their stages, and treats all others as it does."""

    def __init__(self, style: TensorParallelLayer, stage: int) -> None:
        self._style, self._stage = style, stage

    def validate_param(
        self, module: nn.Module, param: str, mesh: DeviceMesh, parameter_name: str | None = None
    ) -> None:
        self._style.validate_param(module, param, mesh, parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        self._style.shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LED):
            return self._style.install_forward(module, mesh)
        stage = splittable_stages(module)[self._stage]
        for param in ("weight", "bias"):
            self._style.shard_param(stage, param, mesh)
        self._style.install_forward(stage, mesh)
        return module


class _Nothing(TensorParallelLayer):
    """Of the stages, which the layer's own style takes care of."""

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return module


class _Refused(TensorParallelLayer):
    """Of layers with weights on a grid."""

    def validate_param(
        self, module: nn.Module, param: str, mesh: DeviceMesh, parameter_name: str | None = None
    ) -> None:
        self.shard_param(module, param, mesh)

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        raise ValueError("weights of few bits cannot be split between processes: load it in one, and merge it")

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        self.shard_param(module, "weight", mesh)


for _name, _stage in _SPLIT_STAGE.items():
    if _name in ALL_PARALLEL_STYLES:
        ALL_PARALLEL_STYLES.register(_PREFIX + _name, LowRankAware(ALL_PARALLEL_STYLES[_name], _stage))
ALL_PARALLEL_STYLES.register(_STAGES, _Nothing())
ALL_PARALLEL_STYLES.register(_REFUSED, _Refused())


def make_aware(model: nn.Module, plan: dict[str, str]) -> None:
    """Change the entries of a plan, in place, that low-rank layers of the model fall under; ValueError where one has a
    style that there is no way to split such a layer by."""
    low_rank = {_by_wildcards(fqn) for fqn, module in model.named_modules() if isinstance(module, LED)}
    packed = {_by_wildcards(fqn) for fqn, module in model.named_modules() if isinstance(module, PackedLinear)}
    plan |= {f"{name}.weight": _REFUSED for name in packed}
    for name in low_rank & plan.keys():
        style = plan[name]
        if style in _SPLIT_STAGE:
            plan |= {name: _PREFIX + style, f"{name}.{LED.unit}": _STAGES}
        elif style not in _WHOLE:
            raise ValueError(
                f"{name}: the tensor parallel plan has the style {style!r} for it, and low-rank layers can only be "
                f"split by {', '.join(_SPLIT_STAGE)}; give a plan without it"
            )


def as_published(plan: dict[str, str]) -> None:
    """Undo what `make_aware` did, in place: others read from the plan how many heads a process has."""
    for name, style in list(plan.items()):
        if style in (_STAGES, _REFUSED):
            del plan[name]
        elif style.startswith(_PREFIX):
            plan[name] = style.removeprefix(_PREFIX)


def _by_wildcards(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
