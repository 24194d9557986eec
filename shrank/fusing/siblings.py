"""Linear layers of one input become one op, as query, key and value: on few rows they share their launches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, Node

from .graph import arguments_of, can_move, is_right, take_place

_LINEAR, _PIVOTED = torch.ops.shrank.low_rank_linear, torch.ops.shrank.low_rank_pivoted
STORED = ("down", "up", "bias", "pivot_bias", "order")  # what a linear layer has, with pivots or without


def join_siblings(
    graph: Graph,
    input_of: Callable[[Node], object],
    parts_of: Callable[[Node], list[object]],
    together: Callable[[Graph, Node, list[Node]], Node],
) -> list[list[Node]]:
    """Let linear layers of one input be one call, if they took nothing over.

    input_of: of a node that is such a layer; None of others. parts_of: what else the layer needs to be computed.
    together: makes, at the place of the first, the call that gives the list of all their outputs.

    Returns:
        The nodes of each call, which are gone.
    """
    siblings: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if isinstance(x := input_of(node), Node):
            siblings.setdefault(x, []).append(node)
    found = []
    for x, nodes in siblings.items():
        if len(nodes) > 1 and is_right("low_rank_linear_multi", x):
            joined = _joined(graph, nodes, parts_of)
            if len(joined) > 1:
                _replace(graph, input_of(joined[0]), joined, together)  # x may be of a call that is gone
                found.append(joined)
    return found


def one_op(graph: Graph, x: Node, nodes: list[Node]) -> Node:
    """The call for layers that are calls of ops themselves."""
    lists = zip(*(_stored_in(node) for node in nodes), strict=True)
    return graph.call_function(torch.ops.shrank.low_rank_linear_multi.default, (x, *map(list, lists)))


def factors_in(node: Node) -> list[object]:
    """Those of a call of an op."""
    return [each for each in _stored_in(node) if each is not None]


def _stored_in(node: Node) -> list[object]:
    op = _PIVOTED if node.target in (_PIVOTED, _PIVOTED.default) else _LINEAR
    arguments = arguments_of(node, op.default)
    return [arguments.get(part) for part in STORED]


def _joined(graph: Graph, nodes: list[Node], parts_of: Callable[[Node], list[object]]) -> list[Node]:
    """All that can be computed at the place of the first, and are there what they are."""
    first, *others = nodes
    before = set(_until(graph, first))
    there = [node for node in others if before.issuperset(parts_of(node))]
    return [first, *(node for node in there if can_move(first, node, tuple(nodes)))]


def _replace(graph: Graph, x: Node, joined: list[Node], together: Callable[[Graph, Node, list[Node]], Node]) -> None:
    with graph.inserting_before(joined[0]):
        call = together(graph, x, joined)
        outputs = [graph.call_function(operator.getitem, (call, i)) for i in range(len(joined))]
    for node, output in zip(joined, outputs, strict=True):
        take_place(graph, output, node)


def _until(graph: Graph, last: Node) -> Iterator[Node]:
    for node in graph.nodes:
        if node is last:
            return
        yield node
