"""The text recogniser of PP-OCRv4 (Apache 2.0), which the package rapidocr-onnxruntime carries, and lines of text drawn
as images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import onnx
import torch
from onnx import NodeProto, numpy_helper
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data.models import package_folder

HEIGHT, WIDTH = 48, 320  # of the images that the network takes
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Italic", "STIXGeneral")
_MODEL = "ch_PP-OCRv4_rec_infer.onnx"
_NOISE, _SHADES = 12.0, (40, 110)  # of 255
Attributes = dict[str, object]


def recogniser() -> nn.Module:
    """(images, 3, HEIGHT, WIDTH) in [-1, 1] -> (images, WIDTH / 8, characters) probabilities: 38 convolutions, of which
    13 are depthwise, and 9 linear layers."""
    return Graph(onnx.load(package_folder("rapidocr_onnxruntime") / "models" / _MODEL)).eval()


@cache
def characters() -> list[str]:
    """By their numbers; the first stands for none."""
    model = onnx.load(package_folder("rapidocr_onnxruntime") / "models" / _MODEL)
    (listed,) = (entry.value for entry in model.metadata_props if entry.key == "character")
    return ["", *listed.splitlines(), " "]


def read(probabilities: Tensor) -> list[str]:
    """The most likely character of each place, repetitions and blanks left out."""
    known, found = characters(), probabilities.argmax(-1)
    return ["".join(known[n] for n in row.unique_consecutive().tolist()) for row in found]


def drawn(lines: list[str], seed: int = 0) -> Tensor:
    """Images (lines, 3, HEIGHT, WIDTH) in [-1, 1], dark on light with noise, each in one of the fonts of matplotlib."""
    generator = np.random.default_rng(seed)
    return torch.stack([_image(line, FONTS[i % len(FONTS)], generator) for i, line in enumerate(lines)])


def _image(line: str, font: str, generator: np.random.Generator) -> Tensor:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    size = 34
    while (box := ImageFont.truetype(path, size).getbbox(line))[2] > WIDTH - 12 and size > 8:
        size -= 1
    shade = int(generator.integers(*_SHADES))
    image = Image.new("L", (WIDTH, HEIGHT), 255 - shade)
    top = (HEIGHT - box[1] - box[3]) // 2
    ImageDraw.Draw(image).text((6, top), line, font=ImageFont.truetype(path, size), fill=shade)
    pixels = np.asarray(image, dtype=np.float32) + generator.normal(0, _NOISE, (HEIGHT, WIDTH))
    scaled = torch.from_numpy(pixels.clip(0, 255).astype(np.float32) / 127.5 - 1)
    return scaled.expand(3, -1, -1)


class Graph(nn.Module):
    """A graph of ONNX as a module of PyTorch: convolutions and products with weights are its layers."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        known |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
        self.constants = {name: torch.from_numpy(np.array(value)) for name, value in known.items()}
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.layers, self.steps = nn.ModuleDict(), []
        for node in graph.node:
            if node.op_type != "Constant":
                self.steps.append(self._step(node))

    def forward(self, x: Tensor) -> Tensor:
        values = {**self.constants, self.input: x}
        for layer, function, inputs, output in self.steps:
            run = self.layers[layer] if layer else function
            values[output] = run(*(values[name] for name in inputs))
        return values[self.output]

    def _step(self, node: NodeProto) -> tuple[str, Callable | None, list[str], str]:
        """(name of a layer or '', else a function, names of its inputs, name of its output)"""
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        inputs, output = [name for name in node.input if name], node.output[0]
        made = _LAYERS.get(node.op_type)
        weights = [self.constants[name] for name in inputs[1:] if name in self.constants]
        if made and weights:
            kind = "depthwise" if attributes.get("group", 1) > 1 else node.op_type.lower()
            name = f"{kind}{len(self.layers)}"
            self.layers[name] = made(weights, attributes)
            return name, None, inputs[:1], output
        if node.op_type not in _FUNCTIONS:
            raise NotImplementedError(f"{node.op_type} of ONNX")
        return "", _FUNCTIONS[node.op_type](attributes), inputs, output


