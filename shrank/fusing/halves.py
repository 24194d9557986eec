"""The halves of one layer's outputs, as the MLPs of ModernBERT, Phi3 and GLM compute gate and value."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from .graph import aten, given_to, is_call, only_user, value_of

_CHUNKS = (torch.chunk, "chunk", aten.chunk.default)
_SPLITS = (torch.split, "split", aten.split.Tensor, aten.split_with_sizes.default)
_PARTS = ("parts", "chunks", "split_size", "split_size_or_sections", "split_sizes")  # each call has its own name


def halves_of(layer: Node, outputs: object) -> tuple[Node, Node] | None:
    """The nodes of both halves of a layer's outputs, if nothing else becomes of these.

    outputs: how many they are. A number that is a symbol may be odd.
    """
    both = only_user(layer)
    if both is None or len(both.users) != 2 or not isinstance(outputs, int) or not _are_halves(both, layer, outputs):
        return None
    taken = [user for user in both.users if is_call(user, operator.getitem)]
    first, second = (next((user for user in taken if user.args[1] == place), None) for place in (0, 1))
    return None if first is None or second is None else (first, second)


def halved(graph: Graph, arguments: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """The arguments of either half: its rows of up and bias, as views of them."""
    first, second = dict(arguments), dict(arguments)
    for name in ("up", "bias"):
        if arguments[name] is not None:
            rows = graph.call_function(torch.chunk, (arguments[name], 2))
            first[name], second[name] = (graph.call_function(operator.getitem, (rows, place)) for place in (0, 1))
    return first, second


def _are_halves(both: Node, layer: Node, outputs: int) -> bool:
    """Whether a call divides the outputs, which are the layer's last dimension, into two equal parts."""
    given, value = given_to(both, "of", "parts", "dim"), value_of(layer)
    last = (-1,) if value is None else (-1, value.dim() - 1)
    if outputs % 2 or given.get("dim", 0) not in last:
        return False
    parts = next((given[name] for name in _PARTS if name in given), None)
    if is_call(both, *_CHUNKS):
        return parts == 2
    half = outputs // 2
    return is_call(both, *_SPLITS) and parts in (half, [half, half], (half, half))
