"""Several layers of one input in one op: the bits, the gradients and the law of the layers one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import shrank
from shrank.ops import multi, pivoted_reference, reference
from tests.common.linear_cases import LinearCase
from tests.common.ops import DTYPES, doubled, ops_of
from tests.common.pivoted_cases import PivotedCase
from tests.common.tolerances import assert_close

Given = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None], list[Tensor | None], list[Tensor | None]]
SIZES = [(40, 8, True), (24, 16, False), (72, 4, True)]  # outputs, rank, whether there is a bias
PIVOTED = [(40, 8, "both"), (24, 16, "none"), (40, 24, "pivots")]  # the same, of pivoted layers
MIXED = [PIVOTED[0], SIZES[1], (72, 4, "others")]
KINDS = [SIZES, PIVOTED, MIXED]


def arguments(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch: tuple[int, ...] = (3, 5),
    sizes: list[tuple[int, int, bool | str]] = SIZES,
    K: int = 48,
    requires_grad: bool = False,
) -> Given:
    """Orders of pivoted layers differ, also where these have one size."""
    layers = []
    for i, (N, R, bias) in enumerate(sizes):
        if isinstance(bias, bool):
            layers.append((*LinearCase(batch, K, N, R, bias).tensors(dtype, device, requires_grad)[:4], None, None))
        else:
            *tensors, order = PivotedCase(batch, K, N, R, bias).tensors(dtype, device, requires_grad)[:6]
            layers.append((*tensors, order.roll(i)))
    return layers[0][0], *([layer[i] for layer in layers] for i in range(1, 6))


def op(given: Given) -> list[Tensor]:
    return torch.ops.shrank.low_rank_linear_multi(*given)


def layers_of(given: Given) -> list[tuple]:
    x, *lists = given
    return [(x, *each) for each in zip(*lists, strict=True)]


def own_op(layer: tuple) -> Tensor:
    """What a layer's own op gives it."""
    ops = torch.ops.shrank
    return ops.low_rank_linear(*layer[:4]) if layer[5] is None else ops.low_rank_pivoted(*layer)


def in_pytorch(layer: tuple) -> Tensor:
    return reference.low_rank_linear(*layer[:4]) if layer[5] is None else pivoted_reference.low_rank_pivoted(*layer)


def leaves(given: Given) -> list[Tensor]:
    x, *lists = given
    return [x, *(each for of_one in lists for each in of_one if each is not None)]


def floating(given: Given) -> list[Tensor]:
    return [each for each in leaves(given) if each.is_floating_point()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (3, 5), (130,)], ids=str)
@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[:2], *KINDS, PIVOTED[:2]])
def test_each_layer_gets_the_bits_of_its_own_op(sizes: list, batch: tuple, dtype: torch.dtype, device: str) -> None:
    given = arguments(dtype, device, batch, sizes)
    before = [each.clone() for each in leaves(given)]
    found = op(given)
    for y, layer in zip(found, layers_of(given), strict=True):
        assert y.is_contiguous() and torch.equal(y, own_op(layer))
    assert all(map(torch.equal, before, leaves(given))), "inputs stay"


MANY = [
    [(1032, 72, True), (264, 40, False), (264, 40, True)] * 2,
    [(520, 16, True)] * 4,
    [(520, 72, "both"), (264, 40, "none"), (264, 40, False), (264, 136, "pivots")],
    [(136, 136, "both"), (264, 40, True), (264, 40, "both")],
]


@pytest.mark.parametrize("sizes", MANY)
@pytest.mark.parametrize("M", [1, 5, 17, 65])
def test_many_layers_on_few_rows_and_on_more(sizes: list, M: int, device: str) -> None:
    given = arguments(torch.bfloat16, device, (M,), sizes, K=1024)
    found = op(given)
    for y, layer in zip(found, layers_of(given), strict=True):
        assert torch.equal(y, own_op(layer))
        assert_close(y, in_pytorch(doubled(layer)), in_pytorch(layer))


@pytest.mark.parametrize("sizes", KINDS)
def test_gradients_are_those_of_the_layers(sizes: list, device: str) -> None:
    given = arguments(torch.float64, device, sizes=sizes, requires_grad=True)

    def loss(outputs: list[Tensor]) -> Tensor:
        return sum((i + 1) * y.square().sum() for i, y in enumerate(outputs))

    ours = torch.autograd.grad(loss(op(given)), floating(given))
    theirs = torch.autograd.grad(loss([in_pytorch(each) for each in layers_of(given)]), floating(given))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("sizes", KINDS)
def test_autocast(sizes: list, device: str) -> None:
    given = arguments(device=device, sizes=sizes)
    with torch.autocast(device, torch.bfloat16):
        found = op(given)
        wanted = [own_op(each) for each in layers_of(given)]
    assert all(y.dtype == torch.bfloat16 for y in found)
    assert all(map(torch.equal, found, wanted))


BAD = [
    ({"x": ()}, "x is 0-dimensional"),
    ({"x": (4, 31)}, "down is"),
    ({"down": []}, "wanted one of each for each layer"),
    ({"down": 2}, "wanted one of each for each layer"),
    ({"up": 2}, "wanted one of each for each layer"),
    ({"bias": 1}, "wanted one of each for each layer"),
    ({"down.1": (16, 47)}, "down is"),
    ({"up.2": (72, 5)}, "up is"),
    ({"bias.0": (39,)}, "bias is"),
    ({"bias.2": torch.float64}, "bias is"),
    ({"up.1": torch.bfloat16}, "up is"),
    ({"down.0": "meta"}, "down is on"),
    ({"pivot_bias": 1}, "wanted one of each for each layer"),
    ({"order": 2}, "wanted one of each for each layer"),
    ({"pivot_bias.1": (16,)}, r"pivot_bias\[1\] is .*without an order"),
    ({"pivot_bias.0": (7,)}, "pivot_bias is"),
    ({"up.0": (40, 8)}, "bias is"),
    ({"order.2": (71,)}, "order is"),
    ({"order.2": (40,)}, "order is"),
    ({"order.0": torch.int64}, "order is"),
    ({"order.0": "meta"}, "order is on"),
]


