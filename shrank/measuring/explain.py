"""Which kernel the native extension takes for a layer on a GPU, why, and at what predicted cost.

Needs no GPU, and the extension only where it may have a kernel for the layer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass

import torch
from rich.table import Table
from torch import Tensor

from ..ops import native
from ..ops.conv import check_low_rank_conv
from ..ops.reference import Window, output_sizes
from . import explain_plain

Sizes = tuple[int, int, int]


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """'16384,768,3072,96' -> M, K, N, R: tokens, in_features, out_features, rank."""
    M, K, N, R = whole_numbers("--shape", text, "M,K,N,R: four whole numbers above 0, such as 16384,768,3072,96", 4)
    return M, K, N, R


def whole_numbers(option: str, text: str, wanted: str, count: int) -> list[int]:
    """The numbers of '16384,768'; ValueError, with what is wanted, unless there are so many, all above 0."""
    sizes = text.split(",")
    if len(sizes) != count or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"{option} is {text!r}, wanted {wanted}")
    return list(map(int, sizes))


@dataclass(frozen=True)
class Conv:
    """A low-rank convolution; the sizes as (depth, height, width), 1 where there are fewer dimensions."""

    batch: int
    C: int
    N: int
    R: int
    input: Sizes
    kernel: Sizes
    stride: Sizes = (1, 1, 1)
    begin: Sizes = (0, 0, 0)
    end: Sizes = (0, 0, 0)
    dilation: Sizes = (1, 1, 1)
    groups: int = 1
    up_groups: int = 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, down and up, without numbers."""
        x = torch.empty(self.batch, self.C, *self.input, device="meta")
        down = torch.empty(self.R, self.C // max(self.groups, 1), *self.kernel, device="meta")
        return x, down, torch.empty(self.N, self.R // max(self.up_groups, 1), 1, 1, 1, device="meta")

    def window(self) -> Window:
        pads = [pad for pair in zip(self.begin, self.end, strict=True) for pad in pair]
        return Window(list(self.stride), pads, list(self.dilation), self.groups, self.up_groups)

    def output(self) -> Sizes:
        x, down, _ = self.tensors()
        return tuple(output_sizes(x, down, self.window()))

    def check(self) -> None:
        """ValueError, in the words of the op, if it would refuse these sizes and groups."""
        try:
            check_low_rank_conv(*self.tensors(), None, self.window(), "none", None)
        except RuntimeError as refused:
            raise ValueError(f"--conv: {refused}") from None


def parse_conv(
    text: str, stride: str = "1", padding: str = "0", dilation: str = "1", groups: int = 1, up_groups: int = 1
) -> Conv:
    """'32,64,56x56,3x3,64,16' -> batch, in_channels, input, kernel, out_channels, rank.

    stride, padding, dilation: one number, or one for each dimension ('2x1'); of padding also before:after ('3:0x1:1').
    Raises ValueError on anything else, on groups that do not divide, and on a kernel larger than the padded input.
    """
    parts = text.split(",")
    if len(parts) != 6:
        raise ValueError(f"--conv is {text!r}, wanted B,C,INPUT,KERNEL,N,R, such as 32,64,56x56,3x3,64,16")
    batch, C, N, R = (_numbers("--conv", part, 1, 1)[0] for part in (*parts[:2], *parts[4:]))
    size, kernel = (_numbers("--conv", part, None, 1) for part in parts[2:4])
    d = len(size)
    if len(kernel) != d or d > 3:
        raise ValueError(f"--conv is {text!r}, wanted as many kernel as input sizes, at most 3")
    pads = [_numbers("--padding", each, None, 0) for each in padding.split("x")]
    if any(len(pad) > 2 for pad in pads) or len(pads) not in (1, d):
        raise ValueError(f"--padding is {padding!r}, wanted 1 or {d} numbers or pairs such as 1:2")
    pads = [(pad[0], pad[-1]) for pad in pads * (d // len(pads))]
    conv = Conv(
        batch,
        C,
        N,
        R,
        _three(size, 1),
        _three(kernel, 1),
        _three(_numbers("--stride", stride, d, 1), 1),
        _three([begin for begin, _ in pads], 0),
        _three([end for _, end in pads], 0),
        _three(_numbers("--dilation", dilation, d, 1), 1),
        groups,
        up_groups,
    )
    conv.check()
    return conv


def _numbers(name: str, text: str, count: int | None, least: int) -> list[int]:
    """The numbers of '3x2' or '1:2', as many as wanted; a single one stands for all."""
    parts = text.replace(":", "x").split("x")
    if not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise ValueError(f"{name} has {text!r}, wanted whole numbers from {least} on, such as 3x3")
    if count is not None and len(parts) not in (1, count):
        raise ValueError(f"{name} is {text!r}, wanted 1 or {count} numbers")
    return [int(part) for part in parts] * (count if count and len(parts) == 1 else 1)


def _three(sizes: list[int], fill: int) -> Sizes:
    return (*(fill,) * (3 - len(sizes)), *sizes)


def explain(
    shape: tuple[int, int, int, int] | Conv,
    dtype: str = "bf16",
    gpu: str | None = None,
    activation: str = "none",
    bias: bool = True,
    residual: bool = False,
    training: bool = False,
    gate: int = 0,
    pivoted: bool = False,
) -> dict:
    """The decision, the alternatives and the costs of a linear layer or of a convolution with its channels last
    (csrc/select/explain.cpp lists the keys). gpu: a name, cuda:N or cpu. gate: the rank of the gate of a gated layer.
    pivoted: whether a linear layer's factors are, of a gated layer both.

    Raises ValueError on an unknown name, on a gate or pivots where there can be none and without a GPU to explain for,
    RuntimeError with the reasons where the extension decides and is not loaded.
    """
    explain_plain.check_names(dtype, activation, gpu)
    if gpu is None:
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here: name a GPU with --gpu, such as H200, or cpu")
        gpu = f"cuda:{torch.cuda.current_device()}"
    if gate < 0 or (gate and (residual or isinstance(shape, Conv))):
        raise ValueError(f"gate is {gate}: the rank of a gate, of a linear layer without residual; or 0")
    if pivoted and (isinstance(shape, Conv) or max(shape[3], gate) > shape[2]):
        raise ValueError("pivoted: of a linear layer, of at most as many ranks as outputs")
    end = (dtype, activation, bias, residual, training)
    if (on_cpu := explain_plain.is_cpu(gpu)) or native.problems():
        return _without_extension(_problem(shape, *end, gate, pivoted), gpu, on_cpu)
    if isinstance(shape, Conv):
        return json.loads(torch.ops.shrank.explain_conv(*astuple(shape), *end, True, gpu))
    return json.loads(torch.ops.shrank.explain(*shape, *end, gate, pivoted, gpu))


def _problem(
    shape: tuple[int, int, int, int] | Conv,
    dtype: str,
    activation: str,
    bias: bool,
    residual: bool,
    training: bool,
    gate: int,
    pivoted: bool,
) -> dict:
    """What is asked, as the extension repeats it."""
    end = {
        "dtype": explain_plain.DTYPES[dtype],
        "activation": activation,
        "bias": bias,
        "residual": residual,
        "training": training,
        "captured": False,
    }
    if isinstance(shape, Conv):
        return {**asdict(shape), "output": shape.output(), **end, "channels_last": True}
    return {**dict(zip("MKNR", shape, strict=True)), **end, "aligned": True, "gate_R": gate, "pivoted": pivoted}


def _without_extension(problem: dict, gpu: str, on_cpu: bool) -> dict:
    if on_cpu:
        return explain_plain.facts(problem, gpu, *explain_plain.choice_on_cpu(problem))
    if reason := explain_plain.why_plain(problem):
        return explain_plain.facts(problem, gpu, explain_plain.plain_kernel(problem), reason)
    raise RuntimeError(
        "whether a kernel runs this layer is decided by the native extension, which is not loaded: "
        f"{'; '.join(native.problems())}. {native.HOW_TO_INSTALL}"
    )


def table(facts: dict) -> Table:
    """The facts for people."""
    problem, decision, runner_up = facts["problem"], facts["decision"], facts["runner_up"]
    options = [problem["activation"], *(name for name in ("bias", "residual", "training") if problem[name])]
    predicted = decision["microseconds"]
    shown = Table(show_header=False)
    shown.add_row("layer", _layer(problem))
    shown.add_row("", ", ".join([problem["dtype"], *(option for option in options if option != "none")]))
    shown.add_row("gpu", facts["device"]["name"])
    shown.add_row("kernel", decision["kernel"])
    shown.add_row("because", decision["reason"])
    if grid := decision["grid"]:
        shown.add_row("blocks", _blocks(decision["kernel"], grid))
    if flow := facts.get("in_flight"):
        shown.add_row("weights on their way", f"{_kib(flow['bytes_of_sm'])} an SM; it needs {_kib(flow['needed'])}")
    word = "measured" if facts["status"].startswith("measured") else "predicted"
    if predicted is not None:
        shown.add_row(word, microseconds_text(predicted))
        shown.add_row(
            "floor", f"{microseconds_text(facts['floor_us'])}; {word} is {predicted / facts['floor_us']:.2f}x that"
        )
    shown.add_row(
        "runner-up",
        f"{runner_up['kernel']}, {_beside(runner_up['microseconds'], predicted, word)}" if runner_up else "none",
    )
    for candidate in facts["candidates"]:
        if not candidate["legal"]:
            shown.add_row("not possible", f"{candidate['kernel']}: {candidate['why_not']}")
    if predicted is not None:
        shown.add_row("dense layer", _beside(facts["dense_us"], predicted, word))
    shown.add_row("figures", facts["status"])
    if predicted is not None:
        shown.add_row("", f"{facts['device']['name']}: {facts['device']['source']}")
    return shown


def _blocks(kernel: str, grid: dict) -> str:
    if kernel == "shrink_expand":
        return f"{grid['block_m']} tokens at a time, K in {grid['blocks_n']} parts"
    held = f"h of rank up to {grid['max_rank']} held" if grid["max_rank"] else "h streamed"
    tokens = f"pixels, read by {grid['gather']}" if "gather" in grid else "tokens"
    return f"{grid['blocks_m']} x {grid['blocks_n']}, of {grid['block_m']} {tokens}, {held}"


def _kib(size: float) -> str:
    return f"{size / 1024:.0f} KiB"


def _layer(problem: dict) -> str:
    if "M" in problem:
        gate = f", gate of R {problem['gate_R']}" if problem["gate_R"] else ""
        pivoted = ", pivoted" if problem["pivoted"] else ""
        return ", ".join(f"{name} {problem[name]}" for name in "MKNR") + gate + pivoted
    sizes = {name: "x".join(map(str, problem[name])) for name in ("input", "kernel", "stride", "dilation")}
    padding = "x".join(f"{begin}:{end}" for begin, end in zip(problem["begin"], problem["end"], strict=True))
    return (
        f"{problem['batch']} of {problem['C']} channels, {sizes['input']}; kernel {sizes['kernel']}, stride "
        f"{sizes['stride']}, padding {padding}, dilation {sizes['dilation']}; R {problem['R']}, N {problem['N']}, "
        f"groups {problem['groups']} and {problem['up_groups']}"
    )


def microseconds_text(microseconds: float) -> str:
    return f"{microseconds:.3g} us" if microseconds < 100 else f"{microseconds:,.0f} us"


def _beside(microseconds: float, chosen: float, word: str) -> str:
    """A predicted time beside that of the choice, which is predicted or measured."""
    return f"{microseconds_text(microseconds)}: {microseconds / chosen:.2f}x the {word} time"
