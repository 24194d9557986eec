"""The one walk over a model and the only place that changes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from ..layers.ced import CED
from ..layers.led import LED
from .adapters import LOW_RANK, is_lazy, target
from .references import references

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
# Of peft, what holds a whole model and not an adapter.
_PEFT_MODELS = {"PeftModel", "PeftMixedModel", "BaseTuner"}
_SAVED_FAST_PATH = "_shrank_fast_path"
# What the replaced and the replacing classes set themselves, and accelerate's wrapping; all else is the user's.
_OWN_ATTRIBUTES = {"nx", "nf", "forward", "_hf_hook", "_old_forward"}.union(
    *(
        vars(kind(*sizes, device="meta"))
        for kind, sizes in ((nn.Linear, (1, 1)), (nn.Conv1d, (1, 1, 1)), (LED, (1, 1, 1)), (CED, (1, 1, 1, (1,))))
    )
)


@dataclass
class Site:
    """One module of a model: its first dotted name, a setter for every place that holds it, and why its surroundings
    forbid a change."""

    fqn: str
    module: nn.Module
    places: list[Callable[[nn.Module], None]] = field(default_factory=list)
    why_not: list[str] = field(default_factory=list)


def walk(model: nn.Module, inside_low_rank: bool = False) -> list[Site]:
    """Every module that owns a weight matrix, once, in the model's order; low-rank layers count as one module unless
    `inside_low_rank`, which opens them."""
    sites: dict[int, Site] = {}
    tied = _tied(model)
    for fqn, module, holder, inside in _descend(model, inside_low_rank):
        site = sites.get(id(module))
        if site is None:
            if not (is_unit(module) or _owns_matrix(module)):
                continue
            site = sites[id(module)] = Site(fqn, module)
            if others := tied.get(id(module)):
                site.why_not.append(f"its parameters are tied to {', '.join(sorted(others))}")
        site.why_not += [reason for reason in inside if reason not in site.why_not]
        if holder is not None:
            site.places.append(partial(setattr, *holder))
    for held, place in references(model):
        if (site := sites.get(id(held))) is None:
            continue
        if place.put is None:
            site.why_not.append(f"forward may call it from {place.where}, where nothing can be put in its place")
        else:
            site.places.append(place.put)
    return list(sites.values())


def replace(model: nn.Module, site: Site, new: nn.Module) -> nn.Module:
    """Put `new` wherever `site.module` is, with its flags, hooks and attributes; returns the (perhaps new) root."""
    carry_over(site.module, new)
    for put in site.places:
        put(new)
    return new if site.module is model else model


def finish(model: nn.Module, **attributes: object) -> nn.Module:
    """After the last replacement: note attributes on the root and set the fast paths right."""
    for name, value in attributes.items():
        setattr(model, name, value)
    for module in model.modules():
        if type(module) in _FAST_PATHS:
            _set_fast_path(module, enabled=not any(isinstance(m, LOW_RANK) for m in module.modules()))
    return model


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Training mode, requires_grad, hooks and plain attributes of `old`, for a module built from scratch."""
    new.train(old.training)
    trainable = {name: p.requires_grad for name, p in _leaf_parameters(old)}
    for name, parameter in _leaf_parameters(new):
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


def _descend(model: nn.Module, inside_low_rank: bool) -> Iterator[tuple[str, nn.Module, tuple | None, tuple[str, ...]]]:
    """(fqn, module, (parent, name) or None for the root, reasons of the surroundings), every path to every module."""
    stack, opened = [("", model, None, ())], set()
    while stack:
        fqn, module, holder, inside = stack.pop()
        yield fqn, module, holder, inside
        closed = is_unit(module) and not (inside_low_rank and isinstance(module, LOW_RANK))
        if closed or (id(module), inside) in opened:
            continue
        opened.add((id(module), inside))  # again where it is shared into other surroundings
        if reason := _why_not_inside(module):
            inside = (*inside, reason)
        children = [
            (f"{fqn}.{name}" if fqn else name, child, (module, name), inside)
            for name, child in module._modules.items()
            if child is not None
        ]
        stack.extend(reversed(children))


def _why_not_inside(module: nn.Module) -> str:
    """What forbids changes to everything below a module; '' if nothing does."""
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads the weights of its children instead of calling them"
    ancestors = type(module).__mro__
    if any(c.__module__.startswith("peft.") for c in ancestors) and not {c.__name__ for c in ancestors} & _PEFT_MODELS:
        return "it belongs to an adapter of peft: merge that first (merge_and_unload), or compress before adding it"
    return ""


def _owns_matrix(module: nn.Module) -> bool:
    if target(module) is not None or callable(getattr(module, "weight", None)):  # a method where it is quantized
        return True
    return any(p is not None and (is_lazy(p) or p.dim() >= 2) for p in module._parameters.values())


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers in these parameters; those that are not initialised yet have none."""
    return sum(p.numel() for p in parameters if not is_lazy(p))


def is_unit(module: nn.Module) -> bool:
    """Whether the parameters below a module are one weight in parts: low-rank or parametrized layers."""
    return isinstance(module, LOW_RANK) or nn.utils.parametrize.is_parametrized(module)


def _tied(model: nn.Module) -> dict[int, set[str]]:
    """id of a module -> names of the parameters of other modules that overlap its weight in memory."""
    owned = [
        (id(module), f"{fqn}.{name}".lstrip("."), p)
        for fqn, module in model.named_modules()
        for name, p in module._parameters.items()
        if p is not None
    ]
    spans = sorted((str(p.device), *_span(p), owner, name) for owner, name, p in owned)
    tied: dict[int, set[str]] = defaultdict(set)
    for i, (device, _, end, owner, name) in enumerate(spans):
        for other_device, start, _, other_owner, other_name in spans[i + 1 :]:
            if device != other_device or start >= end:
                break
            if owner != other_owner:
                tied[owner].add(other_name)
                tied[other_owner].add(name)
    return tied


def _span(parameter: Tensor) -> tuple[int, int]:
    """A unique range of addresses for its memory; tensors without memory of their own are known by identity."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
        return -id(parameter), -id(parameter) + 1
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.data_ptr(), parameter.data_ptr() + (last + 1) * parameter.itemsize


def _set_fast_path(module: nn.Module, enabled: bool) -> None:
    attribute, off = _FAST_PATHS[type(module)]
    if enabled and hasattr(module, _SAVED_FAST_PATH):
        setattr(module, attribute, getattr(module, _SAVED_FAST_PATH))
        delattr(module, _SAVED_FAST_PATH)
    elif not enabled and not hasattr(module, _SAVED_FAST_PATH):
        setattr(module, _SAVED_FAST_PATH, getattr(module, attribute))
        setattr(module, attribute, off)
