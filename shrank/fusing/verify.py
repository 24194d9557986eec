"""Whether a block computes the same with another forward: outputs and gradients, of random inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _NormBase

from ..util.closeness import distance
from .blocks import DOES_NOT_RUN, NotFusedError, Traced
from .finish import finish, finish_gated, finish_halves, finish_normed, finish_siblings

SIZES = ((2, 3), (1, 5))  # of two inputs: all dimensions but the one that layers know
_PLACES = {finish: 1, finish_halves: 1, finish_normed: 2, finish_gated: 2, finish_siblings: 0}  # of the input
_PIXELS = 10  # of images whose first layer has no kernel


def verify(block: nn.Module, forward: Callable[..., object], traced: Traced) -> None:
    """NotFusedError unless random inputs of two sizes give the outputs and gradients of the block's own forward."""
    own = type(block).forward.__get__(block)
    for seed, size in enumerate(SIZES):
        inputs = _inputs(block, traced, torch.Generator().manual_seed(seed), size)
        try:
            ours, theirs = (_outcome(block, each, inputs) for each in (forward, own))
        except DOES_NOT_RUN as error:
            raise NotFusedError(f"it does not run on random inputs: {type(error).__name__}: {error}") from error
        if len(ours) != len(theirs):
            raise NotFusedError("its outputs are others when traced")
        for one, other in zip(ours, theirs, strict=True):
            if complaint := distance(one, other):
                raise NotFusedError(f"it computes something else when traced: {complaint}")


@contextmanager
def without_traces(block: nn.Module, device: torch.device) -> Iterator[None]:
    """What a block does inside changes neither its buffers, as the statistics of batch norms, nor the random numbers of
    this process, which start anew inside."""
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in block.named_buffers():
                    if name in before and buffer.shape == before[name].shape:
                        buffer.copy_(before[name])


def _outcome(block: nn.Module, forward: Callable[..., object], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the inputs and the parameters."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    with without_traces(block, inputs[0].device), torch.enable_grad():
        y = forward(*leaves)
        if not isinstance(y, Tensor):
            raise NotFusedError(f"it returns a {type(y).__name__}, not a tensor")
        wanted = [*leaves, *(each for each in block.parameters() if each.requires_grad)]
        grads = torch.autograd.grad(y.float().square().sum(), wanted, allow_unused=True)
    with without_traces(block, inputs[0].device), torch.no_grad():
        z = forward(*(each.detach() for each in leaves))
    return [y.detach(), z, *(each for each in grads if each is not None)]


def _inputs(block: nn.Module, traced: Traced, generator: torch.Generator, size: tuple[int, int]) -> list[Tensor]:
    """Random inputs, as large as the layers need them that they meet."""
    like = next(block.parameters())
    if like.is_meta:
        raise NotFusedError("its parameters have no values")
    shapes = (_shape_of(block, node, size) for node in traced.graph.nodes if node.op == "placeholder")
    return [torch.randn(shape, generator=generator).to(like.device, like.dtype) for shape in shapes]


def _shape_of(block: nn.Module, node: Node, size: tuple[int, int]) -> tuple[int, ...]:
    for user in node.users:
        name = _reader_of(node, user)
        shape = _input_of(block.get_submodule(name), size) if name else _residual_of(block, node, user, size)
        if shape:
            return shape
    raise NotFusedError(f"the size of its input {node.target} is not known")


def _residual_of(block: nn.Module, node: Node, user: Node, size: tuple[int, int]) -> tuple[int, ...] | None:
    """The shape of what is added to the outputs of a layer."""
    if user.target not in (finish, finish_normed) or user.args[-1] is not node:
        return None
    layer, x = block.get_submodule(user.args[0].target), user.args[_PLACES[user.target]]
    if hasattr(layer, "out_features"):
        return (*size, layer.out_features)
    if x.op != "placeholder":
        return None
    with torch.no_grad():
        return tuple(layer(layer.down.new_zeros(_shape_of(block, x, size))).shape)


def _reader_of(node: Node, user: Node) -> str | None:
    """The name of a module of which a node is the input, by a call of it or of what stands for it."""
    if user.op == "call_module":
        return user.target
    place = _PLACES.get(user.target)
    if place is None or user.args[place] is not node:
        return None
    return user.args[0 if place else 1].target


def _input_of(layer: nn.Module, size: tuple[int, int]) -> tuple[int, ...] | None:
    """The shape of an input of a layer; None if it does not say."""
    if hasattr(layer, "in_features"):
        return (*size, layer.in_features)
    if hasattr(layer, "in_channels") and hasattr(layer, "kernel_size"):
        return (size[0], layer.in_channels, *(8 + 2 * each for each in layer.kernel_size))
    if isinstance(layer, nn.GroupNorm | nn.BatchNorm2d):
        return (size[0], len(layer.weight), _PIXELS, _PIXELS)
    weight = layer._parameters.get("weight")
    if isinstance(layer, _NormBase) or weight is None or weight.dim() != 1:
        return None
    return (*size, len(weight))  # of a norm of the last dimension
