"""The plan of a model as vLLM's quantization config: which of its layers are low-rank, in vLLM's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from ..layers.seal import DENSE_NAME
from ..planning.plan import LayerPlan, RankPlan
from ..saving.checks import METHOD
from .shares import require_built, served_layers
from .vllm_linear import DenseLinear, LowRankLinear


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfig):
    """The low-rank layers by name, and which of them vLLM has built."""

    def __init__(self, planned: dict[str, LayerPlan]) -> None:
        super().__init__()
        self.planned = planned
        self.built: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankConfig:
        return cls(served_layers(RankPlan.from_dict(config.get("plan"))))

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # what the kernels cannot run, PyTorch does

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Put vLLM's names in place of transformers'. Rules are for names of weights, which end with the weight's."""
        named = {f"{fqn}.{DENSE_NAME}": layer for fqn, layer in self.planned.items()}
        mapped = hf_to_vllm_mapper.apply_dict(named)
        self.planned = {name.removesuffix(f".{DENSE_NAME}"): layer for name, layer in mapped.items()}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How vLLM computes a layer; None where vLLM decides, as for attention and embeddings."""
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parent, _, leaf = prefix.rpartition(".")
        stacked = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{name}".lstrip(".") for name in stacked]
        if found := self.planned.keys() & set(names):
            self.built |= found
            return LowRankLinear(names, self.planned, self.require_all)
        return DenseLinear(prefix, self.require_all) if isinstance(layer, LinearBase) else None

    def require_all(self) -> None:
        """ValueError if vLLM's model has no place for a planned layer; of use once the model is built."""
        if get_pp_group().world_size == 1:  # else others build the rest
            require_built(self.planned, self.built)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Names that the files have too many: none. Most models ask once they are built, before they read any."""
        self.require_all()
        return WeightsMapper()
