"""Subclasses of supported layers that only cast: treated as their base once the user says so and the outputs agree.

openai-whisper's Linear and Conv1d cast their weights to the input's dtype, Falcon's adds the bias in a step of its own.
Nothing tells these from a subclass that does something else, so nothing is assumed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..layers.plain import LAYERS, TRUSTED

_trusted: set[type] = set()
_TOKENS = 4


def treat_as_base(*classes: type) -> None:
    """Take these subclasses of nn.Linear and nn.Conv1d/2d/3d for their base from now on, in this process.

    A layer is believed only if its outputs on random inputs are those of the base with the same weights; else it stays
    dense, and the plan says by how much they differ. Its twin keeps the class in both stages, so that it casts as the
    layer did, and runs as two PyTorch calls.

    Args:
        *classes: Classes such as whisper.model.Linear; `subclasses_in(model)` finds those of a model.

    Raises:
        TypeError: One is no such subclass.
    """
    for kind in classes:
        if not isinstance(kind, type) or base_of(kind) in (None, kind):
            wanted = ", ".join(c.__name__ for c in LAYERS)
            raise TypeError(f"{kind!r} is no subclass of {wanted}")
    _trusted.update(classes)


def base_of(kind: type) -> type | None:
    """The supported class that this one is or descends from."""
    return next((c for c in kind.__mro__ if c in LAYERS), None)


def subclasses_in(model: nn.Module) -> list[type]:
    """The classes of a model's layers that `treat_as_base` takes, in the order of their first layers."""
    kinds = dict.fromkeys(type(m) for m in model.modules() if not parametrize.is_parametrized(m))
    return [kind for kind in kinds if base_of(kind) not in (None, kind)]


def is_trusted(kind: type) -> bool:
    """Whether `treat_as_base` was called for this class."""
    return kind in _trusted


@torch.no_grad()
def disagreement(module: nn.Module) -> str:
    """What keeps a layer of a subclass from being its base; '' if their outputs agree."""
    base, weight = base_of(type(module)), module.weight
    x = _inputs(module, base)
    try:
        own, expected = module.forward(x), _as_base(module, base, x)
        stage = as_subclass(_bare(module, base), module).forward(x)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # of a forward that wants something else
        return f"its forward fails on a plain input: {error}"
    if (bias := module.bias) is not None:
        stage = stage + (bias if base is nn.Linear else bias.view(-1, *[1] * len(module.kernel_size)))
    for found in (own, stage):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return f"its output is {getattr(found, 'shape', type(found).__name__)}, wanted {tuple(expected.shape)}"
        error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
        if not error <= 16 * torch.finfo(weight.dtype).eps:
            return f"its outputs differ from those of {base.__name__} with the same weights by {error:.2g}"
    return ""


def as_subclass(made: nn.Module, like: nn.Module) -> nn.Module:
    """A plain layer as one of the class of `like`, with its attributes; itself where that is plain as well."""
    kind = type(like)
    if base_of(kind) in (None, kind) or type(made) is kind:
        return made
    for name, value in vars(like).items():
        if name not in vars(made):
            vars(made)[name] = value
    made.__class__ = kind
    vars(made)[TRUSTED] = True
    return made


def _inputs(module: nn.Module, base: type) -> Tensor:
    weight = module.weight
    drawn = torch.Generator().manual_seed(0)
    if base is nn.Linear:
        shape = (_TOKENS, module.in_features)
    else:
        sizes = (d * (k - 1) + _TOKENS for k, d in zip(module.kernel_size, module.dilation, strict=True))
        shape = (1, module.in_channels, *sizes)
    return torch.randn(shape, generator=drawn).to(weight.device, weight.dtype)


def _as_base(module: nn.Module, base: type, x: Tensor) -> Tensor:
    if base is nn.Linear:
        return F.linear(x, module.weight, module.bias)
    return base._conv_forward(module, x, module.weight, module.bias)


def _bare(module: nn.Module, base: type) -> nn.Module:
    """A layer of the base with these weights and no bias, as a first stage is."""
    weight, meta = nn.Parameter(module.weight.detach(), False), {"device": "meta"}
    if base is nn.Linear:
        bare = nn.Linear(module.in_features, module.out_features, bias=False, **meta)
    else:
        bare = base(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            False,
            module.padding_mode,
            **meta,
        )
    bare.weight = weight
    return bare.train(module.training)
