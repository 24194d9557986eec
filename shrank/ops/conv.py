"""The convolution op, in 1 to 3 dimensions: its law, its outputs, and `shrank::low_rank_conv` made of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import reference
from .expand_backward import expand_backward
from .law import check_activation, check_alike, check_bias, check_residual, refusal, shape_of
from .reference import Forward, Grads, Window, channels_last, in_format, output_sizes
from .registration import Op, register

NAME = "low_rank_conv"


def check_low_rank_conv(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    window: Window,
    activation: str,
    residual: Tensor | None,
    casts: bool = False,
) -> None:
    """Raise RuntimeError on shapes, numbers, names, dtypes and devices that do not fit.

    casts: autocast makes the dtypes alike.
    """
    check_activation(NAME, activation)
    if not 3 <= down.dim() <= 5:
        raise refusal(NAME, f"down is {shape_of(down)}, wanted (R, C / groups, 1 to 3 kernel sizes)")
    if x.dim() != down.dim():
        raise refusal(NAME, f"x is {shape_of(x)}, wanted {down.dim()} dimensions as down {shape_of(down)} has")
    _check_channels(x, down, up, window)
    check_bias(NAME, bias, up)
    _check_window(x, down, window)
    check_residual(NAME, residual, (x.size(0), up.size(0), *output_sizes(x, down, window)))
    check_alike(NAME, casts, x=x, down=down, up=up, bias=bias, residual=residual)


def _check_channels(x: Tensor, down: Tensor, up: Tensor, window: Window) -> None:
    groups, up_groups, C, R = window.groups, window.up_groups, x.size(1), down.size(0)
    if groups < 1 or up_groups < 1:
        raise refusal(NAME, f"groups are {groups} and {up_groups}, wanted at least 1")
    if C % groups or R % groups:
        raise refusal(NAME, f"groups is {groups}, wanted a divisor of the {C} channels of x and of the rank {R}")
    if down.size(1) != C // groups:
        raise refusal(
            NAME, f"down is {shape_of(down)}, wanted (R, {C // groups}, ...) for x {shape_of(x)} in {groups} groups"
        )
    if up.dim() == 0 or R % up_groups or up.size(0) % up_groups:
        raise refusal(
            NAME, f"up_groups is {up_groups}, wanted a divisor of the rank {R} and of the outputs of up {shape_of(up)}"
        )
    if up.dim() != down.dim() or up.size(1) != R // up_groups or any(size != 1 for size in up.shape[2:]):
        raise refusal(
            NAME,
            f"up is {shape_of(up)}, wanted (N, {R // up_groups}, 1, ...) for down {shape_of(down)} and "
            f"{up_groups} up_groups",
        )


def _check_window(x: Tensor, down: Tensor, window: Window) -> None:
    d = down.dim() - 2
    lengths = {"stride": (d,), "dilation": (d,), "padding": (d, 2 * d)}
    for name, least in (("stride", 1), ("dilation", 1), ("padding", 0)):
        sizes = getattr(window, name)
        if len(sizes) not in lengths[name]:
            raise refusal(NAME, f"{name} is {list(sizes)}, wanted {' or '.join(map(str, lengths[name]))} numbers")
        if any(size < least for size in sizes):
            raise refusal(NAME, f"{name} is {list(sizes)}, wanted numbers from {least} on")
    if any(size < 1 for size in down.shape[2:]):
        raise refusal(NAME, f"the kernel of down is {shape_of(down)[2:]}, wanted numbers from 1 on")
    for i, (begin, end) in enumerate(window.pads()):
        reach = window.dilation[i] * (down.size(2 + i) - 1) + 1
        if x.size(2 + i) + begin + end < reach:
            raise refusal(
                NAME,
                f"x is {shape_of(x)}, wanted at least {reach} numbers in padded dimension {i} for "
                f"the kernel of down {shape_of(down)}",
            )


def window_of(
    down: Tensor,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    up_groups: int,
) -> Window:
    """The window of arguments as PyTorch's own convolutions take them; RuntimeError on what is no number."""
    d = down.dim() - 2
    stride, dilation = _sizes("stride", stride, d), _sizes("dilation", dilation, d)
    return Window(stride, _paddings(padding, stride, dilation, down), dilation, groups, up_groups)


def _sizes(name: str, value: int | Sequence[int], d: int) -> list[int]:
    sizes = list(value) if isinstance(value, (list, tuple)) else [value] * d
    if not all(isinstance(size, int) or hasattr(size, "__index__") for size in sizes):
        raise refusal(NAME, f"{name} is {value!r}, wanted whole numbers")
    return sizes


def _paddings(padding: int | str | Sequence[int], stride: list[int], dilation: list[int], down: Tensor) -> list[int]:
    d = len(stride)
    if not isinstance(padding, str):
        return _sizes("padding", padding, d)
    if padding == "valid":
        return [0] * d
    if padding != "same":
        raise refusal(NAME, f"padding is {padding!r}, wanted numbers, 'same' or 'valid'")
    if any(each != 1 for each in stride):
        raise refusal(NAME, f"padding is 'same' with stride {stride}, wanted stride 1")
    totals = [each * (size - 1) for each, size in zip(dilation, down.shape[2:], strict=True)]
    return [side for total in totals for side in (total // 2, total - total // 2)]


def _forward(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, window: Window, activation: str, residual: Tensor | None
) -> Forward:
    last = channels_last(x, down)
    outputs = reference.low_rank_conv_forward(x, down, up, bias, window, activation, residual)
    return Forward(*(in_format(each, last) for each in outputs))


def _empty(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, window: Window, activation: str, residual: Tensor | None
) -> Forward:
    sizes, last = output_sizes(x, down, window), channels_last(x, down)

    def empty(channels: int) -> Tensor:
        if last:
            return x.new_empty((x.size(0), *sizes, channels)).movedim(-1, 1)
        return x.new_empty((x.size(0), channels, *sizes))

    return Forward(empty(up.size(0)), empty(down.size(0)))


def _pack(
    stride: list[int], padding: list[int], dilation: list[int], groups: int, up_groups: int, activation: str
) -> tuple[Window, str]:
    return Window(stride, padding, dilation, groups, up_groups), activation


CONV = Op(
    name=NAME,
    arguments="Tensor x, Tensor down, Tensor up, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
    " int groups=1, int up_groups=1, str activation='none', Tensor? residual=None",
    outputs=Forward,
    grads=Grads,
    check=check_low_rank_conv,
    forward=_forward,
    backward=reference.low_rank_conv_backward,
    empty=_empty,
    end=expand_backward,
    end_by_pytorch=reference.expand_backward,
    pack=_pack,
)
register(CONV)
