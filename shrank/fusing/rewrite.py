"""The calls of low-rank ops in a compiled graph take over what follows them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from ..layers.batch_norm import folded
from .end import End, Reading
from .graph import arguments_of, take_place, value_of
from .halves import halved
from .siblings import STORED, factors_in, join_siblings, one_op

_LINEAR, _PIVOTED = torch.ops.shrank.low_rank_linear, torch.ops.shrank.low_rank_pivoted
_FACTORS, _PIVOTS = STORED[:3], STORED[3:]
_LINEAR_OPS = (_LINEAR.default, _PIVOTED.default)
_CHANNELS = {_LINEAR.default: -1, torch.ops.shrank.low_rank_conv.default: 1}  # the dimension that the rows of up are
_STATISTICS = ("running_mean", "running_var", "weight", "bias", "eps")


def fuse(graph: Graph) -> int:
    """Let every low-rank op of a graph take over the activation, the residual, the batch norm and the gated value that
    follow it, where nobody else needs what lies between; dropouts that drop nothing are passed by. Linear layers of one
    input that take nothing over become one op.

    Args:
        graph: Changed in place. Its nodes have the fake tensors that stand for their values.

    Returns:
        How many ops took something over, or stand for several layers.
    """
    ops, found = _ops(), 0

    def bare(node: Node) -> tuple[Callable, dict[str, object]] | None:
        """The op of a node, and its arguments, if nothing is behind it yet."""
        op = ops.get(node.target) if node.op == "call_function" else None
        arguments = op and arguments_of(node, op)
        return (op, arguments) if op and arguments["activation"] == "none" and arguments["residual"] is None else None

    def input_of(node: Node) -> object:
        called = bare(node)
        return called[1]["x"] if called and called[0] in _LINEAR_OPS else None

    reading = Reading(input_of=input_of)
    for node in list(graph.nodes):
        if (called := bare(node)) is None:
            continue
        op, arguments = called
        end = End.of(node, reading, _CHANNELS.get(op))
        if end and end.value is not None:
            _replace_gate(graph, arguments, arguments_of(end.value, ops[end.value.target]), end)
        elif end:
            _replace(graph, op, arguments, end)
        elif op is _LINEAR.default and (end := End.of_halves(node, arguments["x"], _outputs_of(node), reading)):
            _replace_halves(graph, arguments, end)
        found += end is not None
    return found + len(join_siblings(graph, input_of, factors_in, one_op))


def _ops() -> dict[Callable, Callable]:
    """Both spellings of each op, and its overload."""
    packets = (_LINEAR, _PIVOTED, torch.ops.shrank.low_rank_conv)
    return {spelled: packet.default for packet in packets for spelled in (packet, packet.default)}


def _outputs_of(layer: Node) -> object:
    """How many outputs a linear layer has: a symbol where it is not known before the graph runs."""
    value = value_of(layer)
    return None if value is None else value.shape[-1]


def _replace(graph: Graph, op: Callable, arguments: dict[str, object], end: End) -> None:
    with graph.inserting_before(end.last):
        given = arguments | _folded(graph, arguments, end) | {"activation": end.activation, "residual": end.residual}
        fused = graph.call_function(op, tuple(given.values()))
    take_place(graph, fused, end.last)


def _replace_gate(graph: Graph, gate: dict[str, object], value: dict[str, object], end: End) -> None:
    with graph.inserting_before(end.last):
        gate = gate | _folded(graph, gate, end)
        stored = [each.get(name) for names in (_FACTORS, _PIVOTS) for each in (gate, value) for name in names]
        op = torch.ops.shrank.low_rank_gated.default
        fused = graph.call_function(op, (gate["x"], *stored, end.activation))
    take_place(graph, fused, end.last)


def _replace_halves(graph: Graph, arguments: dict[str, object], end: End) -> None:
    with graph.inserting_before(end.last):
        first, second = halved(graph, arguments)
    _replace_gate(graph, *((first, second) if end.gate_is_first else (second, first)), end)


def _folded(graph: Graph, arguments: dict[str, object], end: End) -> dict[str, Node | None]:
    """up and bias of the outputs that an end normalises, scales and shifts."""
    tracer = GraphAppendingTracer(graph)

    def traced(given: object) -> object:
        return Proxy(given, tracer) if isinstance(given, Node) else given

    up, bias = traced(arguments["up"]), traced(arguments["bias"])
    if end.norm:
        up, bias = folded(up, bias, *(traced(end.norm[name]) for name in _STATISTICS))
    for function, numbers in end.channels:
        row = traced(numbers).flatten().type_as(up)
        if function is operator.mul:
            up = up * row.reshape(-1, *[1] * (value_of(arguments["up"]).dim() - 1))
        bias = function(bias, row) if bias is not None else row if function is operator.add else None
    return {"up": up.node, "bias": None if bias is None else bias.node}
