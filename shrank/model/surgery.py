"""The only place that changes a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..layers.ced import CED
from ..layers.led import LED
from ..layers.quantized import is_quantized
from . import notes
from .adapters import LOW_RANK
from .survey import Site, Survey

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
# PyTorch's fused inference paths read linear1.weight and linear2.weight instead of calling the layers.
_FAST_PATHS = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_ON_GRID = ("values", "scales")  # of a weight that is being read
_SAVED_FAST_PATH = "_shrank_fast_path"
# What the replaced and the replacing classes set themselves, and accelerate's wrapping; all else is the user's.
_OWN_ATTRIBUTES = {"nx", "nf", "forward", "_hf_hook", "_old_forward"}.union(
    *(
        vars(kind(*sizes, device="meta"))
        for kind, sizes in ((nn.Linear, (1, 1)), (nn.Conv1d, (1, 1, 1)), (LED, (1, 1, 1)), (CED, (1, 1, 1, (1,))))
    )
)


def replace(survey: Survey, site: Site, new: nn.Module) -> None:
    """Put `new` wherever the site's module is, with its flags, hooks and attributes."""
    carry_over(site.module, new)
    put_in_place(survey, site, new)


def put_in_place(survey: Survey, site: Site, new: nn.Module) -> None:
    """Put `new` as it is wherever the site's module is."""
    for put in site.places:
        put(new)
    if site.module is survey.model:
        survey.model = new
    site.module = new


def wrap(survey: Survey, site: Site, new: nn.Module) -> None:
    """Put `new` wherever the site's module is, which goes on in it without its hooks: these are `new`'s now, and all
    parameters train that did."""
    old = site.module
    _with_flags_kept(survey, site, new)
    fresh = vars(nn.Module())
    vars(old).update({name: fresh[name] for name in _HOOKS})


def unwrap(survey: Survey, site: Site, inner: nn.Module) -> None:
    """Put a part of the site's module wherever that is, as it is, with the hooks of the whole."""
    _with_flags_kept(survey, site, inner)


def _with_flags_kept(survey: Survey, site: Site, new: nn.Module) -> None:
    """As `replace`; parameters train that did."""
    flags = {parameter: parameter.requires_grad for parameter in new.parameters()}
    replace(survey, site, new)
    for parameter, flag in flags.items():
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def reshape(module: nn.Module, attributes: dict[str, object]) -> None:
    """Give a layer parameters of another size, and what says it: it stays the module that hooks and others know."""
    for name, value in attributes.items():
        setattr(module, name, value)


def resized(module: nn.Module, attributes: dict[str, object]) -> nn.Module:
    """A layer like this one but for these attributes; this one stays as it is."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    reshape(made, attributes)
    return made


@contextmanager
def reshaped(changes: Iterable[tuple[nn.Module, dict[str, object]]]) -> Iterator[None]:
    """As `reshape`, of several layers, for as long as the context lasts."""
    before = []
    try:
        for module, attributes in changes:
            before.append((module, {name: getattr(module, name) for name in attributes}))
            reshape(module, attributes)
        yield
    finally:
        for module, attributes in reversed(before):
            reshape(module, attributes)


def finish(survey: Survey, plan: object) -> nn.Module:
    """The (perhaps new) root after the last replacement, with a note of the plan and the fast paths set right."""
    notes.note(survey.model, notes.PLAN, plan)
    for module in survey.model.modules():
        if type(module) in _FAST_PATHS:
            _set_fast_path(module, enabled=not any(isinstance(m, LOW_RANK) for m in module.modules()))
    return survey.model


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Training mode, requires_grad, hooks and plain attributes of `old`, for a module built from scratch."""
    new.train(old.training)
    trainable = {name: p.requires_grad for name, p in _leaf_parameters(old)}
    for name, parameter in _leaf_parameters(new):
        if is_quantized(parameter) or name in _ON_GRID:
            continue  # which never trains
        if parameter.requires_grad != (wanted := trainable.get(name, True)):  # which an inference tensor may not change
            parameter.requires_grad_(wanted)
    for name in _HOOKS:
        if name in vars(old):
            vars(new)[name] = vars(old)[name]  # the same object, so that handles can still remove their hooks
    for name, value in vars(old).items():
        if name not in _OWN_ATTRIBUTES and not hasattr(new, name):
            setattr(new, name, value)
    if hasattr(old, "_hf_hook"):
        # accelerate wrapped the instance's forward to move its inputs: do the same to the new module.
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)


def _leaf_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(weight | bias, parameter) pairs; both factors of a low-rank layer count as its weight."""
    for name, parameter in module.named_parameters():
        yield name.rpartition(".")[2], parameter


def _set_fast_path(module: nn.Module, enabled: bool) -> None:
    attribute, off = _FAST_PATHS[type(module)]
    if enabled and hasattr(module, _SAVED_FAST_PATH):
        setattr(module, attribute, getattr(module, _SAVED_FAST_PATH))
        delattr(module, _SAVED_FAST_PATH)
    elif not enabled and not hasattr(module, _SAVED_FAST_PATH):
        setattr(module, _SAVED_FAST_PATH, getattr(module, attribute))
        setattr(module, attribute, off)
