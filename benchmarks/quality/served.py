"""How fast a CPU runs a compressed model: in float32, and in the int8 products that PyTorch has for it.

On an AMD EPYC with AVX512-VNNI, 1 thread, all-MiniLM-L6-v2, 16 texts of 64 tokens: 305 ms in float32, 96 ms with
PyTorch's dynamic quantization, 272 ms with torchao's Int8DynamicActivationInt8WeightConfig in eager mode.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import shrank
from benchmarks.speed.turns import in_turns
from shrank.layers.quantized import is_quantized
from shrank.model.dense import plain_twin

ROUNDS = 7


@dataclass(frozen=True)
class Work:
    """One call of a model, and how much of what it does: 1024 tokens, say."""

    call: Callable[[nn.Module], object]
    count: int
    unit: str


def in_floats(model: nn.Module) -> nn.Module:
    """A copy in float32 whose weights of few bits are plain numbers; low-rank layers stay low-rank."""
    with torch.no_grad():
        copied = copy.deepcopy(model)
        for parent in list(copied.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and is_quantized(child.weight):
                    parent.register_module(name, plain_twin(child).train(child.training))
        return copied.float()


def in_int8(model: nn.Module) -> nn.Module | None:
    """A copy of a model in float32 whose linear layers, stages of low-rank ones among them, multiply rows of 8 bits,
    which are found at every call, by weights of 8 bits; None for one of convolutions, for which PyTorch has no such."""
    copied = shrank.unpivot(copy.deepcopy(model))
    if any(isinstance(module, nn.Conv2d | nn.Conv3d) for module in copied.modules()):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and the fastest here
        return torch.ao.quantization.quantize_dynamic(copied, {nn.Linear}, torch.qint8)


class Served:
    """What models do in a second beside the dense one, timed in turns."""

    def __init__(self, dense: nn.Module, work: Work) -> None:
        self.work, self.dense = work, _forms(dense)

    def figures(self, model: nn.Module | None) -> dict[str, float]:
        """Of the dense model without one."""
        if model is None:
            forms, seconds = self.dense, self._timed(self.dense)
        else:
            forms = _forms(model)
            seconds = self._timed(forms | {f"dense {kind}": each for kind, each in self.dense.items()})
        found = {}
        for kind in forms:
            found[f"{self.work.unit}/s, {kind}"] = round(self.work.count / seconds[kind], 2)
            found[f"times dense, {kind}"] = round(seconds.get(f"dense {kind}", seconds[kind]) / seconds[kind], 3)
        return found

    @torch.inference_mode()
    def _timed(self, models: dict[str, nn.Module]) -> dict[str, float]:
        return in_turns({name: lambda m=each: self.work.call(m) for name, each in models.items()}, ROUNDS)


def _forms(model: nn.Module) -> dict[str, nn.Module]:
    """In float32 and, where there is such a form, in int8."""
    found = {"fp32": in_floats(model)}
    found["int8"] = in_int8(found["fp32"])
    return {kind: each for kind, each in found.items() if each is not None}
