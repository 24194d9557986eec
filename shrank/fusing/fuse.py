"""shrank.fuse: the blocks of a model that run with fewer calls, and are found to compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..layers.low_rank import LowRankLayer
from ..util.closeness import distance
from .blocks import DOES_NOT_RUN, FusedForward, NotFusedError, Traced, finish, finish_gated, finish_halves


@dataclass
class Fused:
    """What `fuse` did.

    Attributes:
        blocks: The dotted name of each block that was changed, and the names of the low-rank layers in it that take
            something over.
        left: The dotted name of each block that calls low-rank layers and was left, and why.
    """

    blocks: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def fuse(model: nn.Module) -> Fused:
    """Let low-rank layers take over what follows them in the blocks that call them: activations, residuals, and the
    product of a gate with what it lets through.

    A block is a module that calls low-rank layers itself, such as the MLP of a transformer. Its forward is traced, and
    replaced on the instance, where random inputs give the same outputs and gradients. Modules, parameters and their
    names stay what they are. The block's own forward runs where a call is another than what was traced. Under
    torch.compile nothing of this is needed: there a pass does the same to the whole graph.

    Args:
        model: A model with low-rank layers, changed in place. Blocks are traced in the mode that they are in: call
            model.eval() before, for inference.

    Returns:
        What was changed, what was left, and why.
    """
    done = Fused()
    for name, block in list(model.named_modules()):
        if isinstance(block, LowRankLayer) or not any(isinstance(each, LowRankLayer) for each in _called_by(block)):
            continue
        try:
            done.blocks[name] = _fuse_block(block)
        except NotFusedError as reason:
            done.left[name] = str(reason)
    return done


def unfuse(model: nn.Module) -> None:
    """Give every block that `fuse` changed its own forward again.

    Args:
        model: The model, or a part of it.
    """
    for block in model.modules():
        if isinstance(vars(block).get("forward"), FusedForward):
            del block.forward


def _called_by(block: nn.Module) -> list[nn.Module]:
    """The modules that a block may call itself: its children, and those of lists of modules."""
    called = []
    for child in block.children():
        called += _called_by(child) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
    return called


def _fuse_block(block: nn.Module) -> list[str]:
    patched = vars(block).get("forward")
    if isinstance(patched, FusedForward):
        return patched.layers
    if patched is not None:
        raise NotFusedError("its forward was patched on the instance")
    fused = FusedForward(block)
    _verify(block, fused)
    block.forward = fused
    return fused.layers


def _verify(block: nn.Module, fused: FusedForward) -> None:
    """NotFusedError unless random inputs of two sizes give the outputs and gradients of the block's own forward."""
    for seed, size in enumerate(((2, 3), (1, 5))):
        inputs = _inputs(block, fused.traced, torch.Generator().manual_seed(seed), size)
        try:
            ours, theirs = (_outcome(block, forward, inputs) for forward in (fused, type(block).forward.__get__(block)))
        except DOES_NOT_RUN as error:
            raise NotFusedError(f"it does not run on random inputs: {type(error).__name__}: {error}") from error
        if len(ours) != len(theirs):
            raise NotFusedError("its outputs are others when traced")
        for one, other in zip(ours, theirs, strict=True):
            if complaint := distance(one, other):
                raise NotFusedError(f"it computes something else when traced: {complaint}")


def _outcome(block: nn.Module, forward: object, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the inputs and the parameters; without dropout's numbers of this process."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    with torch.random.fork_rng(devices=_cuda_devices(inputs)), torch.enable_grad():
        torch.manual_seed(0)
        y = forward(*leaves)
        if not isinstance(y, Tensor):
            raise NotFusedError(f"it returns a {type(y).__name__}, not a tensor")
        wanted = [*leaves, *(each for each in block.parameters() if each.requires_grad)]
        grads = torch.autograd.grad(y.float().square().sum(), wanted, allow_unused=True)
    return [y.detach(), *(each for each in grads if each is not None)]


def _cuda_devices(inputs: list[Tensor]) -> list[int]:
    return sorted({each.get_device() for each in inputs if each.is_cuda})


def _inputs(block: nn.Module, traced: Traced, generator: torch.Generator, size: tuple[int, int]) -> list[Tensor]:
    """Random inputs, as large as the layers need them that they meet."""
    shapes = {node: _shape_of(block, node, size) for node in traced.graph.nodes if node.op == "placeholder"}
    like = next(block.parameters())
    if like.is_meta:
        raise NotFusedError("its parameters have no values")
    made = (torch.randn(shape, generator=generator) for shape in shapes.values())
    return [each.to(like.device, like.dtype) for each in made]


def _shape_of(block: nn.Module, node: torch.fx.Node, size: tuple[int, int]) -> tuple[int, ...]:
    for user in node.users:
        if user.op == "call_module" and (shape := _input_of(block.get_submodule(user.target), size)):
            return shape
        if user.op == "call_function" and user.target in (finish, finish_halves):
            layer = block.get_submodule(user.args[0].target)
            if user.args[1] is not node and hasattr(layer, "out_features"):
                return (*size, layer.out_features)
            if user.args[1] is node and (shape := _input_of(layer, size)):
                return shape
        if user.op == "call_function" and user.target is finish_gated and user.args[2] is node:
            return (*size, block.get_submodule(user.args[0].target).in_features)
    raise NotFusedError(f"the size of its input {node.target} is not known")


def _input_of(layer: nn.Module, size: tuple[int, int]) -> tuple[int, ...] | None:
    """The shape of an input of a layer; None if it does not say."""
    if hasattr(layer, "in_features"):
        return (*size, layer.in_features)
    if hasattr(layer, "in_channels") and hasattr(layer, "kernel_size"):
        return (size[0], layer.in_channels, *(8 + 2 * each for each in layer.kernel_size))
    return None
