"""Whether a stage of a low-rank layer is what it was built as, or what another tool made of it.

LoRA, quantization, pruning and sharding all replace a stage or its parameters. Its forward is right then, its `weight`
need not be: whoever reads factors asks here first.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .quantized import is_quantized

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYERS = (nn.Linear, *CONVOLUTIONS.values())
# On a stage of a user's subclass, which was found to compute what its base does (model/subclasses.py).
TRUSTED = "_shrank_computes_as_base"
_QUANTIZED = "only plain weights can be read: do this before quantizing"
_WAYS_OUT = {
    "peft.": "merge the adapter first (merge_and_unload), or unload it",
    "torchao.": _QUANTIZED,
    "torch.ao.": _QUANTIZED,
    "bitsandbytes.": _QUANTIZED,
}


def why_no_matrix(stage: nn.Module) -> str:
    """What keeps `stage.weight` from being the matrix that the stage multiplies by; '' if it is that."""
    if parametrize.is_parametrized(stage) or type(stage) in LAYERS or hasattr(stage, "why_not_plain"):
        return ""  # a low-rank stage has a `weight` of its own
    if TRUSTED in vars(stage) and isinstance(stage, LAYERS):
        return ""
    kind = type(stage)
    ways_out = (way for package, way in _WAYS_OUT.items() if kind.__module__.startswith(package))
    way_out = next(ways_out, "put a plain layer there first")
    return f"is a {kind.__module__}.{kind.__qualname__}, whose weight is not all that it does: {way_out}"


def why_not_plain(stage: nn.Module, sharded: bool = False) -> str:
    """What keeps the weight and bias of a stage from being all there is of it; '' if they are.

    sharded: parameters that are held elsewhere meanwhile, or in parts, will do, since somebody gathers them.
    """
    if inner := getattr(stage, "why_not_plain", None):
        return f"is a low-rank layer of which {reason}" if (reason := inner(sharded)) else ""
    if parametrize.is_parametrized(stage):
        names = ", ".join(stage.parametrizations)
        return f"has a parametrized {names}: remove_parametrizations first"
    if reason := why_no_matrix(stage):
        return reason
    if "weight_orig" in stage._parameters:
        return "is pruned or normalised by hooks of torch.nn.utils: make that permanent first (prune.remove)"
    extra = [name for name, _ in stage.named_parameters() if name not in ("weight", "bias")]
    if extra := extra + [name for name, _ in stage.named_buffers()]:
        return f"carries extra state: {', '.join(extra)}"
    weight = stage.weight if sharded else stage._parameters.get("weight")
    if weight is None:
        return "does not own its weight, as in a replica or a shard of the model: gather the parameters first"
    reason = "" if sharded and hasattr(weight, "full_tensor") else why_not_numbers(weight)
    return f"has a weight that {reason}" if reason else ""


def why_not_numbers(tensor: Tensor) -> str:
    """What keeps a tensor from being what its memory holds, or on a grid of ours; '' if it is that."""
    kind = type(tensor.detach())
    if kind is Tensor or is_quantized(tensor):
        return ""
    return f"is a {kind.__module__}.{kind.__qualname__}, not plain numbers"


def why_not_quiet(stage: nn.Module) -> str:
    """What would be lost with the module itself: hooks and patches that may change what it computes."""
    hooks = [
        name
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if vars(stage)[name]
    ]
    if hooks:
        return f"has {hooks[0].strip('_').replace('_', ' ')}, which would be lost: remove them first"
    if "forward" in vars(stage) and not hasattr(stage, "_hf_hook"):
        return "has a forward that was patched on the instance, which would be lost"
    return ""


def is_untouched(stage: nn.Module) -> bool:
    """Whether a module does nothing beside its forward: not hooked, not patched."""
    own = stage.__dict__
    return "forward" not in own and not (
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )
