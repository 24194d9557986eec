"""What happens to the value of a low-rank layer in a graph, as far as an op can do it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch.fx import Node
from torch.nn import functional as F

from .activations import activation_after
from .graph import are_alike, are_equal, aten, can_move, given_to, is_call, is_right, only_user, other_input, value_of
from .graph import is_identity as drops_nothing
from .halves import halves_of

_SUMS = (operator.add, torch.add, "add", aten.add.Tensor)
_IN_PLACE_SUMS = (operator.iadd, "add_", aten.add_.Tensor)
_PRODUCTS = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
_NORMS = {  # each has its own order of arguments
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    aten.batch_norm.default: (
        *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
    ),
}


def norm_in_graph(node: Node) -> dict[str, object] | None:
    """The arguments of a batch norm that does not learn its statistics; None of other nodes."""
    if not is_call(node, *_NORMS):
        return None
    given = {"weight": None, "bias": None, "training": False, "eps": 1e-5} | given_to(node, *_NORMS[node.target])
    return given if given["training"] is False and given["running_mean"] is not None else None


@dataclass(frozen=True)
class Reading:
    """How the nodes of a graph are understood.

    is_identity: whether a node is a dropout that drops nothing.
    alike: whether two nodes have one shape, dtype and device.
    input_of: the input of a node that is a low-rank linear layer with nothing behind it; None of others.
    norm_of: what is known of a node that is a batch norm which does not learn its statistics; None of others.
    quiet: nodes that are known to change neither tensors nor what autograd and autocast do.
    """

    is_identity: Callable[[Node], bool] = drops_nothing
    alike: Callable[[object, object], bool] = are_alike
    input_of: Callable[[Node], object] = lambda _: None
    norm_of: Callable[[Node], object] = norm_in_graph
    quiet: Collection[Node] = ()


@dataclass
class End:
    """What happens to a node's value and to nothing else: norm, channels, activation, residual or value, in this order.

    last: the node that has the result.
    value: the node of another low-rank layer with the same input, or of the other half of the layer's outputs, by which
        the activated node, its gate, is multiplied.
    norm: what the reading knows of it.
    channels: products and sums with a number for each channel, and these numbers, as layer scales and frozen batch
        norms are; only before an activation or a residual, with which they would be one pass without the op.
    passed: nodes between that do nothing, such as dropouts.
    """

    last: Node
    activation: str = "none"
    residual: Node | None = None
    value: Node | None = None
    norm: object = None
    channels: tuple[tuple[Callable, Node], ...] = ()
    passed: tuple[Node, ...] = ()

    @classmethod
    def of(cls, node: Node, reading: Reading, channel: int | None = None) -> End | None:
        """As much as an op knows of what follows; None if there is nothing that it may take over.

        channel: the dimension of the value that the rows of a second factor are, if it has all of them; that of images,
            1, may have a batch norm.
        """
        end = cls(node)
        end._pass_by(reading)
        if channel == 1:
            end._take_norm(reading)
        before = replace(end)
        if channel is not None:
            end._take_channels(channel, reading)
        end._take_activation(node, reading)
        if end.value is None:
            end._take_residual(reading)
        if end.gain == before.gain:
            end = before
        if end.gain == 0:
            return None
        return end if end.value is not None or can_move(node, end.last, (*end.passed, *reading.quiet)) else None

    @classmethod
    def of_halves(cls, layer: Node, x: object, outputs: object, reading: Reading) -> End | None:
        """What follows the half of a linear layer's outputs that is the gate of the other half; None if neither is.

        x: the layer's input. outputs: how many it has, as far as it is known.
        """
        halves = halves_of(layer, outputs) or ()
        of_halves = replace(reading, input_of=lambda node: x if node in halves else None)
        for half in halves:
            end = cls.of(half, of_halves)
            if end and end.value is not None and can_move(layer, end.last, (*end.passed, *reading.quiet)):
                return end
        return None

    @property
    def gain(self) -> int:
        """How many calls less there are with it."""
        return sum((self.activation != "none", self.residual is not None, self.value is not None, bool(self.norm)))

    @property
    def gate_is_first(self) -> bool:
        """Of halves: whether the value is the second."""
        return self.value is not None and self.value.args[1] == 1

    def _pass_by(self, reading: Reading) -> None:
        while (user := only_user(self.last)) is not None and reading.is_identity(user):
            self.last = user
            self.passed += (user,)

    def _take_norm(self, reading: Reading) -> None:
        """It scales and shifts channels: those of the node, and not those of another argument."""
        user = only_user(self.last)
        norm = user and reading.norm_of(user)
        if norm and user.args[:1] == (self.last,):
            self.norm, self.last = norm, user
            self.passed += (user,)

    def _take_channels(self, channel: int, reading: Reading) -> None:
        while (user := only_user(self.last)) is not None and not user.kwargs and len(user.args) == 2:
            numbers, is_sum = other_input(user, self.last), is_call(user, *_SUMS)
            if not (is_sum or is_call(user, *_PRODUCTS)) or not _is_of_channels(numbers, self.last, channel):
                return
            if reading.alike(numbers, self.last) or not reading.alike(self.last, user):
                return  # a residual; or of another dtype
            self.channels += ((operator.add if is_sum else operator.mul, numbers),)
            self.last = user
            self._pass_by(reading)

    def _take_activation(self, node: Node, reading: Reading) -> None:
        if applied := activation_after(self.last):
            self.activation, self.last = applied
            self._pass_by(reading)
            self._take_value(node, reading)

    def _take_value(self, gate: Node, reading: Reading) -> None:
        user, x = only_user(self.last), reading.input_of(gate)
        if user is None or x is None or not is_call(user, *_PRODUCTS) or user.kwargs or len(user.args) != 2:
            return
        value = other_input(user, self.last)
        if not isinstance(value, Node) or only_user(value) is not user or reading.input_of(value) is not x:
            return
        if not is_right("low_rank_gated", x):
            return
        passed = (*self.passed, gate, value, *reading.quiet)
        if reading.alike(self.last, value) and all(can_move(each, user, passed) for each in (gate, value)):
            self.value, self.last = value, user

    def _take_residual(self, reading: Reading) -> None:
        user = only_user(self.last)
        if user is None or user.kwargs or len(user.args) != 2:
            return
        in_place = is_call(user, *_IN_PLACE_SUMS) and user.args[0] is self.last
        if not in_place and not is_call(user, *_SUMS):
            return
        residual = other_input(user, self.last)
        if isinstance(residual, Node) and reading.alike(self.last, residual):
            self.residual, self.last = residual, user


def _is_of_channels(numbers: object, node: Node, channel: int) -> bool:
    """Whether a value has one number for each channel of another."""
    value, of = value_of(numbers), value_of(node)
    if value is None or of is None or value.dim() > of.dim():
        return False
    channel, missing = channel % of.dim(), of.dim() - value.dim()
    wanted = [of.shape[i] if i == channel else 1 for i in range(of.dim())]
    return are_equal([*[1] * missing, *value.shape], wanted)
