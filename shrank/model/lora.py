"""LoRA of peft on low-rank layers, under the names that they had when they were dense.

peft looks for nn.Linear. The adapter of a low-rank layer is the same two matrices beside it, so that files of adapters
fit dense and compressed models alike. Merging one is exact: its rank is added to that of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from wrapt import wrap_function_wrapper

from ..layers.ced import CED
from ..layers.corrected import CorrectedLinear
from ..layers.led import LED, LEDConv1D
from ..layers.two_stage import merged_bias
from ..linalg import Factors, PivotedFactors, unpivoted

_KNOWN = (LED, CorrectedLinear)


class LowRankLinear(Linear):
    """peft's LoRA layer around a LED or a CorrectedLinear."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if not isinstance(base, _KNOWN):  # it was merged to a dense layer meanwhile
            super().merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if other := [name for name in names if name in self.lora_variant or self.lora_bias[name]]:
            raise ValueError(
                f"adapters {', '.join(other)}: only plain LoRA has a rank to add to that of a low-rank "
                "layer; shrank.merge makes the layers dense, into which any adapter can be merged"
            )
        for name in names:
            down = self.lora_A[name].weight.detach()
            up = self.lora_B[name].weight.detach() * self.scaling[name]
            if safe_merge and not bool(down.isfinite().all() and up.isfinite().all()):
                raise ValueError(f"the adapter {name} holds NaN or infinity")
            vars(self).setdefault("_stages_before", []).append(base.stages)
            add_rank(base, down, up)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        base = self.get_base_layer()
        if not isinstance(base, _KNOWN):
            super().unmerge()
            return
        while self.merged_adapters:
            self.merged_adapters.pop()
            base._modules[base.unit] = self._stages_before.pop()


@torch.no_grad()
def add_rank(layer: LED | CorrectedLinear, down: Tensor, up: Tensor) -> None:
    """Add up @ down, (N, r) and (r, K), to what the layer multiplies by. Its rank grows by r, pivots become plain."""
    found = layer.factors()
    found = unpivoted(found) if isinstance(found, PivotedFactors) else found
    like = found.down
    downs, ups = torch.cat((found.down, down[None].to(like)), 1), torch.cat((found.up, up[None].to(like)), 2)
    grown, bias = Factors(downs, ups, 0.0, 1.0), merged_bias(layer.stages)
    made = LED(layer.in_features, layer.out_features, grown.rank, bias is not None, device="meta", dtype=like.dtype)
    made.take(grown, None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad))
    made.requires_grad_(any(p.requires_grad for p in layer.parameters()))
    layer._modules[layer.unit] = made.stages.train(layer.training)


@partial(wrap_function_wrapper, lora_model, "dispatch_default")
def _dispatch(dispatch: Callable, _: object, args: tuple, kwargs: dict) -> nn.Module | None:
    """peft's choice of a LoRA layer, for low-rank ones too."""
    module = args[0] if args else kwargs["target"]
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, CED):
        raise ValueError(
            f"LoRA knows no low-rank convolution {base}: target its stages, as NAME.{base.unit}.1, or "
            "'all-linear' for the linear ones"
        )
    if not isinstance(base, _KNOWN) or kwargs.get("parameter_name"):
        return dispatch(*args, **kwargs)
    config = kwargs["config"] if "config" in kwargs else args[2]
    config.fan_in_fan_out = isinstance(base, LEDConv1D)
    given = {name: value for name, value in kwargs.items() if name not in ("target", "adapter_name", "parameter_name")}
    return LowRankLinear(*args[:2], **({"config": config} | given))
