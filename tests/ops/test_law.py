"""Tables of calls that must be refused, with one error by the check, the fake, the op and the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from shrank.ops import pivoted_reference, reference
from shrank.ops.law import ORDER_DTYPE
from tests.common.ops import CONV_OP, EACH_OP, GATED_OP, LINEAR_OP, OPS, PIVOTED_OP, OpUnderTest
from tests.common.pivoted_cases import places
from tests.common.tolerances import assert_close

TENSORS = ("x", "down", "up", "bias", "residual")
GATED_TENSORS = GATED_OP.definition.names
PIVOTED_TENSORS = PIVOTED_OP.definition.names
BAD_DTYPES_DEVICES_AND_NAMES = [  # what is changed, and what the error must name
    ({name: torch.int64 for name in TENSORS}, "x is"),
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
BAD_LINEAR = [
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
    *BAD_DTYPES_DEVICES_AND_NAMES,
]
BAD_GATED = [
    ({"x": ()}, "x is 0-dimensional"),
    ({"x": (4, 31)}, "gate_down"),
    ({"gate_down": (8,)}, "gate_down"),
    ({"gate_down": (8, 33)}, "gate_down"),
    ({"gate_up": (16, 9)}, "gate_up"),
    ({"gate_up": (16,)}, "gate_up"),
    ({"gate_bias": (15,)}, "gate_bias"),
    ({"gate_bias": (24,)}, "gate_bias"),
    ({"gate_bias": (1, 16)}, "gate_bias"),
    ({"down": (12, 31)}, "down is"),
    ({"down": (12, 32, 1)}, "down is"),
    ({"up": (12, 8)}, "up is"),
    ({"up": (12, 16)}, "up is"),
    ({"up": (13, 12), "bias": (13,), "order": (25,)}, "up is"),
    ({"bias": (15,)}, "bias is"),
    ({"bias": ()}, "bias is"),
    ({name: torch.int64 for name in GATED_TENSORS if not name.endswith("order")}, "x is"),
    ({"x": torch.float64}, "gate_down is"),
    ({"gate_up": torch.bfloat16}, "gate_up is"),
    ({"gate_bias": torch.float16}, "gate_bias is"),
    ({"down": torch.bfloat16}, "down is"),
    ({"up": torch.float16}, "up is"),
    ({"bias": torch.float64}, "bias is"),
    ({"activation": "swish"}, "activation is"),
    ({"gate_up": "meta"}, "gate_up is on"),
    ({"up": "meta"}, "up is on"),
    ({"gate_up": (16, 9)}, "gate_up is"),
    ({"gate_up": (8, 8), "gate_bias": (8,)}, "gate_order is"),
    ({"gate_order": (16,)}, "gate_order is"),
    ({"gate_order": (24, 1)}, "gate_order is"),
    ({"gate_order": torch.int64}, "gate_order is"),
    ({"gate_order": "meta"}, "gate_order is on"),
    ({"gate_order": None}, "gate_pivot_bias is .*without gate_order"),
    ({"gate_order": None, "gate_pivot_bias": None}, "up is"),  # 16 outputs then
    ({"gate_pivot_bias": (16,)}, "gate_pivot_bias is"),
    ({"gate_pivot_bias": torch.float64}, "gate_pivot_bias is"),
    ({"order": (12,)}, " order is"),
    ({"order": torch.float32}, " order is"),
    ({"order": "meta"}, " order is on"),
    ({"order": None}, " pivot_bias is .*without order"),
    ({"pivot_bias": (8,)}, " pivot_bias is"),
    ({"pivot_bias": "meta"}, " pivot_bias is on"),
]
BAD_PIVOTED = [
    ({"x": ()}, "x is 0-dimensional"),
    ({"x": (4, 31)}, "down is"),
    ({"x": (31,)}, "down is"),
    ({"down": (8,)}, "down is"),
    ({"down": (8, 32, 1)}, "down is"),
    ({"down": (8, 33)}, "down is"),
    ({"down": (9, 32)}, "up is"),
    ({"up": (16, 9)}, "up is"),
    ({"up": (16,)}, "up is"),
    ({"up": (8, 16)}, "up is"),
    ({"up": (15, 8)}, " bias is"),
    ({"up": (15, 8), "bias": (15,)}, "order is"),
    ({"bias": (15,)}, " bias is"),
    ({"bias": (24,)}, " bias is"),
    ({"bias": (1, 16)}, " bias is"),
    ({"bias": ()}, " bias is"),
    ({"pivot_bias": (7,)}, "pivot_bias is"),
    ({"pivot_bias": (16,)}, "pivot_bias is"),
    ({"pivot_bias": (1, 8)}, "pivot_bias is"),
    ({"pivot_bias": ()}, "pivot_bias is"),
    ({"order": (16,)}, "order is"),
    ({"order": (25,)}, "order is"),
    ({"order": (1, 24)}, "order is"),
    ({"order": ()}, "order is"),
    ({"order": torch.int64}, "order is"),
    ({"order": torch.float32}, "order is"),
    ({"order": "meta"}, "order is on"),
    ({"residual": (4, 16)}, "residual is"),
    ({"residual": (1, 24)}, "residual is"),
    ({"residual": (24,)}, "residual is"),
    ({"pivot_bias": torch.float64}, "pivot_bias is"),
    ({"pivot_bias": "meta"}, "pivot_bias is on"),
    *BAD_DTYPES_DEVICES_AND_NAMES[1:],
    ({name: torch.int64 for name in PIVOTED_TENSORS if name != "order"}, "x is"),
]
BAD_CONV = [
    ({"x": ()}, "x is"),
    ({"x": (2, 8, 6)}, "x is"),
    ({"x": (8, 6, 5)}, "x is"),
    ({"x": (2, 8, 6, 5, 1)}, "x is"),
    ({"x": (2, 9, 6, 5)}, "groups is"),
    ({"x": (2, 6, 6, 5)}, "down is"),
    ({"x": (2, 8, 0, 5)}, "x is"),
    ({"x": (2, 8, 6, 4)}, "residual is"),
    ({"down": (12, 4)}, "down is"),
    ({"down": (12,)}, "down is"),
    ({"down": (12, 4, 3, 3, 3, 3)}, "down is"),
    ({"down": (12, 8, 3, 3)}, "down is"),
    ({"down": (11, 4, 3, 3)}, "groups is"),
    ({"down": (12, 4, 0, 3)}, "kernel"),
    ({"down": (12, 4, 9, 3)}, "x is"),
    ({"down": (12, 4, 3)}, "x is"),
    ({"up": (16, 12, 1, 1)}, "up is"),
    ({"up": (16, 6)}, "up is"),
    ({"up": (16, 6, 1)}, "up is"),
    ({"up": (16, 6, 1, 2)}, "up is"),
    ({"up": (15, 6, 1, 1)}, "up_groups is"),
    ({"up": ()}, "up"),
    ({"bias": (15,)}, "bias is"),
    ({"bias": (1, 16)}, "bias is"),
    ({"bias": ()}, "bias is"),
    ({"residual": (2, 16, 6, 4)}, "residual is"),
    ({"residual": (1, 16, 6, 5)}, "residual is"),
    ({"residual": (16, 6, 5)}, "residual is"),
    ({"stride": [1]}, "stride is"),
    ({"stride": [0, 1]}, "stride is"),
    ({"stride": [1, 1, 1]}, "stride is"),
    ({"stride": [2, 1]}, "residual is"),
    ({"padding": [1]}, "padding is"),
    ({"padding": [1, 1, 1]}, "padding is"),
    ({"padding": [-1, 1]}, "padding is"),
    ({"padding": [1, 1, 1, -1]}, "padding is"),
    ({"padding": [1, 0, 1, 1]}, "residual is"),
    ({"dilation": [0, 1]}, "dilation is"),
    ({"dilation": []}, "dilation is"),
    ({"dilation": [4, 1]}, "x is"),
    ({"groups": 0}, "groups are"),
    ({"groups": 3}, "groups is"),
    ({"up_groups": 0}, "groups are"),
    ({"up_groups": 5}, "up_groups is"),
    ({"up_groups": 4}, "up is"),
    ({"groups": -2}, "groups are"),
    *BAD_DTYPES_DEVICES_AND_NAMES,
]
# An input without a batch is none of the op, and the function adds one; and it takes more than numbers.
BAD_CONV_FUNCTION = [case for case in BAD_CONV if case[0] not in ({"x": (8, 6, 5)}, {"x": (2, 8, 6)})] + [
    ({"x": (8, 6, 5), "residual": (15, 6, 5)}, "residual is"),
    ({"padding": "full"}, "padding is 'full'"),
    ({"padding": "same", "stride": 2}, "padding is 'same' with stride"),
    ({"stride": 1.5}, "stride is 1.5"),
    ({"dilation": "2"}, "dilation is '2'"),
    ({"padding": (1, None)}, "padding is"),
]


@dataclass(frozen=True)
class Law:
    """A good call of an op by name, with shapes for tensors, what it gives without activation and residual, and the
    changes that make it bad for the op, for the function, and for the compiled function."""

    good: dict[str, object]
    output: tuple[int, ...]
    plain: Callable[..., Tensor]
    bad: list[tuple[dict, str]]
    bad_of_function: list[tuple[dict, str]]
    bad_when_compiled: list[tuple[dict, str]]


LAWS = {
    LINEAR_OP.name: Law(
        {"x": (4, 32), "down": (8, 32), "up": (16, 8), "bias": (16,), "activation": "gelu", "residual": (4, 16)},
        (4, 16),
        lambda x, down, up, bias: F.linear(F.linear(x, down), up, bias),
        BAD_LINEAR,
        BAD_LINEAR,
        [({"x": (4, 31)}, "down"), ({"down": torch.bfloat16}, "down"), ({"activation": "swish"}, "activation")],
    ),
    CONV_OP.name: Law(
        {
            "x": (2, 8, 6, 5),
            "down": (12, 4, 3, 3),
            "up": (16, 6, 1, 1),
            "bias": (16,),
            "stride": [1, 1],
            "padding": [1, 1],
            "dilation": [1, 1],
            "groups": 2,
            "up_groups": 2,
            "activation": "gelu",
            "residual": (2, 16, 6, 5),
        },
        (2, 16, 6, 5),
        lambda x, down, up, bias: F.conv2d(F.conv2d(x, down, None, 1, 1, 1, 2), up, bias, groups=2),
        BAD_CONV,
        BAD_CONV_FUNCTION,
        [
            ({"x": (2, 9, 6, 5)}, "groups is"),
            ({"down": torch.bfloat16}, "down"),
            ({"activation": "swish"}, "activation"),
            ({"padding": "full"}, "padding is 'full'"),
        ],
    ),
}


LAWS[GATED_OP.name] = Law(
    {
        "x": (4, 32),
        "gate_down": (8, 32),
        "gate_up": (16, 8),
        "gate_bias": (16,),
        "down": (12, 32),
        "up": (12, 12),
        "bias": (12,),
        "gate_pivot_bias": (8,),
        "gate_order": (24,),
        "pivot_bias": (12,),
        "order": (24,),
        "activation": "gelu",
    },
    (4, 24),
    lambda x, *pairs: reference.low_rank_gated(x, *pairs, activation="relu"),
    BAD_GATED,
    BAD_GATED,
    [({"x": (4, 31)}, "gate_down"), ({"up": torch.bfloat16}, "up"), ({"activation": "swish"}, "activation")],
)
LAWS[PIVOTED_OP.name] = Law(
    {
        "x": (4, 32),
        "down": (8, 32),
        "up": (16, 8),
        "bias": (16,),
        "pivot_bias": (8,),
        "order": (24,),
        "activation": "gelu",
        "residual": (4, 24),
    },
    (4, 24),
    pivoted_reference.low_rank_pivoted,
    BAD_PIVOTED,
    BAD_PIVOTED,
    [
        ({"x": (4, 31)}, "down"),
        ({"order": torch.int64}, "order"),
        ({"order": (25,)}, "order"),
        ({"activation": "swish"}, "activation"),
    ],
)


def each_bad(of: Callable[[Law], list]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("tested", "changes", "named"),
        [
            pytest.param(tested, changes, named, id=f"{tested}-{changes}")
            for tested in OPS
            for changes, named in of(LAWS[tested.name])
        ],
    )


def arguments(tested: OpUnderTest, changes: dict, device: str) -> dict:
    made = {}
    for name, good in LAWS[tested.name].good.items():
        change = changes.get(name, good)
        if name not in tested.definition.names or change is None:
            made[name] = change
            continue
        dtype = ORDER_DTYPE if name.endswith("order") else torch.float32
        made[name] = torch.zeros(
            change if isinstance(change, tuple) else good,
            device=change if isinstance(change, str) else device,
            dtype=change if isinstance(change, torch.dtype) else dtype,
        )
    return made


def call(tested: OpUnderTest, how: str, made: dict) -> object:
    """The call by one of the ways there are to it."""
    definition = tested.definition
    if how == "check":
        return definition.check(*definition.packed(tuple(made.values())))
    if how == "fake":
        with FakeTensorMode() as mode:
            return tested.op(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in made.items()})
    if how == "op":
        return getattr(torch.ops.shrank, definition.name)(**made)
    if how == "op_train":
        return tested.op_train(**made)
    if how == "compiled":
        torch._dynamo.reset()
        return torch.compile(tested.function, backend="eager")(**made)
    return tested.function(**made, backend=how)


def refused(tested: OpUnderTest, how: str, made: dict, named: str) -> None:
    """By a RuntimeError, as of torch's own functions, that says where, what was found and what was wanted."""
    with pytest.raises(RuntimeError, match=named) as error:
        call(tested, how, made)
    assert type(error.value) is RuntimeError
    assert f"shrank::{tested.definition.name}: " in str(error.value) and "wanted" in str(error.value)


