"""shrank.fuse: the blocks of a model that run with fewer calls, and are found to compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..layers.low_rank import LowRankLayer
from .blocks import FusedForward, NotFusedError
from .sharing import SharedForward, SharingForward, share
from .verify import verify


@dataclass
class Fused:
    """What `fuse` did.

    Attributes:
        blocks: The dotted name of each block that was changed, and the names of the low-rank layers in it that take
            something over, or that are called together.
        left: The dotted name of each block that calls low-rank layers and was left, and why.
    """

    blocks: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


@torch.inference_mode(False)
def fuse(model: nn.Module) -> Fused:
    """Let low-rank layers take over what follows them in the blocks that call them, and call layers of one input
    together: batch norms, activations, residuals, and the product of a gate with what it lets through are taken over.

    A block is a module that calls low-rank layers itself, such as the MLP of a transformer, or calls such modules and
    does something to their results, such as a residual block. Its forward is traced, and replaced on the instance,
    where random inputs give the same outputs and gradients. Where it cannot be traced, as that of attention, its layers
    of one input are called together without gradients. Modules, parameters and their names stay what they are. The
    block's own forward runs where a call is another than what was traced. Under torch.compile nothing of this is
    needed: there a pass does the same to the whole graph.

    Args:
        model: A model with low-rank layers, changed in place. Blocks are traced in the mode that they are in: call
            model.eval() before, for inference.

    Returns:
        What was changed, what was left, and why.
    """
    blocks = {name: each for name, each in model.named_modules() if _is_compressed(each)}
    search = _Search(blocks)
    for name, block in reversed(blocks.items()):
        search.look_at(name, block)
    for name, forward in search.found.items():
        blocks[name].forward = forward
    return Fused(
        {name: search.found[name].layers for name in blocks if name in search.found},
        {name: search.left[name] for name in blocks if name in search.left},
    )


def unfuse(model: nn.Module) -> None:
    """Give every block that `fuse` changed its own forward again.

    Args:
        model: The model, or a part of it.
    """
    for block in model.modules():
        if isinstance(vars(block).get("forward"), FusedForward | SharingForward | SharedForward):
            del block.forward


def _is_compressed(block: nn.Module) -> bool:
    return not isinstance(block, LowRankLayer) and any(isinstance(each, LowRankLayer) for each in block.modules())


def called_by(block: nn.Module) -> list[nn.Module]:
    """The modules that a block may call itself: its children, and those of lists of modules."""
    called = []
    for child in block.children():
        called += called_by(child) if isinstance(child, nn.ModuleList | nn.ModuleDict) else [child]
    return called


class _Search:
    """Goes through the blocks of a model, inner ones first.

    found: what shall stand in for the forward of each block. A block takes the place of those that it has become one
    with, if it has fewer calls than they have.
    """

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        patched = {name: vars(block).get("forward") for name, block in blocks.items()}
        self.found = {name: each for name, each in patched.items() if isinstance(each, FusedForward | SharingForward)}
        self.left: dict[str, str] = {}
        self._followed: list[str] = []  # blocks that others may become one with
        before = [_prefix(name) + inner for name, each in self.found.items() for inner in _looked_into(each)]
        self._closed = {*self.found, *before}

    def look_at(self, name: str, block: nn.Module) -> None:
        prefix = _prefix(name)
        inside = [each.removeprefix(prefix) for each in self._followed if each.startswith(prefix)]
        calls = any(isinstance(each, LowRankLayer) for each in called_by(block))
        if name in self._closed or not (calls or inside):
            return
        try:
            self._trace(name, block, inside)
        except NotFusedError as reason:
            if not calls:
                return
            if forward := share(block, called_by(block)):
                self.found[name] = forward
                self._followed = [each for each in self._followed if each != name]
            else:
                self.left[name] = str(reason)

    def _trace(self, name: str, block: nn.Module, inside: list[str]) -> None:
        if "forward" in vars(block):
            raise NotFusedError("its forward was patched on the instance")
        forward, prefix = FusedForward(block, inside), _prefix(name)
        traced = forward.traced
        inner = self.found.keys() & {prefix + each for each in traced.looked_into}
        gain = traced.gain - sum(self.found[each].traced.gain for each in inner)
        if gain > 0:
            verify(block, forward, traced)
        self._followed.append(name)
        if gain <= 0:
            raise NotFusedError("nothing follows its low-rank layers that they could take over")
        for each in inner:
            del self.found[each]
        self.found[name] = forward
        for each in traced.layers:
            self.left.pop((prefix + each).rpartition(".")[0], None)


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def _looked_into(forward: FusedForward | SharingForward) -> list[str]:
    return forward.traced.looked_into if isinstance(forward, FusedForward) else []
