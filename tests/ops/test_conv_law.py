"""One table of convolutions that must be refused, with one error by the check, the fake, the op and the function."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import shrank
from shrank.ops.conv import check_low_rank_conv
from shrank.ops.reference import Window
from tests.common.tolerances import assert_close

GOOD = {"x": (2, 8, 6, 5), "down": (12, 4, 3, 3), "up": (16, 6, 1, 1), "bias": (16,), "residual": (2, 16, 6, 5),
        "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 2, "up_groups": 2, "activation": "gelu"}
TENSORS = ("x", "down", "up", "bias", "residual")
BAD = [  # what is changed, and what the error must name
    ({"x": ()}, "x is"), ({"x": (2, 8, 6)}, "x is"), ({"x": (8, 6, 5)}, "x is"), ({"x": (2, 8, 6, 5, 1)}, "x is"),
    ({"x": (2, 9, 6, 5)}, "groups is"), ({"x": (2, 6, 6, 5)}, "down is"), ({"x": (2, 8, 0, 5)}, "x is"),
    ({"x": (2, 8, 6, 4)}, "residual is"),
    ({"down": (12, 4)}, "down is"), ({"down": (12,)}, "down is"), ({"down": (12, 4, 3, 3, 3, 3)}, "down is"),
    ({"down": (12, 8, 3, 3)}, "down is"), ({"down": (11, 4, 3, 3)}, "groups is"), ({"down": (12, 4, 0, 3)}, "kernel"),
    ({"down": (12, 4, 9, 3)}, "x is"), ({"down": (12, 4, 3)}, "x is"),
    ({"up": (16, 12, 1, 1)}, "up is"), ({"up": (16, 6)}, "up is"), ({"up": (16, 6, 1)}, "up is"),
    ({"up": (16, 6, 1, 2)}, "up is"), ({"up": (15, 6, 1, 1)}, "up_groups is"), ({"up": ()}, "up"),
    ({"bias": (15,)}, "bias is"), ({"bias": (1, 16)}, "bias is"), ({"bias": ()}, "bias is"),
    ({"residual": (2, 16, 6, 4)}, "residual is"), ({"residual": (1, 16, 6, 5)}, "residual is"),
    ({"residual": (16, 6, 5)}, "residual is"),
    ({"stride": [1]}, "stride is"), ({"stride": [0, 1]}, "stride is"), ({"stride": [1, 1, 1]}, "stride is"),
    ({"stride": [2, 1]}, "residual is"),
    ({"padding": [1]}, "padding is"), ({"padding": [1, 1, 1]}, "padding is"), ({"padding": [-1, 1]}, "padding is"),
    ({"padding": [1, 1, 1, -1]}, "padding is"), ({"padding": [1, 0, 1, 1]}, "residual is"),
    ({"dilation": [0, 1]}, "dilation is"), ({"dilation": []}, "dilation is"), ({"dilation": [4, 1]}, "x is"),
    ({"groups": 0}, "groups are"), ({"groups": 3}, "groups is"), ({"up_groups": 0}, "groups are"),
    ({"up_groups": 5}, "up_groups is"), ({"up_groups": 4}, "up is"), ({"groups": -2}, "groups are"),
    ({"activation": "swish"}, "activation is"), ({"activation": ""}, "activation is"),
    ({name: torch.int64 for name in TENSORS}, "x is"), ({"x": torch.complex64}, "x is"),
    ({"x": torch.float64}, "down is"), ({"down": torch.bfloat16}, "down is"), ({"up": torch.float16}, "up is"),
    ({"bias": torch.float64}, "bias is"), ({"residual": torch.float64}, "residual is"),
    ({"down": "meta"}, "down is on"), ({"residual": "meta"}, "residual is on"),
]


def arguments(changes: dict, device: str) -> dict:
    made = {}
    for name, good in GOOD.items():
        change = changes.get(name, good)
        if name not in TENSORS:
            made[name] = change
            continue
        made[name] = torch.zeros(change if isinstance(change, tuple) else good, device=change if isinstance(
            change, str) else device, dtype=change if isinstance(change, torch.dtype) else torch.float32)
    return made


def check(made: dict) -> None:
    rest = {name: made[name] for name in (*TENSORS, "activation")}
    check_low_rank_conv(window=Window(*(made[name] for name in Window._fields)), **rest)


def call(how: str, made: dict) -> object:
    """The call by one of the ways there are to it."""
    if how == "check":
        return check(made)
    if how == "fake":
        with FakeTensorMode() as mode:
            return torch.ops.shrank.low_rank_conv(
                **{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()})
    if how.startswith("op"):
        return getattr(torch.ops.shrank, how.replace("op", "low_rank_conv"))(**made)
    return shrank.low_rank_conv(**made, backend=how)


def refused(how: str, made: dict, named: str) -> None:
    """By a RuntimeError, as of torch's own functions, that says where, what was found and what was wanted."""
    with pytest.raises(RuntimeError, match=named) as error:
        call(how, made)
    assert type(error.value) is RuntimeError
    assert "shrank::low_rank_conv: " in str(error.value) and "wanted" in str(error.value)


@pytest.mark.parametrize(("changes", "named"), BAD, ids=[str(changes) for changes, _ in BAD])
@pytest.mark.parametrize("how", ["check", "fake", "op", "op_train"])
def test_a_bad_call_is_refused_by_name(how: str, changes: dict, named: str, device: str) -> None:
    refused(how, arguments(changes, device), named)


# An input without a batch is none of the op, and the function adds one.
OF_FUNCTION = [case for case in BAD if case[0] not in ({"x": (8, 6, 5)}, {"x": (2, 8, 6)})] + [
    ({"x": (8, 6, 5), "residual": (15, 6, 5)}, "residual is"),
    ({"padding": "full"}, "padding is 'full'"), ({"padding": "same", "stride": 2}, "padding is 'same' with stride"),
    ({"stride": 1.5}, "stride is 1.5"), ({"dilation": "2"}, "dilation is '2'"), ({"padding": (1, None)}, "padding is"),
]


@pytest.mark.parametrize(("changes", "named"), OF_FUNCTION, ids=[str(changes) for changes, _ in OF_FUNCTION])
@pytest.mark.parametrize("how", ["auto", "torch"])
def test_the_function_refuses_alike(how: str, changes: dict, named: str, device: str) -> None:
    refused(how, arguments(changes, device), named)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("changes", "named"), OF_FUNCTION, ids=[str(changes) for changes, _ in OF_FUNCTION])
def test_the_function_refuses_alike_where_the_op_runs(changes: dict, named: str, device: str) -> None:
    refused("native", arguments(changes, device), named)


def test_autocast_makes_dtypes_alike_and_then_they_are_no_mistake(device: str) -> None:
    x, down, up = (torch.randn(GOOD[name], device=device) for name in ("x", "down", "up"))
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        y = shrank.low_rank_conv(x.bfloat16(), down, up, padding=1, groups=2, up_groups=2, backend="torch")
        expected = nn.functional.conv2d(nn.functional.conv2d(x, down, padding=1, groups=2), up, groups=2)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected)


def test_the_good_call_passes(device: str) -> None:
    made = arguments({}, device)
    check(made)
    assert torch.ops.shrank.low_rank_conv(**made).shape == (2, 16, 6, 5)
