"""Layers of a server, filled from a compressed layer's state: all processes together compute what the layer does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from shrank import LED
from shrank.layers.seal import seal
from shrank.linalg import Shape
from shrank.ops import dispatch
from shrank.planning.plan import LayerPlan
from shrank.serving.pieces import Piece, run
from shrank.serving.shares import Slice, shares
from tests.common.models import draw, seeded
from tests.common.tolerances import assert_close

K = 24
each_form = pytest.mark.parametrize("pivot", [False, True], ids=["plain", "pivoted"])
each_bias = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def led(outputs: int, rank: int, bias: bool, pivot: bool) -> LED:
    layer = seeded(lambda: LED(K, outputs, rank, bias, pivot=pivot)).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(draw(*parameter.shape) / 2)
    if pivot:
        layer.stages[2].order = torch.randperm(outputs, generator=torch.Generator().manual_seed(1)).int()
        layer.stages[2].settle()
    return layer


def plan_of(fqn: str, layer: LED) -> LayerPlan:
    return LayerPlan(fqn, layer.kind, layer.shape.dense_params, layer.shape, layer.rank)


def filled(
    layers: dict[str, LED], rows: Sequence[Slice], columns: Slice, bias: bool
) -> tuple[list[Piece], Tensor | None]:
    """The pieces of a process and its bias, read from the state of the layers, sealed as in files."""
    found = shares(list(layers), {fqn: plan_of(fqn, layer) for fqn, layer in layers.items()}, rows, columns)
    pieces, biases = [Piece(share, torch.float32, bias) for share in found], []
    for piece, layer in zip(pieces, layers.values(), strict=True):
        assert piece.missing and not piece.is_complete
        for name, value in (layer.state_dict() | {"weight": seal(layer.weight_shape)}).items():
            own = piece.take(name, value)
            biases += [] if own is None else [own]
        assert not piece.missing
    return pieces, torch.cat(biases) if bias else None


@each_bias
@each_form
@pytest.mark.parametrize("processes", [1, 2, 4])
@torch.no_grad()
def test_rows_by_processes_are_the_stacked_layers(processes: int, pivot: bool, bias: bool) -> None:
    layers = {name: led(n, rank, bias, pivot) for name, n, rank in (("q", 32, 6), ("k", 16, 3), ("v", 16, 5))}
    x = draw(5, K)
    outputs = []
    for p in range(processes):
        rows = [Slice.of(layer.out_features // processes, p, processes) for layer in layers.values()]
        pieces, own = filled(layers, rows, Slice.of(K), bias)
        assert [piece.keeps_pivots for piece in pieces] == [pivot and processes == 1] * 3
        outputs.append(run(pieces, x, own).split([piece.share.outputs for piece in pieces], -1))
        dense = torch.cat([piece.dense_weight() for piece in pieces])
        wanted = [layer.dense_weight().chunk(processes)[p] for layer in layers.values()]
        assert_close(dense, torch.cat(wanted))
    for number, layer in enumerate(layers.values()):
        assert_close(torch.cat([output[number] for output in outputs], -1), layer(x))


@each_bias
@each_form
@torch.no_grad()
def test_columns_by_processes_add_up_to_the_layer(pivot: bool, bias: bool) -> None:
    layer, x, processes = led(32, 6, bias, pivot), draw(5, K), 3
    total = 0
    for p in range(processes):
        columns = Slice.of(K // processes, p, processes)
        pieces, own = filled({"o": layer}, [Slice.of(32)], columns, bias)
        assert pieces[0].keeps_pivots == pivot
        total = total + run(pieces, x[:, columns.start : columns.start + columns.count], own if p == 0 else None)
    assert_close(total, layer(x))


@torch.no_grad()
def test_dense_plain_and_pivoted_layers_are_stacked_in_order() -> None:
    plain, pivoted, weight, bias = led(16, 3, False, False), led(8, 2, False, True), draw(8, K), draw(32)
    plans = {"a": plan_of("a", plain), "c": plan_of("c", pivoted)}
    found = shares(["a", "b", "c"], plans, [Slice.of(n) for n in (16, 8, 8)], Slice.of(K))
    pieces = [Piece(share, torch.float32, False) for share in found]
    for piece, state in zip(pieces, (plain.state_dict(), {"weight": weight}, pivoted.state_dict()), strict=True):
        for name, value in state.items():
            piece.take(name, value)
    x = draw(5, K)
    assert_close(run(pieces, x, bias), torch.cat((plain(x), x @ weight.T, pivoted(x)), -1) + bias)


@torch.no_grad()
def test_layers_of_one_input_are_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {
        name: led(16, rank, False, pivot) for name, rank, pivot in (("q", 6, False), ("k", 3, True), ("v", 5, False))
    }
    pieces, _ = filled(layers, [Slice.of(16)] * 3, Slice.of(K), False)
    asked = []
    for name in ("low_rank_linear", "low_rank_linear_multi", "low_rank_pivoted"):
        op = getattr(dispatch, name)
        monkeypatch.setattr(f"shrank.serving.pieces.{name}", lambda *a, op=op: asked.append(op.__name__) or op(*a))
    x = draw(5, K)
    assert_close(run(pieces, x, None), torch.cat([layer(x) for layer in layers.values()], -1))
    assert asked == ["low_rank_linear_multi"]
    bias = draw(3 * 16)
    assert_close(run(pieces, x, bias), torch.cat([layer(x) for layer in layers.values()], -1) + bias)
    for piece in pieces[:2]:
        run([piece], x, None)
    assert asked[2:] == ["low_rank_linear", "low_rank_pivoted"]


@torch.no_grad()
@each_bias
def test_compilers_see_one_graph_for_any_number_of_tokens(bias: bool) -> None:
    layers = {
        name: led(16, rank, bias, pivot) for name, rank, pivot in (("q", 6, False), ("k", 3, True), ("v", 5, False))
    }
    pieces, stacked = filled(layers, [Slice.of(16)] * 3, Slice.of(K), bias)
    held = nn.ModuleList(pieces)  # as a layer of a server has them
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (5, 1, 9):
        x = draw(tokens, K)
        assert_close(compiled(held, x, stacked), torch.cat([layer(x) for layer in layers.values()], -1))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("led_unit.0.weight", draw(4, K), r"q.led_unit.0.weight: is \(4, 24\) in the files, wanted \(3, 24\)"),
        ("led_unit.1.bias", draw(16), "q.led_unit.1.bias: the files hold it.*16x24 of rank 3 without a bias"),
        ("led_unit.2.order", torch.arange(16), "q.led_unit.2.order: the files hold it"),
        ("weight", draw(16, K), "q.weight: the files hold it"),
    ],
)
def test_what_does_not_belong_to_the_layer_is_refused(name: str, value: Tensor, says: str) -> None:
    plans = {"q": LayerPlan("q", "Linear", 16 * K, Shape(16, K), 3)}
    (share,) = shares(["q"], plans, [Slice.of(16)], Slice.of(K))
    with pytest.raises(ValueError, match=says):
        Piece(share, torch.float32, False).take(name, value)


def test_factors_and_seals_of_a_dense_layer_are_refused() -> None:
    (share,) = shares(["q"], {}, [Slice.of(16)], Slice.of(K))
    for name, value, says in (
        ("weight", seal((16, K)), r"q.weight: is \(6,\)"),
        ("led_unit.0.weight", draw(3, K), "q.led_unit.0.weight: the files hold it, and the plan says that .* dense"),
    ):
        with pytest.raises(ValueError, match=says):
            Piece(share, torch.float32, False).take(name, value)


def test_an_order_that_is_none_is_refused() -> None:
    layer = led(16, 3, False, True)
    state = layer.state_dict() | {"led_unit.2.order": torch.zeros(16, dtype=torch.int32)}
    (share,) = shares(["q"], {"q": plan_of("q", layer)}, [Slice.of(16)], Slice.of(K))
    piece = Piece(share, torch.float32, False)
    with pytest.raises(ValueError, match=r"q\.led_unit\.2\.order: is no permutation of 16 outputs"):
        for name, value in state.items():
            piece.take(name, value)
