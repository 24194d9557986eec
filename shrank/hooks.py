"""Looking at a running model without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

# (module, args, kwargs, output) -> the output to use instead, or None.
Hook = Callable[[nn.Module, tuple, dict, object], object]


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Call these after the forwards of their modules."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and as it was afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """What a layer of one input was called with."""
    return args[0] if args else kwargs["input"]
