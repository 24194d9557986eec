"""Corrections as an adapter of peft, which servers add to the quantized model that they correct."""

from __future__ import annotations

import json
import os
import re

import torch
from torch import Tensor, nn

from ..layers.corrected import CorrectedLinear
from ..layers.plain import why_no_matrix
from ..util import tensor_file
from ..util.files import replacing

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every name in a file of peft


@torch.no_grad()
def export_lora(
    model: nn.Module, folder: str | os.PathLike, *, base: str | os.PathLike | None = None, one_rank: bool = False
) -> None:
    """Write the corrections of a model as a LoRA adapter of peft, for the quantized model without them.

    `peft.PeftModel.from_pretrained` adds it to that, and so do servers that take LoRA: y = base(x) + up @ down @ x.

    Args:
        model: A model with corrected layers, which stays as it is.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go; it is replaced whole or not at all.
        base: The name or folder of the quantized model, which the adapter will say that it is for.
        one_rank: Fill all factors up with zeros to the largest rank: for llama.cpp, which scales each layer by its own.

    Raises:
        ValueError: No layer is corrected, the model itself is one, or another tool changed a factor.
    """
    layers = {fqn: m for fqn, m in model.named_modules() if isinstance(m, CorrectedLinear)}
    if not layers:
        raise ValueError("no layer is corrected: there is no adapter to write")
    if "" in layers:
        raise ValueError("the model itself is a corrected layer, and adapters are of layers with a name")
    for fqn, layer in layers.items():
        if reason := next((r for stage in layer.stages if (r := why_no_matrix(stage))), ""):
            raise ValueError(f"{fqn}: a factor of it {reason}")
    ranks = {fqn: layer.rank for fqn, layer in layers.items()}
    most = max(ranks.values())
    tensors = {}
    for fqn, layer in layers.items():
        down, up = layer.down.detach(), layer.up.detach()
        if one_rank:
            missing = most - ranks[fqn]
            down, up = nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))
        tensors |= {f"{_PREFIX}{fqn}.lora_A.weight": _owned(down), f"{_PREFIX}{fqn}.lora_B.weight": _owned(up)}
    config = _config(dict.fromkeys(ranks, most) if one_rank else ranks, None if base is None else os.fspath(base))
    with replacing(folder) as temporary:
        temporary.mkdir()
        tensor_file.write(temporary / _WEIGHTS, tensors, {"format": "pt"})
        (temporary / _CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _config(ranks: dict[str, int], base: str | None) -> dict:
    """What peft calls `LoraConfig`: alpha is the rank of every layer, so that nothing is scaled.

    `r` is the largest: servers make room for that, and scale by alpha / r alone.
    """
    most = max(ranks.values())
    others = {f"^{re.escape(fqn)}": rank for fqn, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _owned(tensor: Tensor) -> Tensor:
    """As files take it: contiguous, with memory of its own."""
    return tensor.contiguous().clone()
