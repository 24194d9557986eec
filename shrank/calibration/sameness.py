"""Whether processes that work together were given the same."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..util import nested
from ..util.processes import current
from .batches import Batch

_LOOKED_AT = 1 << 12  # numbers of a parameter: those of another model differ in the first already


def agree_on(model: nn.Module, batches: Iterable[Batch] = ()) -> None:
    """ValueError where the `current` processes have other weights, or other data."""
    here = current()
    if here.size > 1:
        here.agree("the model", {name: _glance(p, _LOOKED_AT) for name, p in model.named_parameters()})
        here.agree("the data", [[_glance(t) for t in nested.tensors((b.args, b.kwargs))] for b in batches])


def _glance(tensor: Tensor, numbers: int | None = None) -> tuple:
    elsewhere = tensor.is_meta or hasattr(tensor, "full_tensor")  # put away, or split between processes
    seen = None if elsewhere else tensor.detach().flatten()[:numbers].double().sum().item()
    return tuple(tensor.shape), str(tensor.dtype), seen
