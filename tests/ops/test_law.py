"""One table of calls that must be refused, with the same error by the check, the fake, the op and the function."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import shrank
from shrank.ops import linear as schema
from tests.common.tolerances import assert_close

GOOD = {"x": (4, 32), "down": (8, 32), "up": (16, 8), "bias": (16,), "residual": (4, 16)}
BAD = [  # what is changed, and what the error must name
    ({"x": ()}, "x is 0-dimensional"),
    ({"x": (4, 31)}, "down"),
    ({"x": (31,)}, "down"),
    ({"down": (8,)}, "down"),
    ({"down": (8, 32, 1)}, "down"),
    ({"down": (8, 33)}, "down"),
    ({"up": (16, 9)}, "up"),
    ({"up": (16,)}, "up"),
    ({"up": (8, 16)}, "up"),
    ({"bias": (15,)}, "bias"),
    ({"bias": (1,)}, "bias"),
    ({"bias": (1, 16)}, "bias"),
    ({"bias": ()}, "bias"),
    ({"residual": (4, 15)}, "residual"),
    ({"residual": (1, 16)}, "residual"),
    ({"residual": (16,)}, "residual"),
    ({"residual": (2, 2, 16)}, "residual"),
    ({"x": torch.int64, "down": torch.int64, "up": torch.int64, "bias": torch.int64, "residual": torch.int64}, "x is"),
    ({"x": torch.complex64}, "x is"),
    ({"x": torch.float64}, "down is"),
    ({"down": torch.bfloat16}, "down is"),
    ({"up": torch.float16}, "up is"),
    ({"bias": torch.float64}, "bias is"),
    ({"residual": torch.float64}, "residual is"),
    ({"activation": "swish"}, "activation is"),
    ({"activation": ""}, "activation is"),
    ({"down": "meta"}, "down is on"),
    ({"residual": "meta"}, "residual is on"),
]


def arguments(changes: dict, device: str) -> dict:
    made = {"activation": changes.get("activation", "gelu")}
    for name, shape in GOOD.items():
        change = changes.get(name)
        dtype = change if isinstance(change, torch.dtype) else torch.float32
        where = change if isinstance(change, str) else device
        made[name] = torch.zeros(change if isinstance(change, tuple) else shape, dtype=dtype, device=where)
    return made


def call(how: str, made: dict) -> object:
    """The call by one of the ways there are to it."""
    if how == "check":
        return schema.check_low_rank_linear(**made)
    if how == "fake":
        with FakeTensorMode() as mode:
            return torch.ops.shrank.low_rank_linear(
                **{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()})
    if how.startswith("op"):
        return getattr(torch.ops.shrank, how.replace("op", "low_rank_linear"))(**made)
    if how == "compiled":
        return torch.compile(shrank.low_rank_linear, backend="eager")(**made)
    return shrank.low_rank_linear(**made, backend=how)


@pytest.mark.parametrize(("changes", "named"), BAD, ids=[str(changes) for changes, _ in BAD])
@pytest.mark.parametrize("how", ["check", "fake", "op", "op_train", "auto", "torch"])
def test_a_bad_call_is_refused_by_name(how: str, changes: dict, named: str, device: str) -> None:
    refused(how, arguments(changes, device), named)


def refused(how: str, made: dict, named: str) -> None:
    """By a RuntimeError, as of torch's own functions, that says where, what was found and what was wanted."""
    with pytest.raises(RuntimeError, match=named) as error:
        call(how, made)
    assert type(error.value) is RuntimeError
    assert "shrank::low_rank_linear: " in str(error.value) and "wanted" in str(error.value)


@pytest.mark.parametrize(("changes", "named"), [
    case for case in BAD if not {"residual", "activation"} & case[0].keys()], ids=str)
def test_without_activation_and_residual_it_is_refused_alike(changes: dict, named: str, device: str) -> None:
    refused("auto", arguments(changes, device) | {"activation": "none", "residual": None}, named)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("changes", "named"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_the_function_refuses_alike_where_the_op_runs(changes: dict, named: str, device: str) -> None:
    refused("native", arguments(changes, device), named)


@pytest.mark.parametrize("changes", [{"x": (4, 31)}, {"down": torch.bfloat16}, {"activation": "swish"}], ids=str)
def test_a_compiled_call_is_refused_alike(changes: dict) -> None:
    refused("compiled", arguments(changes, "cpu"), next(iter(changes)) if "x" not in changes else "down")


def test_an_unknown_backend_is_a_value_error(device: str) -> None:
    with pytest.raises(ValueError, match="backend is 'gpu', wanted auto, torch, native") as error:
        call("gpu", arguments({}, device))
    assert type(error.value) is ValueError


def test_autocast_makes_dtypes_alike_and_then_they_are_no_mistake(device: str) -> None:
    x, down, up, bias, residual = (torch.randn(shape, device=device) for shape in GOOD.values())
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        y = shrank.low_rank_linear(x.bfloat16(), down, up, bias.bfloat16(), "relu", residual, backend="torch")
        assert y.dtype == torch.float32, "the residual keeps its precision"
        for wrong, named in (({"x": x.int()}, "x is torch.int32"), ({"down": down[:, 1:]}, "down is")):
            given = {"x": x, "down": down, "up": up} | wrong
            with pytest.raises(RuntimeError, match=named):
                shrank.low_rank_linear(**given, backend="torch")
    x, down, up, bias = (each.bfloat16() for each in (x, down, up, bias))
    assert_close(y, F.linear(F.linear(x, down), up, bias).relu() + residual)


def test_the_good_call_passes(device: str) -> None:
    made = arguments({}, device)
    schema.check_low_rank_linear(**made)
    assert torch.ops.shrank.low_rank_linear(**made).shape == (4, 16)


@pytest.mark.parametrize("name", schema.LINEAR.schemas)
def test_schemas_are_those_of_schema_py(name: str) -> None:
    found = getattr(torch.ops.shrank, name).default._schema
    assert found == torch._C.parse_schema(f"shrank::{name}{schema.LINEAR.schemas[name]}")