@pytest.mark.parametrize("how", ["op", "fake", "check", "auto", "torch"])
@pytest.mark.parametrize(("changes", "named"), BAD, ids=str)
def test_a_bad_call_is_refused_by_name(changes: dict, named: str, how: str, device: str) -> None:
    of_mixed = any(name in str(changes) for name in ("pivot", "order", "up.0"))
    given = arguments(device=device, sizes=MIXED if of_mixed else SIZES)
    made = dict(zip(("x", *multi.LISTS), given, strict=True))
    for path, change in changes.items():
        name, _, i = path.partition(".")
        if not i:
            made[name] = torch.zeros(change, device=device) if name == "x" else made[name][:change] if change else []
        elif isinstance(change, tuple):
            made[name][int(i)] = torch.zeros(change, device=device)
        else:
            made[name][int(i)] = made[name][int(i)].to(change)
    if how == "fake":
        with FakeTensorMode() as mode:
            made = {
                name: mode.from_tensor(value)
                if isinstance(value, Tensor)
                else [None if each is None else mode.from_tensor(each) for each in value]
                for name, value in made.items()
            }
    call = {
        "check": multi.check_low_rank_linear_multi,
        "op": torch.ops.shrank.low_rank_linear_multi,
        "fake": torch.ops.shrank.low_rank_linear_multi,
    }.get(how, lambda **given: shrank.low_rank_linear_multi(**given, backend=how))
    with pytest.raises(RuntimeError, match=named) as error:
        call(**made)
    assert "shrank::low_rank_" in str(error.value) and "wanted" in str(error.value)


def test_the_function_takes_the_op_where_it_may(monkeypatch, native) -> None:
    x, down, up, bias, *pivots = arguments()
    wanted = [in_pytorch(each) for each in layers_of((x, down, up, bias, *pivots))]
    assert ops_of(lambda: shrank.low_rank_linear_multi(x, down, up, bias)) == ["low_rank_linear_multi"]
    assert ops_of(lambda: shrank.low_rank_linear_multi(x, down, up, bias, backend="torch")) == []
    for found in (shrank.low_rank_linear_multi(x, down, up, bias), op((x, down, up, bias, *pivots))):
        for y, right in zip(found, wanted, strict=True):
            assert_close(y, right)
    x.requires_grad_()
    trained = ops_of(lambda: shrank.low_rank_linear_multi(x, down, up, bias))
    assert trained == ["low_rank_linear_train"] * 3
    with torch.inference_mode():
        assert shrank.low_rank_linear_multi(x, down, up)[1].is_inference()


def test_the_function_takes_pivots(native) -> None:
    given = arguments(sizes=MIXED)
    assert ops_of(lambda: shrank.low_rank_linear_multi(*given)) == ["low_rank_linear_multi"]
    for backend in ("auto", "torch", "native"):
        for y, layer in zip(shrank.low_rank_linear_multi(*given, backend=backend), layers_of(given), strict=True):
            assert_close(y, in_pytorch(layer))
    given[0].requires_grad_()
    pivoted, plain = "low_rank_pivoted_train", "low_rank_linear_train"
    assert ops_of(lambda: shrank.low_rank_linear_multi(*given)) == [pivoted, plain, pivoted]


def test_native_names_every_reason() -> None:
    with pytest.raises(RuntimeError, match="cannot run") as error:
        shrank.low_rank_linear_multi(*arguments(sizes=MIXED), backend="native")
    for name in ("x", "down[0]", "up[2]", "bias[0]", "pivot_bias[0]", "order[2]"):
        assert f"{name} is on cpu, not on a CUDA device" in str(error.value)
    assert "int32" not in str(error.value)


@pytest.mark.parametrize("sizes", [SIZES, MIXED])
def test_compiles_whole_for_any_size(sizes: list, device: str) -> None:
    torch._dynamo.reset()
    x, *lists = arguments(device=device, sizes=sizes)
    compiled = torch.compile(lambda x: torch.ops.shrank.low_rank_linear_multi(x, *lists), fullgraph=True, dynamic=True)
    for M in (2, 5, 17):
        x = torch.randn(M, 48, device=device)
        for found, right in zip(compiled(x), op((x, *lists)), strict=True):
            assert_close(found, right)


def test_opcheck(device: str) -> None:
    for sizes in (SIZES, MIXED):
        for given in (arguments(device=device, sizes=sizes), arguments(device=device, sizes=sizes, requires_grad=True)):
            opcheck(torch.ops.shrank.low_rank_linear_multi.default, given)


def test_the_schema_is_the_one_that_python_gives() -> None:
    schema = torch._C.parse_schema(f"shrank::{multi.NAME}{multi.SCHEMA}")
    assert torch.ops.shrank.low_rank_linear_multi.default._schema == schema


def test_c_plus_plus_runs_where_it_should(on_cpp: bool) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"shrank::{multi.NAME}", "CPU") == on_cpp
