"""The ops under test: what the tests of tests/ops ask of each, so that every one of them is asked the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import shrank
from shrank.ops import availability, host, pivoted_reference, reference, self_check
from shrank.ops.conv import CONV
from shrank.ops.gated import GATED
from shrank.ops.linear import LINEAR
from shrank.ops.pivoted import PIVOTED
from shrank.ops.reference import Window
from shrank.ops.registration import Op
from tests.common import conv_cases, gated_cases, linear_cases, pivoted_cases
from tests.common.conv_cases import ConvCase
from tests.common.gated_cases import GatedCase
from tests.common.linear_cases import LinearCase
from tests.common.pivoted_cases import PivotedCase
from tests.common.tolerances import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
needs_host_kernels = pytest.mark.skipif(bool(host.problems()), reason="; ".join(host.problems()))
Case = LinearCase | ConvCase | GatedCase | PivotedCase


@dataclass(frozen=True)
class OpUnderTest:
    """An op, and the problems that it is tried on.

    full: a problem with every end, in each memory format; small: one for numerical derivatives; odd: for opcheck.
    reference: PyTorch's answer to the op's own arguments; function: that of a user to the same.
    """

    name: str
    definition: Op
    reference: Callable[..., Tensor]
    full: dict[str, Case]
    small: dict[str, Case]
    values: list[Case]
    gradients: list[Case]
    odd: list[Case]

    def __str__(self) -> str:
        return self.name

    @property
    def op(self) -> Callable[..., Tensor]:
        return self.definition.overload

    @property
    def op_train(self) -> Callable[..., tuple[Tensor, ...]]:
        return self.definition.train_overload

    @property
    def function(self) -> Callable[..., Tensor]:
        return _FUNCTIONS.get(self.definition.name) or getattr(shrank, self.definition.name)

    def assert_as_good_as_torch(self, actual: Tensor, arguments: tuple) -> None:
        assert_close(actual, self.reference(*doubled(arguments)), self.reference(*arguments))


def _conv_reference(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, *rest) -> Tensor:
    return reference.low_rank_conv(x, down, up, bias, Window(*rest[:5]), *rest[5:])


def _pivoted_function(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, pivot_bias: Tensor | None, order: Tensor, *rest, **options
) -> Tensor:
    return shrank.low_rank_pivoted(x, down, up, order, bias, pivot_bias, *rest, **options)


def _gated_function(
    x: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    gate_pivot_bias: Tensor | None = None,
    gate_order: Tensor | None = None,
    pivot_bias: Tensor | None = None,
    order: Tensor | None = None,
    activation: str = "silu",
    **options,
) -> Tensor:
    options |= {"gate_pivot_bias": gate_pivot_bias, "gate_order": gate_order, "pivot_bias": pivot_bias, "order": order}
    return shrank.low_rank_gated(x, gate_down, gate_up, gate_bias, down, up, bias, activation, **options)


# Whose arguments have another order than those of the op.
_FUNCTIONS = {PIVOTED.name: _pivoted_function, GATED.name: _gated_function}
_linear = LinearCase((3, 5), 24, 40, 8, True, "gelu", True)
_last = ConvCase((6, 5), (3, 2), 16, 24, 8, padding=(1, 0, 0, 1), activation="gelu", residual=True, last=True)
_formats = {"channels_first": replace(_last, last=False), "channels_last": _last}
LINEAR_OP = OpUnderTest(
    name="linear",
    definition=LINEAR,
    reference=reference.low_rank_linear,
    full={"rows": _linear},
    small={"rows": _linear},
    values=linear_cases.ENDS + linear_cases.SHAPES + linear_cases.MATRICES,
    gradients=linear_cases.ENDS + linear_cases.SHAPES + linear_cases.MATRICES,
    odd=[_linear, LinearCase((), 8, 8, 2), LinearCase((4,), 16, 7, 3, False, "silu"), LinearCase((0,), 16, 8, 4)],
)
CONV_OP = OpUnderTest(
    name="conv",
    definition=CONV,
    reference=_conv_reference,
    full=_formats,
    small={name: replace(case, input=(3, 3), C=4, N=4, R=2, groups=2) for name, case in _formats.items()},
    values=conv_cases.ENDS + conv_cases.SHAPES,
    gradients=conv_cases.ENDS[::3] + conv_cases.SHAPES,
    odd=[
        *_formats.values(),
        ConvCase((7,), (3,), 8, 5, 3, bias=False),
        replace(_last, B=0),
        ConvCase((3, 4, 5), (2, 2, 2), 8, 8, 8, groups=4, activation="silu", last=True),
    ],
)
_gated = GatedCase((3, 5), 24, 40, 8, 16, activation="gelu")
GATED_OP = OpUnderTest(
    name="gated",
    definition=GATED,
    reference=reference.low_rank_gated,
    full={"rows": _gated, "pivoted": replace(_gated, pivots="both")},
    small={"rows": _gated, "pivoted": replace(_gated, pivots="both")},
    values=gated_cases.ENDS + gated_cases.SHAPES + gated_cases.MATRICES,
    gradients=gated_cases.ENDS + gated_cases.SHAPES + gated_cases.MATRICES,
    odd=[
        _gated,
        GatedCase((), 8, 8, 2, 3, "gate"),
        GatedCase((4,), 16, 7, 3, 2, "none", "none"),
        GatedCase((0,), 16, 8, 4, 8),
        GatedCase((3, 5), 24, 40, 8, 16, "both", "relu", "both"),
        GatedCase((4,), 16, 7, 3, 7, "value", "none", "value"),
    ],
)
_pivoted = PivotedCase((3, 5), 24, 40, 8, activation="gelu", residual=True)
PIVOTED_OP = OpUnderTest(
    name="pivoted",
    definition=PIVOTED,
    reference=pivoted_reference.low_rank_pivoted,
    full={"rows": _pivoted},
    small={"rows": _pivoted},
    values=pivoted_cases.ENDS + pivoted_cases.SHAPES + pivoted_cases.MATRICES,
    gradients=pivoted_cases.ENDS + pivoted_cases.SHAPES + pivoted_cases.MATRICES,
    odd=[
        replace(_pivoted, activation="relu"),  # whose derivative does not depend on how z is rounded
        PivotedCase((), 8, 8, 2, "pivots"),
        PivotedCase((4,), 16, 7, 3, "none", "silu"),
        PivotedCase((4,), 16, 8, 8, "others", "relu", True),
        PivotedCase((0,), 16, 8, 4),
    ],
)
OPS = (LINEAR_OP, CONV_OP, GATED_OP, PIVOTED_OP)


def each_case(of: Callable[[OpUnderTest], list]) -> pytest.MarkDecorator:
    """For tests of `tested` at `case`: every case that `of` an op gives."""
    return pytest.mark.parametrize(
        ("tested", "case"), [pytest.param(tested, case, id=f"{tested}-{case}") for tested in OPS for case in of(tested)]
    )


def each_format(of: Callable[[OpUnderTest], dict] = lambda tested: tested.full) -> pytest.MarkDecorator:
    """For tests of `tested` at `full`: a problem with every end, in each memory format."""
    return pytest.mark.parametrize(
        ("tested", "full"),
        [pytest.param(tested, case, id=f"{tested}-{name}") for tested in OPS for name, case in of(tested).items()],
    )


EACH_OP = pytest.mark.parametrize("tested", OPS, ids=str)


def doubled(arguments: tuple) -> tuple:
    """The arguments in float64, each its own leaf; an order of places stays."""
    return tuple(a.detach().double().requires_grad_(a.requires_grad) if is_floating(a) else a for a in arguments)


def tensors_of(arguments: tuple) -> list[Tensor]:
    return [each for each in arguments if isinstance(each, Tensor)]


def floating_of(arguments: tuple) -> list[Tensor]:
    """Those that may have a gradient."""
    return [each for each in arguments if is_floating(each)]


def is_floating(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


class Recorded(TorchDispatchMode):
    """The names of the ops of shrank that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "shrank":
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


def ops_of(call: Callable[[], object]) -> list[str]:
    with Recorded() as recorded:
        call()
    return recorded.names


def pretend_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the native kernels could run here; the ops run what this machine has of them."""
    monkeypatch.setattr(availability, "is_on_cuda", lambda _: True)
    monkeypatch.setattr(availability, "why_not_here", tuple)
    monkeypatch.setattr(availability, "why_not_these", lambda *_: [])
    monkeypatch.setattr(self_check, "why_not_op", lambda *_: ())
