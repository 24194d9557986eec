"""A low-rank op takes over what follows it, and only where nothing else changes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from shrank.fusing import graph as nodes
from shrank.fusing.rewrite import fuse
from tests.common.tolerances import assert_close

# Of each op that is left: its activation, behind "gated " where it is a gate's, and whether it adds a residual.
Ends = list[tuple[str, bool]]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


DOWN, UP, BIAS = drawn(4, 8), drawn(8, 4), drawn(8)
FILTERS, POINTWISE, CHANNEL_BIAS = drawn(4, 8, 3, 3), drawn(6, 4, 1, 1), drawn(6)


def low_rank(x: Tensor) -> Tensor:
    return torch.ops.shrank.low_rank_linear(x, DOWN, UP, BIAS)


GATE = (drawn(3, 8), drawn(8, 3), None)


def gate(x: Tensor) -> Tensor:
    return torch.ops.shrank.low_rank_linear(x, *GATE)


PIVOTS = (drawn(4, 8), drawn(4, 4), drawn(4), drawn(4), torch.tensor([4, 0, 5, 6, 1, 2, 7, 3], dtype=torch.int32))


def pivoted(x: Tensor) -> Tensor:
    return torch.ops.shrank.low_rank_pivoted(x, *PIVOTS)


OTHER_PIVOTS = (drawn(3, 8), drawn(5, 3), None, None, torch.tensor([3, 7, 0, 4, 2, 5, 1, 6], dtype=torch.int32))


def other_pivoted(x: Tensor) -> Tensor:
    return torch.ops.shrank.low_rank_pivoted(x, *OTHER_PIVOTS)


def low_rank_conv(x: Tensor, bias: Tensor | None = CHANNEL_BIAS) -> Tensor:
    return torch.ops.shrank.low_rank_conv(x, FILTERS, POINTWISE, bias, [1, 1], [1, 1], [1, 1], 1, 1)


def ends_of(graph: torch.fx.Graph) -> Ends:
    """Several layers in one op are that many times "multi"."""
    calls = [n for n in graph.nodes if n.op == "call_function" and "shrank" in str(n.target)]
    found = []
    for call in calls:
        names = [each.name for each in getattr(call.target, "default", call.target)._schema.arguments]
        given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
        gated = "gated " * ("gated" in str(call.target))
        if "multi" in str(call.target):
            found += [("multi", False)] * len(given["down"])
            continue
        found.append((gated + given.get("activation", "none"), given.get("residual") is not None))
    return found


def fusing(before: list[Ends], after: list[Ends]) -> Callable:
    """A backend of torch.compile that only runs the pass, and notes the ends of each graph before and after."""

    def backend(module: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        before.append(ends_of(module.graph))
        fuse(module.graph)
        module.graph.lint()
        module.recompile()
        after.append(ends_of(module.graph))
        return module

    return backend


def fused(function: Callable, *inputs: Tensor, dynamic: bool = False) -> tuple[Ends, object]:
    """What the pass leaves of the function's graph, and what that computes."""
    torch._dynamo.reset()
    before: list[Ends] = []
    after: list[Ends] = []
    answer = torch.compile(function, backend=fusing(before, after), fullgraph=True, dynamic=dynamic)(*inputs)
    return after[0], answer


