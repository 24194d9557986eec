"""Whether a stage of a low-rank layer is what it was built as, or what another tool made of it.

LoRA, quantization, pruning and sharding all replace a stage or its parameters. Its forward is right then, its `weight`
need not be: whoever reads factors asks here first.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYERS = (nn.Linear, *CONVOLUTIONS.values())
# On a stage of a user's subclass, which was found to compute what its base does (targets.py).
TRUSTED = "_shrank_computes_as_base"
_WAYS_OUT = {
    "peft": "merge the adapter first (merge_and_unload), or unload it",
    "torchao": "only plain weights can be read: convert before quantizing",
    "bitsandbytes": "only plain weights can be read: convert before quantizing",
    "torch": "only plain weights can be read: convert before quantizing",
}


def why_no_matrix(stage: nn.Module) -> str:
    """What keeps `stage.weight` from being the matrix that the stage multiplies by; '' if it is that."""
    if parametrize.is_parametrized(stage) or type(stage) in LAYERS or hasattr(stage, "why_not_plain"):
        return ""  # a low-rank stage has a `weight` of its own
    if TRUSTED in vars(stage) and isinstance(stage, LAYERS):
        return ""
    kind = type(stage)
    package = kind.__module__.partition(".")[0]
    way_out = _WAYS_OUT.get(package, "put a plain layer there first")
    return f"is a {kind.__module__}.{kind.__qualname__}, whose weight is not all that it does: {way_out}"


def why_not_plain(stage: nn.Module) -> str:
    """What keeps the weight and bias of a stage from being all there is of it; '' if they are."""
    if inner := getattr(stage, "why_not_plain", None):
        return f"is a low-rank layer of which {reason}" if (reason := inner()) else ""
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
    weight = stage._parameters.get("weight")
    if weight is None:
        return "does not own its weight, as in a replica or a shard of the model: gather the parameters first"
    return why_not_plain_tensor(weight)


def why_not_plain_tensor(tensor: Tensor) -> str:
    """What keeps a tensor from being ordinary numbers; '' if it is."""
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter):
        return ""
    return f"has a weight that is a {kind.__module__}.{kind.__qualname__}, not plain numbers"


def why_not_quiet(stage: nn.Module) -> str:
    """What would be lost with the module itself: hooks and patches that may change what it computes."""
    hooks = [name for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
             if vars(stage)[name]]
    if hooks:
        return f"has {hooks[0].strip('_').replace('_', ' ')}, which would be lost: remove them first"
    if "forward" in vars(stage) and not hasattr(stage, "_hf_hook"):
        return "has a forward that was patched on the instance, which would be lost"
    return ""
