"""One table of calls that must be refused, for the check, the fake and the implementation at hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shrank.ops import schema

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


@pytest.mark.parametrize(("changes", "named"), BAD, ids=[str(changes) for changes, _ in BAD])
@pytest.mark.parametrize("how", ["check", "fake", "op", "op_train"])
def test_a_bad_call_is_refused_by_name(how: str, changes: dict, named: str, device: str) -> None:
    made = arguments(changes, device)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=named):
        if how == "check":
            schema.check_low_rank_linear(**made)
        elif how == "fake":
            with FakeTensorMode() as mode:
                torch.ops.shrank.low_rank_linear(
                    **{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()})
        elif how == "op":
            torch.ops.shrank.low_rank_linear(**made)
        else:
            torch.ops.shrank.low_rank_linear_train(**made)


def test_the_good_call_passes(device: str) -> None:
    made = arguments({}, device)
    schema.check_low_rank_linear(**made)
    assert torch.ops.shrank.low_rank_linear(**made).shape == (4, 16)


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_schemas_are_those_of_schema_py(name: str) -> None:
    found = getattr(torch.ops.shrank, name).default._schema
    assert found == torch._C.parse_schema(f"shrank::{name}{schema.SCHEMAS[name]}")