def exported(function: Callable, *inputs: Tensor) -> tuple[Ends, object]:
    """The same of the graph that torch.export makes, in the vocabulary of ATen."""

    class Module(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return function(*inputs)

    module = torch.export.export(Module(), inputs).module()
    fuse(module.graph)
    module.graph.lint()
    module.recompile()
    return ends_of(module.graph), module(*inputs)


def tanh_gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


SPELLED_OUT = "gelu by tanh, spelled out"
TAKEN = {
    "relu": (lambda x: F.relu(low_rank(x)), ("relu", False)),
    "a method": (lambda x: low_rank(x).relu(), ("relu", False)),
    "in place": (lambda x: F.relu(low_rank(x), inplace=True), ("relu", False)),
    "gelu": (lambda x: F.gelu(low_rank(x)), ("gelu", False)),
    "gelu by tanh": (lambda x: F.gelu(low_rank(x), approximate="tanh"), ("gelu_tanh", False)),
    SPELLED_OUT: (lambda x: tanh_gelu(low_rank(x)), ("gelu_tanh", False)),
    "silu": (lambda x: F.silu(low_rank(x)), ("silu", False)),
    "a residual": (lambda x: low_rank(x) + x, ("none", True)),
    "a residual before": (lambda x: x + low_rank(x), ("none", True)),
    "torch.add": (lambda x: torch.add(x, low_rank(x)), ("none", True)),
    "both": (lambda x: x + F.gelu(low_rank(x)), ("gelu", True)),
    "dropout of nothing": (lambda x: x + F.dropout(low_rank(x), 0.1, training=False), ("none", True)),
    "a gate": (lambda x: F.silu(gate(x)) * low_rank(x), ("gated silu", False)),
    "a gate behind": (lambda x: low_rank(x) * F.gelu(gate(x)), ("gated gelu", False)),
    "a gate of relu": (lambda x: torch.mul(gate(x).relu(), low_rank(x)), ("gated relu", False)),
    "a gate with dropout of nothing": (
        lambda x: F.dropout(F.silu(gate(x)), 0.1, training=False) * low_rank(x),
        ("gated silu", False),
    ),
    "of pivots": (lambda x: x + F.gelu(pivoted(x)), ("gelu", True)),
    "a gate with pivots": (lambda x: F.silu(pivoted(x)) * low_rank(x), ("gated silu", False)),
    "a value with pivots": (lambda x: F.gelu(gate(x)) * pivoted(x), ("gated gelu", False)),
    "both with pivots": (lambda x: F.silu(pivoted(x)) * other_pivoted(x), ("gated silu", False)),
    "both with pivots, the gate behind": (lambda x: pivoted(x) * F.relu(other_pivoted(x)), ("gated relu", False)),
    "dropout with p = 0": (lambda x: x + F.dropout(F.silu(low_rank(x)), 0.0, training=True), ("silu", True)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", TAKEN)
def test_what_follows_an_op_becomes_its_end(name: str, dynamic: bool) -> None:
    function, end = TAKEN[name]
    if dynamic and name == SPELLED_OUT:
        end = ("none", False)  # math.pi is a symbol then, of which nothing is known
    x = drawn(2, 5, 8)
    found, answer = fused(function, x, dynamic=dynamic)
    assert found == [end]
    assert_close(answer, function(x))


@pytest.mark.parametrize("name", TAKEN)
def test_exported_graphs_are_read_as_well(name: str) -> None:
    function, end = TAKEN[name]
    found, answer = exported(function, drawn(2, 5, 8))
    assert found == [end]
    assert_close(answer, function(drawn(2, 5, 8)))


def added_in_place(x: Tensor) -> Tensor:
    y = low_rank(x)
    y += x
    return y


def test_a_sum_in_place_is_a_residual_only_of_the_ops_own_result() -> None:
    def into_x(x: Tensor) -> Tensor:
        x += low_rank(x)
        return x

    assert fused(added_in_place, drawn(3, 8))[0] == [("none", True)]
    x = drawn(3, 8)
    found, _ = fused(into_x, x)
    assert found == [("none", False)]
    wanted = drawn(3, 8)
    into_x(wanted)
    assert torch.equal(x, wanted)


def changed_between(x: Tensor) -> Tensor:
    y = low_rank(x)
    x.mul_(2)
    return F.gelu(y)


def item_changed_between(x: Tensor) -> Tensor:
    y = low_rank(x)
    x[0] = 1
    return y + x


def gradients_off_between(x: Tensor) -> Tensor:
    y = low_rank(x)
    with torch.no_grad():
        z = F.gelu(y)
    return z


def autocast_between(x: Tensor) -> Tensor:
    y = low_rank(x)
    with torch.autocast("cpu"):
        z = F.gelu(y)
    return z


WIDE = (drawn(4, 8), drawn(16, 4), drawn(16))


def wide(x: Tensor) -> Tensor:
    return torch.ops.shrank.low_rank_linear(x, *WIDE)


def changed_before_halves(x: Tensor) -> Tensor:
    y = wide(x)
    x.mul_(2)
    return gate_first(y.chunk(2, -1))


def changed_after_halves(x: Tensor) -> Tensor:
    both = wide(x).chunk(2, -1)
    x.mul_(2)
    return gate_first(both)


def autocast_around_halves(x: Tensor) -> Tensor:
    y = wide(x)
    with torch.autocast("cpu"):
        z = gate_first(y.chunk(2, -1))
    return z


LEFT = {
    "two users": lambda x: (lambda y: F.gelu(y) * y)(low_rank(x)),
    "used twice": lambda x: (lambda y: y + y)(low_rank(x)),
    "returned as well": lambda x: (lambda y: (F.gelu(y), y))(low_rank(x)),
    "an activation that the op does not have": lambda x: F.softplus(low_rank(x)),
    "leaky": lambda x: F.leaky_relu(low_rank(x)),
    "a number": lambda x: low_rank(x) + 1,
    "a weighted sum": lambda x: torch.add(x, low_rank(x), alpha=2),
    "broadcast": lambda x: low_rank(x) + x[:1],
    "another dtype": lambda x: low_rank(x) + x.double(),
    "dropout": lambda x: x + F.dropout(low_rank(x), 0.5, training=True),
    "x changed between": changed_between,
    "an item of x changed between": item_changed_between,
    "gradients off between": gradients_off_between,
    "autocast between": autocast_between,
    "of halves, x changed between": changed_before_halves,
    "of halves, x changed after these, between": changed_after_halves,
    "of halves, autocast between": autocast_around_halves,
    "almost gelu by tanh": lambda x: (lambda z: 0.5 * z * (1 + torch.tanh(0.8 * (z + 0.044715 * z**3))))(low_rank(x)),
    "half of gelu by tanh": lambda x: (lambda z: 0.4 * z * (1 + torch.tanh(0.79788456 * (z + 0.044715 * z**3))))(
        low_rank(x)
    ),
}


# torch.export makes of a change in place a new tensor, or refuses it, and keeps no other state.
EXPORTED_ALIKE = {name for name in LEFT if not name.endswith("between")}


@pytest.mark.parametrize("name", LEFT)
def test_all_else_is_left_as_it_is(name: str) -> None:
    x, again = drawn(3, 8), drawn(3, 8)
    torch.manual_seed(0)
    found, answer = fused(LEFT[name], x)
    assert set(found) == {("none", False)}
    if name in EXPORTED_ALIKE:
        assert set(exported(LEFT[name], drawn(3, 8))[0]) == {("none", False)}
    torch.manual_seed(0)
    wanted = LEFT[name](again)
    assert_close(*(each if isinstance(each, Tensor) else each[0] for each in (answer, wanted)))
    assert torch.equal(x, again)


def gate_before_a_change(x: Tensor) -> Tensor:
    opened, value = F.silu(gate(x)), low_rank(x)
    x.mul_(2)
    return opened * value


ONE = (drawn(2, 8), drawn(1, 2), None)
HALF_GATES = {  # what is left of each: the gate takes its activation, and no more
    "of another input": (lambda x: F.silu(gate(x)) * low_rank(x + 1), ["silu", "none"]),
    "whose value is used again": (lambda x: (lambda v: F.silu(gate(x)) * v + v)(low_rank(x)), ["silu", "none"]),
    "whose value is activated": (lambda x: F.silu(gate(x)) * F.gelu(low_rank(x)), ["silu", "gelu"]),
    "used again": (lambda x: (lambda g: g * low_rank(x) + g)(F.silu(gate(x))), ["silu", "none"]),
    "without activation": (lambda x: gate(x) * low_rank(x), ["multi", "multi"]),
    "by a number": (lambda x: F.silu(gate(x)) * 2, ["silu"]),
    "by itself": (lambda x: (lambda g: g * g)(F.silu(gate(x))), ["silu"]),
    "by x": (lambda x: F.silu(gate(x)) * x, ["silu"]),
    "of a broadcast value": (
        lambda x: F.silu(gate(x)) * torch.ops.shrank.low_rank_linear(x, *ONE),
        ["silu", "none"],
    ),
    "that divides": (lambda x: low_rank(x) / F.silu(gate(x)), ["none", "silu"]),
    "before x is changed": (gate_before_a_change, ["silu", "none"]),
}


@pytest.mark.parametrize("name", HALF_GATES)
def test_what_is_no_gated_layer_is_none(name: str) -> None:
    function, ends = HALF_GATES[name]
    found, answer = fused(function, drawn(3, 8))
    assert sorted(end for end, _ in found) == sorted(ends)
    assert_close(answer, function(drawn(3, 8)))


def test_gradients_of_a_gated_layer_are_those_of_its_parts() -> None:
    weights = [each.clone().requires_grad_() for each in (*GATE[:2], DOWN, UP, BIAS)]
    x = drawn(3, 8).requires_grad_()

    def block(x: Tensor) -> Tensor:
        op = torch.ops.shrank.low_rank_linear
        return F.silu(op(x, *weights[:2])) * op(x, *weights[2:])

    found, answer = fused(block, x)
    assert found == [("gated silu", False)]
    for ours, wanted in zip(
        torch.autograd.grad(answer.square().sum(), (x, *weights)),
        torch.autograd.grad(block(x).square().sum(), (x, *weights)),
        strict=True,
    ):
        assert_close(ours, wanted)


@pytest.mark.parametrize("which", ["gate", "value", "both"])
def test_gradients_of_a_gated_layer_with_pivots_are_those_of_its_parts(which: str) -> None:
    plain, pivoted = torch.ops.shrank.low_rank_linear, torch.ops.shrank.low_rank_pivoted
    *gate, gate_order = PIVOTS if which != "value" else (*GATE[:2], BIAS, None)
    *value, order = OTHER_PIVOTS if which != "gate" else (DOWN, UP, BIAS, None)
    gate, value = ([None if each is None else each.clone().requires_grad_() for each in own] for own in (gate, value))
    x = drawn(3, 8).requires_grad_()

    def block(x: Tensor) -> Tensor:
        z = plain(x, *gate) if gate_order is None else pivoted(x, *gate, gate_order)
        return F.silu(z) * (plain(x, *value) if order is None else pivoted(x, *value, order))

    found, answer = fused(block, x)
    assert found == [("gated silu", False)]
    weights = [x, *(each for each in (*gate, *value) if each is not None)]
    ours, wanted = (torch.autograd.grad(each.square().sum(), weights) for each in (answer, block(x)))
    for one, other in zip(ours, wanted, strict=True):
        assert_close(one, other)


class Halves(nn.Module):
    """A layer whose outputs `ends` takes apart; of a model, so that their number is known in dynamic graphs too."""

    def __init__(self, ends: Callable[[Tensor], object], outputs: int = 16, bias: bool = True) -> None:
        super().__init__()
        self.ends = ends
        self.down, self.up = (nn.Parameter(drawn(*shape)) for shape in ((4, 8), (outputs, 4)))
        self.bias = nn.Parameter(drawn(outputs)) if bias else None

    def forward(self, x: Tensor) -> object:
        return self.ends(torch.ops.shrank.low_rank_linear(x, self.down, self.up, self.bias))


def gate_first(halves: tuple[Tensor, Tensor]) -> Tensor:
    gate, value = halves
    return F.silu(gate) * value


def value_first(halves: tuple[Tensor, Tensor]) -> Tensor:
    value, gate = halves
    return value * F.gelu(gate)


TAKEN_HALVES = {
    "chunk": (lambda y: gate_first(y.chunk(2, dim=-1)), "silu"),
    "chunk by a function": (lambda y: gate_first(torch.chunk(y, 2, -1)), "silu"),
    "chunk by names": (lambda y: gate_first(torch.chunk(y, chunks=2, dim=-1)), "silu"),
    "chunk of the last of three": (lambda y: gate_first(y.chunk(2, 2)), "silu"),
    "split": (lambda y: gate_first(y.split(8, dim=-1)), "silu"),
    "split by a function": (lambda y: gate_first(torch.split(y, 8, -1)), "silu"),
    "split by names": (lambda y: gate_first(torch.split(y, split_size_or_sections=8, dim=2)), "silu"),
    "split into sizes": (lambda y: gate_first(y.split([8, 8], -1)), "silu"),
    "split into sizes by a function": (lambda y: gate_first(torch.split(y, (8, 8), -1)), "silu"),
    "the value first": (lambda y: value_first(y.chunk(2, dim=-1)), "gelu"),
    "the value first, split": (lambda y: value_first(y.split(8, dim=-1)), "gelu"),
    "the value before the gate in the product": (
        lambda y: (lambda gate, value: value * F.silu(gate))(*y.chunk(2, -1)),
        "silu",
    ),
    "dropout of nothing": (
        lambda y: (lambda gate, value: F.dropout(F.relu(gate), 0.1, training=False) * value)(*y.chunk(2, -1)),
        "relu",
    ),
}
HALVES_BY = {
    "fused": fused,
    "fused, dynamic": lambda module, x: fused(module, x, dynamic=True),
    "exported": exported,
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("look", HALVES_BY)
@pytest.mark.parametrize("name", TAKEN_HALVES)
def test_a_gate_and_its_value_may_be_the_halves_of_one_layer(name: str, look: str, bias: bool) -> None:
    ends, activation = TAKEN_HALVES[name]
    module, x = Halves(ends, bias=bias), drawn(2, 5, 8)
    found, answer = HALVES_BY[look](module, x)
    assert found == [(f"gated {activation}", False)]
    assert_close(answer, module(x))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("order", [gate_first, value_first])
def test_gradients_of_halves_are_those_of_the_layer(order: Callable, bias: bool) -> None:
    module, x = Halves(lambda y: order(y.chunk(2, -1)), bias=bias), drawn(3, 8).requires_grad_()
    found, answer = fused(module, x)
    assert [end.partition(" ")[0] for end, _ in found] == ["gated"]
    wanted = (x, *module.parameters())
    ours, theirs = (torch.autograd.grad(each.square().sum(), wanted) for each in (answer, module(x)))
    assert len(ours) == 3 + bias
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def halves(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.chunk(2, -1)


# What each does with the outputs, and how many they are if not 16.
LEFT_HALVES = {
    "without activation": lambda y: (lambda a, b: a * b)(*halves(y)),
    "an activation that the op does not have": lambda y: (lambda a, b: F.softplus(a) * b)(*halves(y)),
    "both activated": lambda y: (lambda a, b: F.silu(a) * F.silu(b))(*halves(y)),
    "activated in place": lambda y: (lambda a, b: F.silu(a, inplace=True) * b)(*halves(y)),
    "one half alone": lambda y: F.silu(halves(y)[0]) * 2,
    "one half by itself": lambda y: (lambda a, b: F.silu(a) * a)(*halves(y)),
    "a sum": lambda y: (lambda a, b: F.silu(a) + b)(*halves(y)),
    "a quotient": lambda y: (lambda a, b: b / F.silu(a))(*halves(y)),
    "the outputs used again": lambda y: gate_first(halves(y)) + y.sum(),
    "the gate used again": lambda y: (lambda a, b: F.silu(a) * b + a)(*halves(y)),
    "the activated gate used again": lambda y: (lambda a, b: a * b + a)(F.silu(halves(y)[0]), halves(y)[1]),
    "the value used again": lambda y: (lambda a, b: F.silu(a) * b + b)(*halves(y)),
    "something before": lambda y: gate_first(halves(y.tanh())),
    "two of three": (lambda y: gate_first(y.chunk(3, -1)[:2]), 18),
    "two of three, split": (lambda y: gate_first(y.split(6, -1)[:2]), 18),
    "odd": (lambda y: gate_first(halves(y)), 3),
    "uneven": lambda y: gate_first(y.split([15, 1], -1)),
    "uneven, by the larger": lambda y: gate_first(y.split(15, -1)),
    "along rows": lambda y: gate_first(y.chunk(2, 0)),
    "along rows by default": lambda y: gate_first(y.chunk(2)),
    "along the middle": lambda y: gate_first(y.split(8, 1)),
    "along the middle, from behind": lambda y: gate_first(y.chunk(2, dim=-2)),
}


@pytest.mark.parametrize("look", HALVES_BY)
@pytest.mark.parametrize("name", LEFT_HALVES)
def test_all_other_halves_are_left(name: str, look: str) -> None:
    ends, outputs = LEFT_HALVES[name] if isinstance(LEFT_HALVES[name], tuple) else (LEFT_HALVES[name], 16)
    module, x = Halves(ends, outputs).requires_grad_(False), drawn(2, 16, 8)
    found, answer = HALVES_BY[look](module, x)
    assert found == [("none", False)]
    assert_close(answer, module(x))


def test_halves_of_an_unknown_number_of_outputs_are_left() -> None:
    def block(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return gate_first(torch.ops.shrank.low_rank_linear(x, down, up, None).chunk(2, -1))

    given = (drawn(3, 8), *WIDE[:2])
    for dynamic, end in ((True, "none"), (False, "gated silu")):
        found, answer = fused(block, *given, dynamic=dynamic)
        assert found == [(end, False)]
        assert_close(answer, block(*given))


@pytest.mark.parametrize("wrong", [None, "low_rank_gated"])
def test_halves_are_left_where_the_op_was_found_wrong_on_the_card(wrong: str | None, monkeypatch) -> None:
    monkeypatch.setattr(nodes.self_check, "why_not_op", lambda op, x: (op,) * (op == wrong and x.is_cuda))
    graph = torch.fx.Graph()

    def noted(node: torch.fx.Node, *shape: int) -> torch.fx.Node:
        with FakeTensorMode():
            node.meta["val"] = torch.empty(shape, device="cuda")
        return node

    shapes = {"x": (3, 8), "down": (4, 8), "up": (16, 4)}
    given = [noted(graph.placeholder(name), *shape) for name, shape in shapes.items()]
    y = noted(graph.call_function(torch.ops.shrank.low_rank_linear.default, tuple(given)), 3, 16)
    both = graph.call_function(torch.chunk, (y, 2, -1))
    one, other = (noted(graph.call_function(operator.getitem, (both, place)), 3, 8) for place in (0, 1))
    opened = noted(graph.call_function(F.silu, (one,)), 3, 8)
    graph.output(noted(graph.call_function(torch.mul, (opened, other)), 3, 8))
    fuse(graph)
    assert ends_of(graph) == [("none" if wrong else "gated silu", False)]


def test_halves_of_a_convolutions_outputs_are_left() -> None:
    def block(x: Tensor) -> Tensor:
        return gate_first(low_rank_conv(x).chunk(2, -1))

    x = drawn(2, 8, 5, 6)
    for look in (fused, exported):
        found, answer = look(block, x)
        assert found == [("none", False)]
        assert_close(answer, block(x))


def test_a_layer_of_halves_keeps_its_residual_where_it_has_one() -> None:
    def block(x: Tensor, residual: Tensor) -> Tensor:
        return gate_first(torch.ops.shrank.low_rank_linear(x, *WIDE, "none", residual).chunk(2, -1))

    assert fused(block, drawn(3, 8), drawn(3, 16))[0] == [("none", True)]


KEY = (drawn(2, 8), drawn(6, 2), drawn(6))
DENSE = drawn(5, 8)


def key(x: Tensor) -> Tensor:
    return torch.ops.shrank.low_rank_linear(x, *KEY)


def siblings(x: Tensor) -> Tensor:
    return low_rank(x) * 2, key(x) + 1, gate(x).sin()


def siblings_with_ends(x: Tensor) -> Tensor:
    return low_rank(x) + x, key(x) + 1, gate(x).sin()


def of_two_inputs(x: Tensor) -> Tensor:
    other = x.cos()
    return low_rank(x), key(other), gate(x), gate(other)


def changed_between_siblings(x: Tensor) -> Tensor:
    y = low_rank(x) * 2
    x.mul_(2)
    return y, key(x)


def factor_made_between(x: Tensor) -> Tensor:
    y = low_rank(x)
    return y * 2, torch.ops.shrank.low_rank_linear(x, KEY[0] * y.mean(), *KEY[1:])


def pivoted_siblings(x: Tensor) -> Tensor:
    return pivoted(x) * 2, other_pivoted(x) + 1


def mixed_siblings(x: Tensor) -> Tensor:
    return low_rank(x) * 2, F.linear(x, DENSE), other_pivoted(x).sin(), key(x) + 1, pivoted(x)


def order_made_between(x: Tensor) -> Tensor:
    y = low_rank(x)
    *factors, order = PIVOTS
    return y * 2, torch.ops.shrank.low_rank_pivoted(x, *factors, (order + (y.sum() > 1e9)).int())


def siblings_of_a_sibling(x: Tensor) -> Tensor:
    y = low_rank(x)
    return key(y) * 2, gate(y).sin(), gate(x).cos()


SIBLINGS = {
    "of a sibling": (siblings_of_a_sibling, ["multi"] * 4),
    "three": (siblings, ["multi"] * 3),
    "with pivots": (pivoted_siblings, ["multi"] * 2),
    "with pivots, without, and dense": (mixed_siblings, ["multi"] * 4),
    "with an order that is made between": (order_made_between, ["none"] * 2),
    "with an end": (siblings_with_ends, ["none", "multi", "multi"]),
    "of two inputs": (of_two_inputs, ["multi"] * 4),
    "with a change between": (changed_between_siblings, ["none"] * 2),
    "with a factor that is made between": (factor_made_between, ["none"] * 2),
}


@pytest.mark.parametrize(
    ("name", "look"),  # torch.export makes of a change in place a new tensor
    [
        (name, look)
        for name in SIBLINGS
        for look in (fused, exported)
        if (name, look) != ("with a change between", exported)
    ],
)
def test_layers_of_one_input_become_one_op(name: str, look: Callable) -> None:
    function, ends = SIBLINGS[name]
    found, answer = look(function, drawn(3, 8))
    assert sorted(end for end, _ in found) == sorted(ends)
    for ours, right in zip(answer, function(drawn(3, 8)), strict=True):
        assert_close(ours, right)


def test_gradients_of_siblings_are_those_of_the_layers() -> None:
    weights = [each.clone().requires_grad_() for each in (DOWN, UP, BIAS, *KEY)]
    x = drawn(3, 8).requires_grad_()

    def block(x: Tensor) -> Tensor:
        op = torch.ops.shrank.low_rank_linear
        return op(x, *weights[:3]).square().sum() + op(x, *weights[3:]).sin().sum()

    found, answer = fused(block, x)
    assert found == [("multi", False)] * 2
    ours, wanted = (torch.autograd.grad(each, (x, *weights)) for each in (answer, block(x)))
    for one, other in zip(ours, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("wrong", [None, "low_rank_gated", "low_rank_linear_multi"])
def test_no_op_is_brought_in_that_was_found_wrong_on_the_card(wrong: str | None, monkeypatch) -> None:
    """Of a model on a GPU, as its graph is when it is compiled."""
    monkeypatch.setattr(nodes.self_check, "why_not_op", lambda op, x: (op,) * (op == wrong and x.is_cuda))
    graph = torch.fx.Graph()
    with FakeTensorMode():
        tensors = {"x": (3, 8), "down": (4, 8), "up": (8, 4), "gate_down": (2, 8), "gate_up": (8, 2)}
        made = {name: torch.empty(shape, device="cuda") for name, shape in tensors.items()}
        x, down, up, gate_down, gate_up = (graph.placeholder(name) for name in made)
        y = torch.empty(3, 8, device="cuda")
    for node, value in zip((x, down, up, gate_down, gate_up), made.values(), strict=True):
        node.meta["val"] = value

    def call(function: Callable, *arguments: torch.fx.Node) -> torch.fx.Node:
        node = graph.call_function(function, arguments)
        node.meta["val"] = y
        return node

    op = torch.ops.shrank.low_rank_linear.default
    product = call(torch.mul, call(F.silu, call(op, x, gate_down, gate_up)), call(op, x, down, up))
    graph.output((product, call(op, x, down, up), call(op, x, gate_down, gate_up)))
    fuse(graph)
    expected = {
        None: ["gated silu", "multi", "multi"],
        "low_rank_gated": ["silu", "multi", "multi", "multi"],  # the value is a sibling then
        "low_rank_linear_multi": ["gated silu", "none", "none"],
    }
    assert sorted(end for end, _ in ends_of(graph)) == sorted(expected[wrong])


def test_an_op_that_has_an_end_gets_no_second_one() -> None:
    def activated(x: Tensor) -> Tensor:
        return torch.ops.shrank.low_rank_linear(x, DOWN, UP, BIAS, "relu") + x

    assert fused(activated, drawn(3, 8))[0] == [("relu", False)]


MEAN, VARIANCE, SCALE, SHIFT = drawn(6), drawn(6, 1).abs().flatten() + 0.1, drawn(6, 2)[:, 0], drawn(6, 3)[:, 0]


def norm(x: Tensor, training: bool = False, affine: bool = True) -> Tensor:
    return F.batch_norm(x, MEAN, VARIANCE, *((SCALE, SHIFT) if affine else (None, None)), training)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [CHANNEL_BIAS, None], ids=["bias", "no bias"])
def test_a_batch_norm_becomes_a_part_of_a_convolutions_second_factor(bias: Tensor | None, affine: bool) -> None:
    def block(x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(norm(low_rank_conv(x, bias), affine=affine)) + residual

    x, residual = drawn(2, 8, 5, 7), drawn(2, 6, 5, 7)
    for look in (fused, exported):
        found, answer = look(block, x, residual)
        assert found == [("relu", True)]
        assert_close(answer, block(x, residual))


def test_a_compiler_can_trace_what_was_folded() -> None:
    weights = [each.clone().requires_grad_() for each in (FILTERS, POINTWISE, CHANNEL_BIAS, SCALES, SHIFTS)]

    def block(x: Tensor) -> Tensor:
        y = torch.ops.shrank.low_rank_conv(x, *weights[:3], [1, 1], [1, 1], [1, 1], 1, 1)
        return F.relu(norm(y) * weights[3] + weights[4])

    def backend(module: torch.fx.GraphModule, given: list) -> Callable:
        return aot_eager(fusing([], [])(module, given), given)

    torch._dynamo.reset()
    x = drawn(2, 8, 5, 7)
    found, wanted = torch.compile(block, backend=backend, fullgraph=True)(x), block(x)
    assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad(each.square().sum(), weights) for each in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def test_a_batch_norm_that_learns_is_left() -> None:
    x = drawn(2, 8, 5, 7)
    assert fused(lambda x: F.relu(norm(low_rank_conv(x), training=True)), x)[0] == [("none", False)]


LAYER_SCALE, ROW = drawn(8), drawn(1, 1, 8)
OF_ROWS, OF_BOTH, OF_IMAGES, OF_ALL, OF_FOUR = (
    drawn(*each) for each in ((5, 1), (5, 8), (2, 1, 1), (1,), (1, 1, 1, 8))
)
PIXELS, OF_FIRST = drawn(5), drawn(8, 1, 1)
SCALES, SHIFTS = drawn(6, 1, 1), drawn(1, 6, 1, 1)


def is_fused_to(function: Callable, end: tuple[str, bool], *inputs: Tensor, looks: tuple[Callable, ...]) -> None:
    for look in looks:
        found, answer = look(function, *inputs)
        assert found == [end]
        assert_close(answer, function(*inputs))


CHANNELS = {
    "a layer scale": (lambda x: x + low_rank(x) * LAYER_SCALE, ("none", True)),
    "a layer scale before": (lambda x: LAYER_SCALE * low_rank(x) + x, ("none", True)),
    "a layer scale, with dropout of nothing": (
        lambda x: x + F.dropout(F.dropout(low_rank(x), 0.1, False) * LAYER_SCALE, 0.1, False),
        ("none", True),
    ),
    "a shift and an activation": (lambda x: F.gelu(low_rank(x) + ROW), ("gelu", False)),
    "of a layer without bias": (lambda x: F.relu((gate(x) * LAYER_SCALE + ROW) * ROW), ("relu", False)),
    "a scale of a layer without bias": (lambda x: F.relu(gate(x) * ROW), ("relu", False)),
    "a gate": (lambda x: F.silu(gate(x) * LAYER_SCALE + ROW) * low_rank(x), ("gated silu", False)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CHANNELS)
def test_numbers_for_channels_become_a_part_of_the_second_factor(name: str, dynamic: bool) -> None:
    function, end = CHANNELS[name]
    x = drawn(2, 5, 8)
    is_fused_to(function, end, x, looks=(lambda *given: fused(*given, dynamic=dynamic), exported))


@pytest.mark.parametrize("bias", [CHANNEL_BIAS, None], ids=["bias", "no bias"])
def test_a_frozen_batch_norm_becomes_a_part_of_a_convolution(bias: Tensor | None) -> None:
    def block(x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(norm(low_rank_conv(x, bias)) * SCALES + SHIFTS) + residual

    is_fused_to(block, ("relu", True), drawn(2, 8, 5, 7), drawn(2, 6, 5, 7), looks=(fused, exported))


NO_CHANNELS = {
    "with nothing behind": lambda x: low_rank(x) * LAYER_SCALE,
    "used again": lambda x: (lambda y: y * LAYER_SCALE + y)(low_rank(x)),
    "of rows": lambda x: low_rank(x) * OF_ROWS + x,
    "of both": lambda x: low_rank(x) * OF_BOTH + x,
    "of images": lambda x: low_rank(x) * OF_IMAGES + x,
    "one for all": lambda x: low_rank(x) * OF_ALL + x,
    "with a dimension more": lambda x: low_rank(x) * OF_FOUR + x,
    "of another dtype": lambda x: low_rank(x) * LAYER_SCALE.double() + x,
    "that are divided": lambda x: low_rank(x) / LAYER_SCALE + x,
    "of pivoted factors": lambda x: pivoted(x) * LAYER_SCALE + x,
    "of another dimension of an image": lambda x: F.relu(low_rank_conv(x.reshape(1, 8, 2, 5)) * PIXELS),
    "of the first of three dimensions": lambda x: low_rank(x[:1].expand(8, 5, 8)) * OF_FIRST + x[0],
}


@pytest.mark.parametrize("name", NO_CHANNELS)
def test_other_numbers_are_not_those_of_channels(name: str) -> None:
    x = drawn(2, 5, 8)
    found, answer = fused(NO_CHANNELS[name], x)
    assert found == [("none", False)]
    assert_close(answer, NO_CHANNELS[name](x))


def test_a_residual_as_large_as_a_shift_is_none() -> None:
    for row in (drawn(8), drawn(1, 8)):
        found, answer = fused(lambda x: low_rank(x) + x, row)
        assert found == [("none", True)]
        assert_close(answer, low_rank(row) + row)
    image = drawn(1, 6, 1, 1)
    is_fused_to(lambda x, y: F.relu(low_rank_conv(x) + y), ("none", True), drawn(1, 8, 1, 1), image, looks=(fused,))


def test_gradients_of_scales_and_shifts_are_those_of_the_separate_operations() -> None:
    weights = [each.clone().requires_grad_() for each in (DOWN, UP, BIAS, LAYER_SCALE, ROW)]
    x = drawn(2, 5, 8).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return x + F.gelu(torch.ops.shrank.low_rank_linear(x, *weights[:3]) * weights[3] + weights[4])

    found, answer = fused(block, x)
    assert found == [("gelu", True)]
    ours, wanted = (torch.autograd.grad(each.square().sum(), (x, *weights)) for each in (answer, block(x)))
    for one, other in zip(ours, wanted, strict=True):
        assert_close(one, other)


def test_gradients_are_those_of_the_separate_operations() -> None:
    weights = [each.clone().requires_grad_() for each in (DOWN, UP, BIAS)]
    x = drawn(3, 8).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return x + F.gelu(torch.ops.shrank.low_rank_linear(x, *weights))

    found, answer = fused(block, x)
    assert found == [("gelu", True)]
    for ours, wanted in zip(
        torch.autograd.grad(answer.square().sum(), (x, *weights)),
        torch.autograd.grad(block(x).square().sum(), (x, *weights)),
        strict=True,
    ):
        assert_close(ours, wanted)


def test_a_chain_of_layers_is_fused_layer_by_layer() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + low_rank(F.silu(low_rank(x)))

    x = drawn(3, 8)
    found, answer = fused(Block(), x)
    assert found == [("silu", False), ("none", True)]
    assert_close(answer, Block()(x))
