"""Looking at a running model without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# (module, args, kwargs, output) -> the output to use instead, or None.
Hook = Callable[[nn.Module, tuple, dict, object], object]
# (module, args, kwargs) -> the arguments to use instead.
InputHook = Callable[[nn.Module, tuple, dict], tuple[tuple, dict]]


@contextmanager
def hooked(
    hooks: Iterable[tuple[nn.Module, Hook]], before: Iterable[tuple[nn.Module, InputHook]] = ()
) -> Iterator[None]:
    """Call these after the forwards of their modules, or before them, which then do run: torch's fused paths of
    attention and encoder layers, which read weights instead of calling layers and pass nested tensors on, are off
    meanwhile."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in before]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of the parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """With gradients of all parameters that can have one."""
    held = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point() and not p.is_inference()]
    try:
        for parameter in held:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(False)


@contextmanager
def recomputing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Runs of these modules, none inside of another, keep nothing for the backward pass, which runs them again."""
    patched = {module: vars(module).get("forward") for module in modules}
    try:
        for module in patched:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        yield
    finally:
        for module, own in patched.items():
            del module.forward
            if own is not None:  # as accelerate puts one there
                module.forward = own


def with_input(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """The arguments of a layer of one input, with another one."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """What a layer of one input was called with."""
    return args[0] if args else next(iter(kwargs.values()))