@each_bad(lambda law: law.bad)
@pytest.mark.parametrize("how", ["check", "fake", "op", "op_train"])
def test_a_bad_call_is_refused_by_name(tested, how: str, changes: dict, named: str, device: str) -> None:
    refused(tested, how, arguments(tested, changes, device), named)


@each_bad(lambda law: law.bad_of_function)
@pytest.mark.parametrize("how", ["auto", "torch"])
def test_the_function_refuses_alike(tested, how: str, changes: dict, named: str, device: str) -> None:
    refused(tested, how, arguments(tested, changes, device), named)


@each_bad(
    lambda law: [
        (changes, named)
        for changes, named in law.bad_of_function
        if "residual" not in named and not {"residual", "activation"} & changes.keys()
    ]
)
def test_without_activation_and_residual_it_is_refused_alike(tested, changes: dict, named: str, device: str) -> None:
    made = arguments(tested, changes, device) | {"activation": "none"}
    if tested.definition.takes_residual:
        made["residual"] = None
    refused(tested, "auto", made, named)


@pytest.mark.usefixtures("native")
@each_bad(lambda law: law.bad_of_function)
def test_the_function_refuses_alike_where_the_op_runs(tested, changes: dict, named: str, device: str) -> None:
    refused(tested, "native", arguments(tested, changes, device), named)


