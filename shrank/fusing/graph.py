"""Nodes of a graph: what they compute, and which of them may move.

Dynamo records torch's functions and the methods of tensors; torch.export records overloads of ATen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional as F

from ..ops import self_check

_IN_PLACE = {getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")} | {
    operator.setitem
}


aten = torch.ops.aten


def is_call(node: Node, *functions: Callable | str) -> bool:
    """Whether the node calls one of these functions, or on a tensor one of the methods of these names."""
    if node.op == "call_method":
        return node.target in functions
    return node.op == "call_function" and node.target in functions


def given_to(node: Node, *names: str) -> dict[str, object]:
    """The arguments of a call by their names, as far as it has them."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def only_user(node: Node) -> Node | None:
    """The one node that has this node's value as one argument; None if there are several, or none."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    uses = [each for each in user.all_input_nodes if each is node]
    given = [*user.args, *user.kwargs.values()]
    return user if len(uses) == 1 and sum(each is node for each in given) == 1 else None


def other_input(node: Node, one: Node) -> object:
    """Of a call with two arguments, that which is not `one`."""
    left, right = node.args
    return right if left is one else left


def value_of(node: object) -> Tensor | None:
    """The fake tensor that stands for a node's value."""
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def are_alike(one: object, other: object) -> bool:
    """Whether two nodes are known to have one shape, dtype and device."""
    a, b = value_of(one), value_of(other)
    if a is None or b is None or a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    return are_equal(a.shape, b.shape)


def are_equal(sizes: Sequence[object], others: Sequence[object]) -> bool:
    """Whether as many sizes, of which some may be symbols, are known to be the same."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq  # imports sympy

    return statically_known_true(sym_eq(tuple(sizes), tuple(others)))


def is_identity(node: Node) -> bool:
    """Whether the node is a dropout that drops nothing."""
    if not is_call(node, F.dropout, torch.dropout, aten.dropout.default):
        return False
    given = given_to(node, "input", "p", "training", "inplace")
    training = given.get("train", given.get("training", True))  # the names of ATen and of torch
    return training is False or given.get("p", 0.5) == 0


def can_move(node: Node, target: Node, passed: tuple[Node, ...] = ()) -> bool:
    """Whether a node computes the same at the place of a later one: nothing between changes a tensor, or what autograd
    and autocast do.

    passed: nodes between that are known to do neither.
    """
    between = node.next
    while between is not target:
        if between not in passed and _changes_something(between):
            return False
        between = between.next
    return True


def _changes_something(node: Node) -> bool:
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return node.op == "call_module"
    if node.target in _IN_PLACE or node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.is_mutable
    name = getattr(node.target, "__name__", "")  # gradients, autocast and hooks are turned on and off by functions
    return name.endswith("_") or name.startswith(("_enter", "_exit", "_set", "set_")) or node.is_impure()


def arguments_of(node: Node, op: Callable) -> dict[str, object]:
    """All arguments of a call of an op by their names."""
    schema = op._schema.arguments
    given = given_to(node, *(each.name for each in schema))
    return {each.name: each.default_value for each in schema} | given


def is_right(op: str, x: object) -> bool:
    """Whether the kernels of another op than the model called may run: they were not found wrong on the card of x."""
    value = value_of(x)
    return value is None or not value.is_cuda or not self_check.why_not_op(op, value)


def take_place(graph: Graph, fused: Node, last: Node) -> None:
    """Give a node all users of another, and remove what nobody uses then: that one, and what led to it."""
    fused.meta = {key: last.meta[key] for key in ("example_value", "val", "stack_trace") if key in last.meta}
    last.replace_all_uses_with(fused)
    unused, gone = [last], set()
    while unused:
        node = unused.pop()
        if not node.users and node not in gone and node.op not in ("placeholder", "get_attr"):
            unused += node.all_input_nodes
            graph.erase_node(node)
            gone.add(node)
