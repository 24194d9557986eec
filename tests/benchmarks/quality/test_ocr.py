"""The reader of text: a graph of ONNX computes as a module of PyTorch what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks.data.ocr import FONTS, HEIGHT, WIDTH, Graph, drawn
from tests.common.models import draw
from tests.common.tolerances import assert_close


def graph_of(nodes: list, **constants: np.ndarray):
    given = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    return helper.make_model(helper.make_graph(nodes, "graph", ends[:1], ends[1:], given))


def test_layers_are_those_of_pytorch() -> None:
    conv, depthwise = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    norm, linear = nn.BatchNorm2d(8).eval(), nn.Linear(8, 5, bias=False)
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 1)
    numbers = {name: p.detach().numpy() for name, p in (("w", conv.weight), ("b", conv.bias), ("d", depthwise.weight))}
    numbers |= {"s": norm.weight.detach().numpy(), "m": norm.running_mean.numpy(), "v": norm.running_var.numpy()}
    numbers |= {"z": np.zeros(8, np.float32), "l": linear.weight.detach().numpy().T.copy()}
    model = Graph(
        graph_of(
            [
                helper.make_node(
                    "Conv", ["x", "w", "b"], ["1"], strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3]
                ),
                helper.make_node("Conv", ["1", "d"], ["2"], group=8, pads=[1, 1, 1, 1]),
                helper.make_node("BatchNormalization", ["2", "s", "z", "m", "v"], ["3"], epsilon=1e-5),
                helper.make_node("GlobalAveragePool", ["3"], ["4"]),
                helper.make_node("Squeeze", ["4"], ["5"], axes=[2, 3]),
                helper.make_node("MatMul", ["5", "l"], ["6"]),
                helper.make_node("Softmax", ["6"], ["y"], axis=-1),
            ],
            **numbers,
        )
    ).eval()
    names = {name: type(layer) for name, layer in model.layers.items()}
    assert names == {
        "conv0": nn.Conv2d,
        "depthwise1": nn.Conv2d,
        "batchnormalization2": nn.BatchNorm2d,
        "matmul3": nn.Linear,
    }
    x = draw(2, 3, 9, 9)
    with torch.no_grad():
        assert_close(model(x), linear(norm(depthwise(conv(x))).mean((2, 3))).softmax(-1))


def test_shapes_are_computed_as_the_graph_says() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "one", "zero"], ["first"]),
        helper.make_node("Concat", ["first", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["1"]),
        helper.make_node("Clip", ["1", "low", "high"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "one": np.array([1]), "rest": np.array([2, -1])}
    limits = {"low": np.array(-0.5, np.float32), "high": np.array(0.5, np.float32)}
    x = draw(3, 4, 5)
    assert_close(Graph(graph_of(nodes, **constants, **limits))(x), x.reshape(3, 2, 10).clamp(-0.5, 0.5))


@pytest.mark.parametrize(
    "node, message",
    [
        (helper.make_node("Erf", ["x"], ["y"]), "Erf of ONNX"),
        (helper.make_node("Conv", ["x", "w"], ["y"], pads=[0, 0, 1, 1]), "a convolution with"),
        (helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], pads=[1, 1, 1, 1]), "a pooling with"),
    ],
)
def test_what_is_not_known_is_refused(node, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        Graph(graph_of([node], w=np.zeros((1, 1, 1, 1), np.float32)))


def test_lines_are_drawn_whole() -> None:
    lines = ["Autism is a", "a line that is too long for letters of the size of the others"] * len(FONTS)
    images = drawn(lines)
    assert images.shape == (len(lines), 3, HEIGHT, WIDTH) and images.abs().max() <= 1
    assert_close(images, drawn(lines))
    assert (images - drawn(lines, seed=1)).abs().max() > 0
    left, right = images[:, 0, :, :5].mean((1, 2)), images[:, 0, :, -5:].mean((1, 2))
    assert (left - right).abs().max() < 0.05  # nothing but noise on the margins
