"""Which activation of the ops a piece of a graph is, however it is spelled."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from torch.fx import Node
from torch.nn import functional as F

from .graph import aten, is_call, only_user, other_input

_ADD = (operator.add, torch.add, "add", aten.add.Tensor)
_MUL = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
_POW = (operator.pow, torch.pow, "pow", aten.pow.Tensor_Scalar)
_TANH = (torch.tanh, F.tanh, "tanh", aten.tanh.default)
_RELU = (F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_", aten.relu.default, aten.relu_.default)


class Applied(NamedTuple):
    """An activation's name, and the node that has its result."""

    name: str
    end: Node


def activation_after(node: Node) -> Applied | None:
    """The activation that is all that happens to a node's value."""
    user = only_user(node)
    if user is None:
        end = _end_of_tanh_gelu(node)
        return end and Applied("gelu_tanh", end)
    name = _name_of(user)
    return name and Applied(name, user)


def _name_of(node: Node) -> str | None:
    if is_call(node, *_RELU):
        return "relu"
    if is_call(node, F.silu, aten.silu.default, aten.silu_.default):
        return "silu"
    if is_call(node, F.gelu, aten.gelu.default):
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return None


def _end_of_tanh_gelu(z: Node) -> Node | None:
    """The end of 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))), as transformers' NewGELUActivation writes it."""
    cube = next((user for user in z.users if is_call(user, *_POW) and user.args[1] == 3), None)
    half = next((user for user in z.users if _is_multiple(user, z, 0.5)), None)
    if cube is None or half is None or len(z.users) != 3:
        return None
    inner = _sum_with(z, _scaled(cube, 0.044715))
    outer = inner and _scaled(inner, math.sqrt(2 / math.pi))
    tanh = outer and only_user(outer)
    if not tanh or not is_call(tanh, *_TANH):
        return None
    more = only_user(tanh)
    if more is None or not is_call(more, *_ADD) or other_input(more, tanh) != 1:
        return None
    end = only_user(more)
    return end if end is not None and is_call(end, *_MUL) and only_user(half) is end else None


def _is_multiple(node: Node, of: Node, factor: float) -> bool:
    return is_call(node, *_MUL) and len(node.args) == 2 and _is_close(other_input(node, of), factor)


def _is_close(found: object, wanted: float) -> bool:
    return isinstance(found, int | float) and math.isclose(found, wanted, rel_tol=1e-6)


def _scaled(node: Node, factor: float) -> Node | None:
    user = only_user(node)
    return user if user is not None and _is_multiple(user, node, factor) else None


def _sum_with(z: Node, term: Node | None) -> Node | None:
    user = term and only_user(term)
    return user if user and is_call(user, *_ADD) and len(user.args) == 2 and other_input(user, term) is z else None
