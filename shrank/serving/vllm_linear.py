"""vLLM's linear layers with low-rank parts: their parameters, how vLLM's loaders fill them, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import vllm.envs as envs
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ..layers.seal import DENSE_NAME
from ..planning.plan import LayerPlan
from .pieces import FACTORS, Piece, run
from .shares import WAY_OUT, Slice, shares

# In the order in which a layer is asked for: each is a kind of those behind it, or of none.
_KINDS = (QKVParallelLinear, MergedColumnParallelLinear, ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
_QKV = {"q": 0, "k": 1, "v": 2}  # what vLLM's loaders call the parts
_FUSED_QKV = "qkv_proj"  # other models that publish one layer for all three mix the heads of its outputs
_FILLED_BY_NAME = ("dummy", "sharded_state", "tensorizer", "runai_streamer_sharded")  # formats that use no loader


class LowRankLinear(LinearMethodBase):
    """How vLLM computes a layer of which some parts are low-rank.

    names: the layers of the model that vLLM stacks here. check: raises, once the model is built, if it lacks layers.
    """

    def __init__(self, names: Sequence[str], planned: Mapping[str, LayerPlan], check: Callable[[], None]) -> None:
        self.names, self.planned, self.check = names, planned, check

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Give the layer its pieces, and a parameter for every name in files, without data, whose loader fills them."""
        if envs.VLLM_BATCH_INVARIANT:
            raise ValueError(f"VLLM_BATCH_INVARIANT: results of low-rank kernels depend on the batch; {WAY_OUT}")
        load_config = get_current_vllm_config().load_config
        self.reads_files = load_config.load_format not in _FILLED_BY_NAME
        rows, columns = _slices(layer, self.names, output_partition_sizes, input_size_per_partition)
        found = shares(self.names, self.planned, rows, columns)
        layer.pieces = nn.ModuleList(Piece(share, params_dtype, layer.has_bias) for share in found)
        # Files have a seal, which is of bytes, in place of a dense weight. LoRA takes the dtype of a head from its own.
        is_sealed = not isinstance(layer, ParallelLMHead) and all(share.rank is not None for share in found)
        _register_names(layer, _loader(layer), params_dtype, FACTORS)
        _register_names(layer, _loader(layer), torch.uint8 if is_sealed else params_dtype, [DENSE_NAME])
        layer.sealed_loader = layer.weight.weight_loader

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """ValueError on what went past the pieces: vLLM does not ask whether all of a quantized model was read."""
        self.check()
        if layer.weight.weight_loader is not layer.sealed_loader:
            raise ValueError(
                f"{self.names[0]}: its model gave it a loader of its own, which knows no factors; {WAY_OUT}"
            )
        missing = [name for piece in layer.pieces for name in piece.missing]
        if missing and self.reads_files:
            raise ValueError(f"the checkpoint lacks weights that its plan asks for: {', '.join(missing[:5])}")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return run(layer.pieces, x, bias)

    def dequantize_weight(self, layer: nn.Module) -> Tensor:
        """The dense weight of this process: (outputs, inputs)."""
        return torch.cat([piece.dense_weight() for piece in layer.pieces])

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """A head that became low-rank is tied to nothing."""
        return layer


@register_weight_loader_v2_supported_method
class DenseLinear(UnquantizedLinearMethod):
    """A layer that the plan leaves dense: vLLM's own, which says so where files hold factors of it."""

    def __init__(self, fqn: str, check: Callable[[], None]) -> None:
        super().__init__()
        self.fqn, self.check = fqn, check

    def create_weights(self, layer: nn.Module, *sizes: object, **attributes: object) -> None:
        super().create_weights(layer, *sizes, **attributes)

        def refuse(*_: object) -> None:
            raise ValueError(f"{self.fqn}: the files hold factors of this layer, which the plan lacks")

        _register_names(layer, lambda _: refuse, layer.weight.dtype, FACTORS)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.check()
        super().process_weights_after_loading(layer)


def _slices(layer: nn.Module, names: Sequence[str], outputs: Sequence[int], inputs: int) -> tuple[list[Slice], Slice]:
    """The rows of each part of vLLM's layer that this process holds, and its columns."""
    if isinstance(layer, ParallelLMHead):
        held = layer.shard_indices
        if held.num_added_elements_padded or layer.num_added_embeddings:
            raise ValueError(f"{names[0]}: a low-rank head cannot have words added; {WAY_OUT}")
        count = held.num_org_elements
        rows = Slice(
            held.org_vocab_start_index, count, layer.org_vocab_size, layer.num_embeddings_per_partition - count
        )
        return [rows], Slice.of(inputs)
    kind = next((kind for kind in _KINDS if isinstance(layer, kind)), None)
    if kind is None or type(layer).weight_loader is not kind.weight_loader:
        raise ValueError(f"{names[0]}: vLLM's {type(layer).__name__} splits its weights in a way of its own; {WAY_OUT}")
    if kind is QKVParallelLinear and len(names) == 1 and not names[0].endswith(_FUSED_QKV):
        raise ValueError(f"{names[0]}: vLLM sorts the outputs of this layer, which its factors would miss; {WAY_OUT}")
    if kind is RowParallelLinear:
        return [Slice.of(*outputs)], Slice.of(inputs, layer.tp_rank, layer.tp_size)
    if kind is ReplicatedLinear:
        return [Slice.of(count) for count in outputs], Slice.of(inputs)
    replicas = [1, *[layer.num_kv_head_replicas] * 2] if kind is QKVParallelLinear else [1] * len(outputs)
    rows = [
        Slice.of(count, layer.tp_rank // each, layer.tp_size // each)
        for count, each in zip(outputs, replicas, strict=True)
    ]
    return rows, Slice.of(inputs)


def _loader(layer: nn.Module) -> Callable[[str], Callable]:
    """From a name in files to a loader of vLLM's, which hands that tensor of one part to its piece."""

    def loader(name: str) -> Callable:
        def load(_: nn.Parameter, loaded: Tensor, shard_id: str | int | tuple[int, ...] | None = None) -> None:
            number = _number_of(layer.pieces, shard_id)
            bias = layer.pieces[number].take(name, loaded)
            if bias is not None:
                start = sum(piece.share.outputs for piece in layer.pieces[:number])
                layer.bias.data[start : start + len(bias)].copy_(bias)

        return load

    return loader


def _number_of(pieces: Sequence[Piece], shard_id: str | int | tuple[int, ...] | None) -> int:
    """Which piece a loader of vLLM means: it counts parts, or calls them q, k and v."""
    first = shard_id[0] if isinstance(shard_id, tuple) else _QKV.get(shard_id, shard_id)
    starts = [sum(len(piece.share.rows) for piece in pieces[:n]) for n in range(len(pieces))]
    if first is None and len(pieces) == 1:
        return 0
    if first not in starts:
        names = ", ".join(piece.share.fqn for piece in pieces)
        raise ValueError(f"vLLM loads part {shard_id!r} of {names}, where no layer begins; {WAY_OUT}")
    return starts.index(first)


def _register_names(
    layer: nn.Module, loader: Callable[[str], Callable], dtype: torch.dtype, names: Sequence[str]
) -> None:
    """A parameter without numbers for each of these names; LoRA reads the device of `weight`."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = layer
        for step in path.split(".") if path else ():
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner._modules[step]
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = loader(name)
        owner.register_parameter(leaf, parameter)
