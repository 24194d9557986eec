"""What follows a low-rank layer in a graph, and the calls of the low-rank ops that take it over."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from .activations import activation_after
from .graph import (
    are_alike,
    arguments_of,
    aten,
    can_move,
    given_to,
    is_call,
    is_right,
    only_user,
    other_input,
    take_place,
    value_of,
)
from .graph import is_identity as drops_nothing
from .halves import halved, halves_of
from .siblings import join_siblings

_SUMS = (operator.add, torch.add, "add", aten.add.Tensor)
_IN_PLACE_SUMS = (operator.iadd, "add_", aten.add_.Tensor)
_LINEAR = torch.ops.shrank.low_rank_linear
_FACTORS = ("down", "up", "bias")
_PRODUCTS = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
_NORMS = {  # each has its own order of arguments
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    aten.batch_norm.default: (
        *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
    ),
}


@dataclass
class End:
    """What happens to a node's value and to nothing else: norm, activation, residual or value, in this order.

    last: the node that has the result.
    value: the node of another low-rank layer with the same input, or of the other half of the layer's outputs, by which
        the activated node, its gate, is multiplied.
    passed: nodes between that do nothing, such as dropouts.
    """

    last: Node
    activation: str = "none"
    residual: Node | None = None
    value: Node | None = None
    norm: dict | None = None
    passed: tuple[Node, ...] = ()

    @classmethod
    def of(
        cls,
        node: Node,
        with_norm: bool = False,
        is_identity: Callable[[Node], bool] = drops_nothing,
        alike: Callable[[object, object], bool] = are_alike,
        input_of: Callable[[Node], object] = lambda _: None,
    ) -> End | None:
        """As much as an op knows of what follows; None if there is nothing that it may take over.

        alike: whether two nodes have one shape, dtype and device.
        input_of: the input of a node that is a low-rank linear layer with nothing behind it; None of others.
        """
        end = cls(node)
        end._pass_by(is_identity)
        if with_norm:
            end._take_norm()
        if applied := activation_after(end.last):
            end.activation, end.last = applied
            end._pass_by(is_identity)
            end._take_value(node, alike, input_of)
        if end.value is None:
            end._take_residual(alike)
        if end == cls(end.last, passed=end.passed):
            return None
        return end if end.value is not None or can_move(node, end.last, end.passed) else None

    @classmethod
    def of_halves(
        cls,
        layer: Node,
        x: object,
        outputs: object,
        is_identity: Callable[[Node], bool] = drops_nothing,
        alike: Callable[[object, object], bool] = are_alike,
    ) -> End | None:
        """What follows the half of a linear layer's outputs that is the gate of the other half; None if neither is.

        x: the layer's input. outputs: how many it has, as far as it is known.
        """
        halves = halves_of(layer, outputs) or ()
        for half in halves:
            end = cls.of(half, False, is_identity, alike, lambda node: x if node in halves else None)
            if end and end.value is not None and can_move(layer, end.last, end.passed):
                return end
        return None

    @property
    def gate_is_first(self) -> bool:
        """Of halves: whether the value is the second."""
        return self.value is not None and self.value.args[1] == 1

    def _pass_by(self, is_identity: Callable[[Node], bool]) -> None:
        while (user := only_user(self.last)) is not None and is_identity(user):
            self.last = user
            self.passed += (user,)

    def _take_norm(self) -> None:
        """A batch norm that does not learn its statistics: it scales and shifts channels."""
        user = only_user(self.last)
        if user is None or not is_call(user, *_NORMS):
            return
        given = {"weight": None, "bias": None, "training": False, "eps": 1e-5} | given_to(user, *_NORMS[user.target])
        if given["input"] is self.last and given["training"] is False and given["running_mean"] is not None:
            self.norm, self.last = given, user

    def _take_value(
        self, gate: Node, alike: Callable[[object, object], bool], input_of: Callable[[Node], object]
    ) -> None:
        user, x = only_user(self.last), input_of(gate)
        if user is None or x is None or not is_call(user, *_PRODUCTS) or user.kwargs or len(user.args) != 2:
            return
        value = other_input(user, self.last)
        if not isinstance(value, Node) or only_user(value) is not user or input_of(value) is not x:
            return
        if not is_right("low_rank_gated", x):
            return
        if alike(self.last, value) and all(can_move(each, user, (*self.passed, gate, value)) for each in (gate, value)):
            self.value, self.last = value, user

    def _take_residual(self, alike: Callable[[object, object], bool]) -> None:
        user = only_user(self.last)
        if user is None or user.kwargs or len(user.args) != 2:
            return
        in_place = is_call(user, *_IN_PLACE_SUMS) and user.args[0] is self.last
        if not in_place and not is_call(user, *_SUMS):
            return
        residual = other_input(user, self.last)
        if isinstance(residual, Node) and alike(self.last, residual):
            self.residual, self.last = residual, user


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
        return called[1]["x"] if called and called[0] is _LINEAR.default else None

    for node in list(graph.nodes):
        if (called := bare(node)) is None:
            continue
        op, arguments = called
        end = End.of(node, with_norm=op is torch.ops.shrank.low_rank_conv.default, input_of=input_of)
        if end and end.value is not None:
            _replace_gate(graph, arguments, arguments_of(end.value, op), end)
        elif end:
            _replace(graph, op, arguments, end)
        elif op is _LINEAR.default and (end := End.of_halves(node, arguments["x"], _outputs_of(node))):
            _replace_halves(graph, arguments, end)
        found += end is not None
    return found + join_siblings(graph, input_of)


def _ops() -> dict[Callable, Callable]:
    """Both spellings of each op, and its overload."""
    packets = (_LINEAR, torch.ops.shrank.low_rank_pivoted, torch.ops.shrank.low_rank_conv)
    return {spelled: packet.default for packet in packets for spelled in (packet, packet.default)}


def _outputs_of(layer: Node) -> object:
    """How many outputs a linear layer has: a symbol where it is not known before the graph runs."""
    value = value_of(layer)
    return None if value is None else value.shape[-1]


def _replace(graph: Graph, op: Callable, arguments: dict[str, object], end: End) -> None:
    last = end.last
    with graph.inserting_before(last):
        if end.norm:
            arguments |= _folded(graph, arguments, end.norm)
        arguments |= {"activation": end.activation, "residual": end.residual}
        fused = graph.call_function(op, tuple(arguments.values()))
    take_place(graph, fused, end.last)


def _replace_gate(graph: Graph, gate: dict[str, object], value: dict[str, object], end: End) -> None:
    factors = [each[name] for each in (gate, value) for name in _FACTORS]
    with graph.inserting_before(end.last):
        op = torch.ops.shrank.low_rank_gated.default
        fused = graph.call_function(op, (gate["x"], *factors, end.activation))
    take_place(graph, fused, end.last)


def _replace_halves(graph: Graph, arguments: dict[str, object], end: End) -> None:
    with graph.inserting_before(end.last):
        first, second = halved(graph, arguments)
    _replace_gate(graph, *((first, second) if end.gate_is_first else (second, first)), end)


def _folded(graph: Graph, arguments: dict[str, object], norm: dict) -> dict[str, Node]:
    """up and bias of the scaled and shifted outputs: in the precision of the statistics, rounded once."""
    up, bias, call = arguments["up"], arguments["bias"], graph.call_function
    variance = call(torch.Tensor.float, (norm["running_var"],))
    scale = call(torch.rsqrt, (call(operator.add, (variance, norm["eps"])),))
    if norm["weight"] is not None:
        scale = call(operator.mul, (scale, norm["weight"]))
    mean = norm["running_mean"]
    shift = call(operator.neg, (mean,)) if bias is None else call(operator.sub, (bias, mean))
    shift = call(operator.mul, (shift, scale))
    if norm["bias"] is not None:
        shift = call(operator.add, (shift, norm["bias"]))
    rows = call(torch.reshape, (scale, (-1, *[1] * (value_of(up).dim() - 1))))
    scaled = call(operator.mul, (up, rows))
    return {"up": call(torch.Tensor.type_as, (scaled, up)), "bias": call(torch.Tensor.type_as, (shift, up))}
