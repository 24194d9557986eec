"""What only a GPU can show of convolutions: cuDNN beside our kernels, capture, streams. Run with `-m gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import shrank
from tests.common.conv_cases import ConvCase
from tests.common.tolerances import assert_close, assert_every_element_close
from tests.ops.test_api import ops_of
from tests.ops.test_low_rank_conv import doubled, in_reference, is_last

pytestmark = pytest.mark.gpu
op = torch.ops.shrank.low_rank_conv
CASE = ConvCase((28, 30), (3, 3), 64, 96, 32, B=4, padding=(1, 1), activation="gelu", residual=True, last=True)
MODELS = [  # by chunks, by numbers, depthwise, grouped; 1d, 2d, 3d
    ConvCase((56, 56), (3, 3), 64, 64, 16, B=8, padding=(1, 1), last=True),
    ConvCase((28, 28), (3, 3), 128, 128, 32, B=8, padding=(1, 1), last=True),
    ConvCase((14, 14), (3, 3), 256, 256, 64, B=8, padding=(1, 1), last=True),
    ConvCase((7, 7), (3, 3), 512, 512, 128, B=8, padding=(1, 1), last=True),
    ConvCase((32, 32), (3, 3), 320, 320, 80, padding=(1, 1), last=True),
    ConvCase((112, 112), (7, 7), 3, 64, 24, stride=(2, 2), padding=(3, 3), last=True),
    ConvCase((1532, 1), (512, 1), 1, 128, 48, B=8, stride=(4, 1), last=True),
    ConvCase((127, 1), (64, 1), 128, 128, 56, B=8, padding=(31, 32, 0, 0), last=True),
    ConvCase((300,), (3,), 80, 384, 40, B=4, padding=(1,), last=True),
    ConvCase((149,), (128,), 768, 768, 384, padding=(64,), groups=16, up_groups=16, last=True),
    ConvCase((8, 32, 32), (2, 16, 16), 3, 96, 48, stride=(2, 16, 16), last=True),
    ConvCase((56, 56), (3, 3), 128, 128, 128, B=8, padding=(1, 1), groups=128, last=True),
    ConvCase((56, 56), (7, 7), 96, 384, 96, padding=(3, 3), groups=96, last=True),
    ConvCase((2048,), (4,), 1536, 80, 1536, padding=(3, 0), groups=1536, last=True),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_layers_of_models(case: ConvCase, dtype: torch.dtype) -> None:
    for end in (case, replace(case, activation="gelu", residual=True), replace(case, activation="silu", last=False)):
        arguments = end.tensors(dtype, "cuda")
        wanted, torchs = in_reference(*doubled(arguments)), in_reference(*arguments)
        for y in (op(*arguments), torch.ops.shrank.low_rank_conv_train(*arguments)[0]):
            assert_close(y, wanted, torchs)
            assert_every_element_close(y, wanted)
            assert is_last(y) if end.last else y.is_contiguous()


def test_ced_is_one_op_and_trains() -> None:
    layer = shrank.CED(64, 96, 32, (3, 3), padding=1, device="cuda", dtype=torch.bfloat16)
    layer, x = layer.to(memory_format=torch.channels_last), CASE.tensors(torch.bfloat16, "cuda")[0].requires_grad_()
    with torch.no_grad():
        assert ops_of(lambda: layer(x)) == ["low_rank_conv"]
    assert ops_of(lambda: layer(x)) == ["low_rank_conv_train"]
    layer(x).float().square().mean().backward()
    found = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    with shrank.backend("torch"):
        layer(x).float().square().mean().backward()
    for ours, torchs in zip(found, [x.grad, *(p.grad for p in layer.parameters())], strict=True):
        assert_close(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_graph_capture(dtype: torch.dtype) -> None:
    x, *rest = CASE.tensors(dtype, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(x, *rest)  # cuDNN makes its plans on the first call
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = op(x, *rest)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, op(x, *rest))


def test_other_streams() -> None:
    """The kernel must queue behind what its own stream does, not the default one."""
    x, *rest = CASE.tensors(torch.bfloat16, "cuda")
    expected = op(x + 1, *rest)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            torch.cuda._sleep(10_000_000)
            assert torch.equal(op(x + 1, *rest), expected)
