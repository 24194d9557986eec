"""The dense weight of a low-rank layer, multiplied out only when somebody uses it.

Model code reads `layer.weight` for its dtype, device or shape (T5, Mamba, MobileNet, Whisper) far more often than for
its values. A tensor subclass answers the former for free and turns into the product for the latter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

# Read-only attributes that the wrapper answers itself.
_METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        "dtype",
        "device",
        "shape",
        "ndim",
        "layout",
        "requires_grad",
        "is_cuda",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_leaf",
        "is_nested",
        "is_cpu",
        "itemsize",
        "nbytes",
        "grad",
    )
} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.ndimension,
    Tensor.__len__,
}
_DETACH = {Tensor.detach, Tensor.data.__get__}
# New values as a whole.
_ASSIGNMENTS = {Tensor.data.__set__, Tensor.copy_}
# In-place products with a number, which one factor can take over.
_SCALINGS = {Tensor.mul_, Tensor.div_, Tensor.__imul__, Tensor.__itruediv__}
_DUNDER_WRITES = {"__set__", "__setitem__"} | {
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
}


class MergedWeight(Tensor):
    """Looks like a dense parameter; any arithmetic on it uses what `merge` makes of the factors, with their gradients.

    `like` is one of the factors: it lends dtype, device and flags, and takes over in-place products with a number.
    Giving it new values as a whole (`data = `, `copy_`) assigns to the attribute `name` of the layer.
    """

    @staticmethod
    def __new__(
        cls, shape: torch.Size, like: Tensor, merge: Callable[[], Tensor], owner: nn.Module, name: str
    ) -> MergedWeight:
        return Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )

    def __init__(
        self, shape: torch.Size, like: Tensor, merge: Callable[[], Tensor], owner: nn.Module, name: str
    ) -> None:
        # Flags that libraries leave on parameters, such as transformers' "is initialised", hold for the product too.
        vars(self).update(vars(like))
        self._factor, self._merge, self._owner, self._name = like, merge, owner, name

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        target = next(iter((*args, *kwargs.values())), None)
        if func in _DETACH:
            return cls(
                target.shape, target._factor.detach(), lambda: target._merge().detach(), target._owner, target._name
            )
        if func in _ASSIGNMENTS and isinstance(target, cls):
            return target._assign(*args[1:], **kwargs)
        if func in _SCALINGS and _is_scaling(target, args[1:], kwargs):
            func(target._factor.data, *args[1:], **kwargs)  # RWKV rescales its layers so
            return target
        written = tree_leaves((target if _writes(func) else None, kwargs.get("out")))
        if hidden := [x for x in written if isinstance(x, cls)]:
            raise RuntimeError(hidden[0]._refusal())
        args, kwargs = tree_map(lambda x: x._product() if isinstance(x, cls) else x, (args, kwargs))
        return func(*args, **kwargs)

    # Wrapper subclasses must have one; it is reached only by code that switches __torch_function__ off.
    __torch_dispatch__ = __torch_function__

    def _assign(self, values: Tensor, *_: object) -> MergedWeight:
        values = values._merge() if isinstance(values, MergedWeight) else values
        values = values.detach().to(self.device, self.dtype).broadcast_to(self.shape)
        self._owner.assign(self._name, nn.Parameter(values, self.requires_grad))
        return self

    def _refusal(self) -> str:
        owner = type(self._owner).__name__
        return (
            f"{owner}.{self._name} is computed from its factors and cannot be changed in place: write to "
            f"{owner}.down and {owner}.up, assign to {owner}.{self._name}, or merge the model first"
        )

    def _product(self) -> Tensor:
        if self._name == "weight":
            warnings.warn(
                f"the dense weight of a {type(self._owner).__name__} was multiplied out; if the model's forward does "
                "this at every call, the layer gains nothing: leave it dense with exclude=",
                stacklevel=7,
            )
        return self._merge()

    def __repr__(self, *, tensor_contents=None) -> str:
        return (
            f"MergedWeight({tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"of={type(self._owner).__name__})"
        )


def merged(like: Tensor, shape: tuple[int, ...], merge: Callable[[], Tensor], owner: nn.Module, name: str) -> Tensor:
    """The parameter `name` of the dense layer: a tensor of this shape that is `merge()` when used. Compilers and
    tracers get the product itself, which they drop where only its metadata is read."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return merge()
    return MergedWeight(torch.Size(shape), like, merge, owner, name)


def _writes(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _DUNDER_WRITES


def _is_scaling(target: object, arguments: tuple, kwargs: dict) -> bool:
    """Whether target *= number or target /= number is meant, of which rounding makes something else."""
    values = (*arguments, *kwargs.values())
    return (
        isinstance(target, MergedWeight)
        and target._name == "weight"
        and target._owner.scales_with_a_factor
        and "rounding_mode" not in kwargs
        and not any(isinstance(x, Tensor) for x in values)
    )