def _convolution(weights: list[Tensor], attributes: Attributes) -> nn.Module:
    weight, *bias = weights
    before, after = attributes.get("pads", [0, 0, 0, 0])[:2], attributes.get("pads", [0, 0, 0, 0])[2:]
    if before != after or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b""):
        raise NotImplementedError(f"a convolution with {attributes}")
    groups = attributes.get("group", 1)
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(attributes.get("strides", (1, 1))),
        tuple(before),
        tuple(attributes.get("dilations", (1, 1))),
        groups,
        bias=bool(bias),
    )
    return _with(layer, weight, *bias)


def _linear(weights: list[Tensor], attributes: Attributes) -> nn.Module:
    (weight,) = weights
    return _with(nn.Linear(*weight.shape, bias=False), weight.T.contiguous())


def _normalisation(weights: list[Tensor], attributes: Attributes) -> nn.Module:
    scale, shift, mean, variance = weights
    layer = nn.BatchNorm2d(len(scale), attributes.get("epsilon", 1e-5))
    layer.running_mean, layer.running_var = mean.clone(), variance.clone()
    return _with(layer, scale, shift)


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


_LAYERS = {"Conv": _convolution, "MatMul": _linear, "BatchNormalization": _normalisation}
_DTYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64}


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor, steps: Tensor | None = None) -> Tensor:
    for place, (start, end, axis) in enumerate(zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True)):
        index = [slice(None)] * x.dim()
        index[axis] = slice(start, end, None if steps is None else int(steps[place]))
        x = x[tuple(index)]
    return x


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    """0 stands for the size that is there."""
    return x.reshape([x.shape[n] if size == 0 else size for n, size in enumerate(shape.tolist())])


def _mean(attributes: Attributes) -> Callable:
    return lambda x: x.mean(tuple(attributes["axes"]), keepdim=bool(attributes.get("keepdims", 1)))


def _pooled(attributes: Attributes) -> Callable:
    if any(attributes.get("pads", ())):
        raise NotImplementedError(f"a pooling with {attributes}")
    return lambda x: F.avg_pool2d(x, tuple(attributes["kernel_shape"]), tuple(attributes["strides"]))


def _hard_sigmoid(attributes: Attributes) -> Callable:
    slope, shift = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
    return lambda x: (slope * x + shift).clamp(0, 1)


# From the attributes of a node to what it computes.
_FUNCTIONS: dict[str, Callable[[Attributes], Callable]] = {
    "Add": lambda _: torch.add,
    "Sub": lambda _: torch.sub,
    "Mul": lambda _: torch.mul,
    "Div": lambda _: lambda a, b: a / b if a.is_floating_point() else a // b,
    "Pow": lambda _: torch.pow,
    "Sqrt": lambda _: torch.sqrt,
    "Relu": lambda _: torch.relu,
    "Sigmoid": lambda _: torch.sigmoid,
    "HardSigmoid": _hard_sigmoid,
    "MatMul": lambda _: torch.matmul,
    "Clip": lambda _: lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
    "Cast": lambda a: lambda x: x.to(_DTYPES[a["to"]]),
    "Shape": lambda _: lambda x: torch.tensor(x.shape),
    "Slice": lambda _: _slice,
    "Reshape": lambda _: _reshape,
    "ReduceMean": _mean,
    "GlobalAveragePool": lambda _: lambda x: x.mean((2, 3), keepdim=True),
    "AveragePool": _pooled,
    "Softmax": lambda a: lambda x: x.softmax(a.get("axis", -1)),
    "Transpose": lambda a: lambda x: x.permute(*a["perm"]),
    "Concat": lambda a: lambda *parts: torch.cat([p.reshape(-1) if p.dim() == 0 else p for p in parts], a["axis"]),
    "Squeeze": lambda a: lambda x, axes=None: x.squeeze(tuple(a["axes"] if axes is None else axes.tolist())),
}
