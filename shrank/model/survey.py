"""One look at a model: every module that owns a weight matrix, what it is, and why it must not change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from ..layers.foreign import sizes_of
from ..linalg import Shape
from .adapters import LOW_RANK, Target, is_lazy, target
from .references import references
from .refusals import why_not

# Of peft, what holds a whole model and not an adapter.
_PEFT_MODELS = {"PeftModel", "PeftMixedModel", "BaseTuner"}


@dataclass(eq=False)
class Site:
    """One module of a model.

    Attributes:
        fqn: Its first dotted name.
        module: What is there now: `surgery.replace` puts another one here.
        inside: Whether it is a part of a low-rank layer.
        places: A setter for every place that holds it.
        surroundings: Why what surrounds it forbids a change.
    """

    fqn: str
    module: nn.Module
    inside: bool = False
    places: list[Callable[[nn.Module], None]] = field(default_factory=list)
    surroundings: list[str] = field(default_factory=list)

    @property
    def adapter(self) -> Target | None:
        """The module as what its type is; None if it is of none that can become low-rank."""
        return target(self.module)

    @property
    def shape(self) -> Shape | None:
        """The matrix that a low-rank twin would stand for; None where there is none, or none yet."""
        adapter = self.adapter
        return adapter.shape() if adapter and not is_lazy(self.module.weight) else None

    def why_not(self) -> list[str]:
        """Every reason for which the module cannot be replaced by a low-rank one."""
        return [*self.surroundings, *why_not(self.module)]


class Survey:
    """Every module of a model that owns a weight matrix, once, in the model's order, from one walk over it.

    `surgery` changes the model through it and keeps it right. A parametrized layer counts as one module. A low-rank
    layer counts as one, and its parts are known besides.

    Args:
        model: The root.

    Attributes:
        model: The root, which is another one after the root itself was replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._sites = _walk(model)

    def sites(self, inside_low_rank: bool = False) -> list[Site]:
        """All that are not part of a low-rank layer; or, if asked for, these too."""
        return [site for site in self._sites if inside_low_rank or not site.inside]

    def low_rank(self) -> list[Site]:
        """The low-rank layers, those inside of others included."""
        return [site for site in self._sites if isinstance(site.module, LOW_RANK)]


def _walk(model: nn.Module) -> list[Site]:
    sites: dict[int, Site] = {}
    tied = _tied(model)
    for fqn, module, holder, reasons, inside in _descend(model):
        site = sites.get(id(module))
        if site is None:
            if not (is_unit(module) or _owns_matrix(module)):
                continue
            site = sites[id(module)] = Site(fqn, module, inside)
            if others := tied.get(id(module)):
                site.surroundings.append(f"its parameters are tied to {', '.join(sorted(others))}")
        if site.inside and not inside:  # a part of a low-rank layer that is also elsewhere
            site.inside = False
        site.surroundings += [reason for reason in reasons if reason not in site.surroundings]
        if holder is not None:
            site.places.append(partial(setattr, *holder))
    for held, place in references(model):
        if (site := sites.get(id(held))) is None:
            continue
        if place.put is None:
            site.surroundings.append(f"forward may call it from {place.where}, where nothing can be put in its place")
        else:
            site.places.append(place.put)
    return list(sites.values())


def _descend(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple | None, tuple[str, ...], bool]]:
    """(fqn, module, (parent, name) or None for the root, reasons of the surroundings, whether it is a part of a
    low-rank layer), every path to every module."""
    stack, opened = [("", model, None, (), False)], set()
    while stack:
        fqn, module, holder, reasons, inside = stack.pop()
        yield fqn, module, holder, reasons, inside
        is_low_rank = isinstance(module, LOW_RANK)
        if (is_unit(module) and not is_low_rank) or (id(module), reasons, inside) in opened:
            continue
        opened.add((id(module), reasons, inside))  # again where it is shared into other surroundings
        if reason := _why_not_inside(module):
            reasons = (*reasons, reason)
        children = [
            (f"{fqn}.{name}" if fqn else name, child, (module, name), reasons, inside or is_low_rank)
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
    held = [*module._parameters.values(), *(module._buffers.values() if sizes_of(module) else ())]  # quantized ones
    return any(t is not None and (is_lazy(t) or t.dim() >= 2) for t in held)


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


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers in these parameters; those that are not initialised yet have none."""
    return sum(p.numel() for p in parameters if not is_lazy(p))


def is_unit(module: nn.Module) -> bool:
    """Whether the parameters below a module are one weight in parts: low-rank or parametrized layers."""
    return isinstance(module, LOW_RANK) or nn.utils.parametrize.is_parametrized(module)
