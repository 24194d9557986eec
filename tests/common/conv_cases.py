"""Problems for the convolution op: windows, groups and memory formats where it could go wrong, and tensors for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from shrank.ops.reference import ACTIVATIONS, Window, output_sizes

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class ConvCase:
    """A problem of the convolution op: x (B, C, *input),
    down (R, C / groups, *kernel), up (N, R / up_groups, 1, ...)."""

    input: Sizes
    kernel: Sizes
    C: int
    N: int
    R: int
    B: int = 2
    stride: Sizes = ()
    padding: Sizes = ()
    dilation: Sizes = ()
    groups: int = 1
    up_groups: int = 1
    bias: bool = True
    activation: str = "none"
    residual: bool = False
    last: bool = False  # x and residual with their channels last

    def __str__(self) -> str:
        window = "".join(
            f"-{name}{'x'.join(map(str, sizes))}"
            for name, sizes in (("s", self.stride), ("p", self.padding), ("d", self.dilation))
            if sizes
        )
        ends = [self.activation] * (self.activation != "none") + ["bias"] * self.bias + ["residual"] * self.residual
        return "-".join(
            [
                "x".join(map(str, (self.B, self.C, *self.input))),
                f"k{'x'.join(map(str, self.kernel))}{window}",
                f"R{self.R}",
                f"N{self.N}",
                f"g{self.groups}.{self.up_groups}",
                *ends,
                "last" if self.last else "first",
            ]
        )

    @property
    def window(self) -> Window:
        d = len(self.input)
        return Window(
            list(self.stride or (1,) * d),
            list(self.padding or (0,) * d),
            list(self.dilation or (1,) * d),
            self.groups,
            self.up_groups,
        )

    @property
    def output(self) -> Sizes:
        """The shape of y."""
        return self.B, self.N, *self._sizes()

    @property
    def kept(self) -> list[Sizes]:
        """The shape of h."""
        return [(self.B, self.R, *self._sizes())]

    def _sizes(self) -> list[int]:
        x, down = torch.empty(1, 1, *self.input, device="meta"), torch.empty(1, 1, *self.kernel, device="meta")
        return output_sizes(x, down, self.window)

    def is_laid_out(self, output: Tensor, x: Tensor) -> bool:
        """Whether y or h is laid out as the op promises for x; where x may be read either way, as channels first."""
        ambiguous = x.is_contiguous() and is_last(x)
        return is_last(output) if self.last and not ambiguous else output.is_contiguous()

    def other_inputs(self, device: str) -> list[Tensor]:
        """x of other batches and images; no size of the weights among them: Dynamo would guard that equality."""
        made = [torch.randn(B, self.C, *sizes, device=device) for B, *sizes in ((4, 11, 13), (5, 9, 7), (7, 10, 19))]
        return [x.to(memory_format=torch.channels_last) for x in made] if self.last else made

    def residual_for(self, x: Tensor) -> Tensor | None:
        """A residual for one of other_inputs: none."""
        return None

    def tensors(self, dtype: torch.dtype, device: str, requires_grad: bool = False) -> tuple:
        """The op's arguments, scaled so that outputs have about unit variance."""
        generator, d = torch.Generator().manual_seed(0), len(self.input)

        def draw(*shape: int, fan_in: int = 1, last: bool = False) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * max(fan_in, 1) ** -0.5
            if last:
                values = values.movedim(1, -1).contiguous().movedim(-1, 1)
            return values.to(device, dtype).requires_grad_(requires_grad)

        x = draw(self.B, self.C, *self.input, last=self.last)
        down = draw(self.R, self.C // self.groups, *self.kernel, fan_in=self.C // self.groups * math.prod(self.kernel))
        up = draw(self.N, self.R // self.up_groups, *(1,) * d, fan_in=self.R // self.up_groups)
        bias = draw(self.N) if self.bias else None
        return (
            x,
            down,
            up,
            bias,
            *self.window,
            self.activation,
            draw(*self.output, last=self.last) if self.residual else None,
        )


def is_last(tensor: Tensor) -> bool:
    """Whether the channels of a tensor (B, C, ...) are innermost, without gaps."""
    return tensor.movedim(1, -1).is_contiguous()


# Every end of the layer, in both memory formats.
ENDS = [
    ConvCase((5, 4), (3, 3), 8, 16, 8, padding=(1, 1), bias=bias, activation=activation, residual=residual, last=last)
    for activation in ACTIVATIONS
    for bias, residual, last in product((False, True), repeat=3)
]
_WINDOWS = [
    ConvCase((17,), (3,), 8, 16, 8),
    ConvCase((17,), (5,), 8, 16, 8, stride=(2,), padding=(2,)),
    ConvCase((9,), (4,), 8, 16, 8, padding=(1, 2)),
    ConvCase((30,), (16,), 1, 8, 8, stride=(4,)),
    ConvCase((16,), (3,), 24, 8, 8, dilation=(3,)),
    ConvCase((5,), (8,), 8, 8, 8, padding=(2,)),
    ConvCase((6, 7), (1, 1), 16, 24, 8),
    ConvCase((9, 8), (7, 7), 3, 16, 8, stride=(2, 2), padding=(3, 3)),
    ConvCase((6, 5), (2, 3), 8, 8, 8, padding=(0, 1, 2, 0)),
    ConvCase((40, 1), (16, 1), 16, 16, 8, padding=(7, 8, 0, 0)),
    ConvCase((8, 9), (3, 2), 8, 8, 8, stride=(3, 1), dilation=(1, 2)),
    ConvCase((1, 1), (1, 1), 8, 8, 8),
    ConvCase((4, 5, 6), (3, 2, 1), 8, 8, 8, padding=(1, 0, 0)),
    ConvCase((4, 8, 8), (2, 4, 4), 3, 16, 8, stride=(2, 4, 4)),
]
_GROUPS = [
    ConvCase((11,), (3,), 32, 32, 16, groups=4),
    ConvCase((11,), (3,), 32, 32, 32, groups=4, up_groups=4),
    ConvCase((6, 6), (3, 3), 16, 16, 16, groups=2, padding=(1, 1)),
    ConvCase((6, 6), (3, 3), 16, 24, 16, groups=16),
    ConvCase((6, 6), (3, 3), 8, 16, 16, up_groups=2),
    ConvCase((6, 6), (2, 2), 8, 6, 12, groups=4, up_groups=2),
    ConvCase((6, 6), (2, 2), 6, 9, 6, groups=2, up_groups=3),
    ConvCase((3, 4, 5), (2, 2, 2), 8, 8, 8, groups=8),
]
_ODD = [
    ConvCase((5, 5), (3, 3), 5, 7, 3),
    ConvCase((5, 5), (3, 3), 8, 8, 8, B=0),
    ConvCase((5,), (3,), 1, 1, 1, B=1),
    ConvCase((12, 11), (3, 3), 24, 136, 80, B=1),
]
SHAPES = [
    replace(case, activation=activation, residual=residual, last=last)
    for case in _WINDOWS + _GROUPS + _ODD
    for activation, residual, last in (("none", False, False), ("gelu", True, True))
]