@each_bad(lambda law: law.bad_when_compiled)
def test_a_compiled_call_is_refused_alike(tested, changes: dict, named: str) -> None:
    refused(tested, "compiled", arguments(tested, changes, "cpu"), named)


@EACH_OP
def test_an_unknown_backend_is_a_value_error(tested, device: str) -> None:
    with pytest.raises(ValueError, match="backend is 'gpu', wanted auto, torch, native") as error:
        call(tested, "gpu", arguments(tested, {}, device))
    assert type(error.value) is ValueError


@EACH_OP
def test_autocast_makes_dtypes_alike_and_then_they_are_no_mistake(tested, device: str) -> None:
    law, made = LAWS[tested.name], arguments(tested, {"activation": "relu"}, device)
    names = tested.definition.names
    orders = [name for name in names if name.endswith("order")]
    made |= {name: torch.randn(made[name].shape, device=device) for name in names if name not in orders}
    made |= {name: places(*law.good[name], 0, "mixed", device) for name in orders}
    made |= {name: made[name].bfloat16() for name in ("x", "bias")}
    pairs = [made[name] if name in orders else made[name].bfloat16() for name in names if name != "residual"]
    wanted = law.plain(*pairs)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        if tested.definition.takes_residual:
            y = tested.function(**made, backend="torch")
            assert y.dtype == torch.float32, "the residual keeps its precision"
            assert_close(y, wanted.relu() + made.pop("residual"))
            wanted = wanted.relu()
        y = tested.function(**made, backend="torch")
        assert y.dtype == torch.bfloat16
        for wrong, named in (({"x": made["x"].int()}, "x is torch.int32"), ({"down": made["down"][:, 1:]}, "down is")):
            with pytest.raises(RuntimeError, match=named):
                tested.function(**(made | wrong), backend="torch")
    assert_close(y, wanted)


@EACH_OP
def test_the_good_call_passes(tested, device: str) -> None:
    made = arguments(tested, {}, device)
    call(tested, "check", made)
    assert tested.op(**made).shape == LAWS[tested.name].output


@pytest.mark.parametrize(("name", "schema"), [each for tested in OPS for each in tested.definition.schemas.items()])
def test_schemas_are_those_that_python_gives(name: str, schema: str) -> None:
    assert getattr(torch.ops.shrank, name).default._schema == torch._C.parse_schema(f"shrank::{name}{schema}")
