"""Linear layers of one input become one op, as query, key and value: on few rows they share their launches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, Node

from .graph import arguments_of, can_move, is_right, take_place

_LINEAR = torch.ops.shrank.low_rank_linear
_FACTORS = ("down", "up", "bias")


def join_siblings(graph: Graph, input_of: Callable[[Node], object]) -> int:
    """Let linear layers of one input be one op, if they took nothing over; how many ops are several layers now."""
    siblings: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if isinstance(x := input_of(node), Node):
            siblings.setdefault(x, []).append(node)
    wanted = ((x, nodes) for x, nodes in siblings.items() if len(nodes) > 1 and is_right("low_rank_linear_multi", x))
    return sum(_join(graph, x, nodes) for x, nodes in wanted)


def _join(graph: Graph, x: Node, nodes: list[Node]) -> bool:
    """At the place of the first, of all whose factors are there by then, and that compute there what they compute."""
    first, *others = nodes
    before = {node for node in _until(graph, first)}
    joined = [first]
    for node in others:
        arguments = arguments_of(node, _LINEAR.default)
        if all(arguments[part] is None or arguments[part] in before for part in _FACTORS):
            joined += [node] if can_move(first, node, tuple(nodes)) else []
    if len(joined) == 1:
        return False
    lists = [[arguments_of(node, _LINEAR.default)[part] for node in joined] for part in _FACTORS]
    with graph.inserting_before(first):
        together = graph.call_function(torch.ops.shrank.low_rank_linear_multi.default, (x, *lists))
        outputs = [graph.call_function(operator.getitem, (together, i)) for i in range(len(joined))]
    for node, output in zip(joined, outputs, strict=True):
        take_place(graph, output, node)
    return True


def _until(graph: Graph, last: Node) -> Iterator[Node]:
    for node in graph.nodes:
        if node is last:
            return
        yield node
