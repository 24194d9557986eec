"""What only a GPU can show: capture, streams, devices, sizes beyond 32 bits, cuDNN beside our kernels. Run with
`-m gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import shrank
from shrank.measuring.explain import explain
from shrank.ops import reference
from tests.common.conv_cases import ConvCase
from tests.common.gated_cases import GatedCase
from tests.common.linear_cases import LinearCase
from tests.common.ops import CONV_OP, EACH_OP, GATED_OP, LINEAR_OP, PIVOTED_OP, doubled, ops_of, tensors_of
from tests.common.pivoted_cases import PivotedCase
from tests.common.tolerances import assert_close, assert_every_element_close

pytestmark = pytest.mark.gpu
CASES = {
    "linear": LinearCase((64,), 256, 384, 32, True, "gelu", True),
    "gated": GatedCase((64,), 256, 384, 32, 48),
    "pivoted": PivotedCase((64,), 256, 384, 72, "both", "gelu", True),
    "conv": ConvCase((28, 30), (3, 3), 64, 96, 32, B=4, padding=(1, 1), activation="gelu", residual=True, last=True),
}
# Tokens are those of batches, single and full.
LINEAR_MODELS = [
    LinearCase((M,), K, N, R)
    for M in (1, 33, 128, 1000, 4096)
    for K, N, R in [
        (768, 768, 64),
        (768, 3072, 96),
        (3072, 768, 128),
        (1024, 1032, 192),
        (4096, 4096, 256),
        (768, 776, 40),
        (2048, 2048, 320),
    ]
]
CONV_MODELS = [  # by chunks, by numbers, depthwise, grouped; 1d, 2d, 3d
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
GATED_MODELS = [
    GatedCase((M,), K, N, S, R, bias)
    for M in (1, 33, 1000, 4096)
    for K, N, S, R, bias in [
        (576, 1536, 64, 96, "none"),
        (768, 1152, 128, 128, "both"),
        (4096, 14336, 256, 200, "none"),
        (2048, 5632, 320, 64, "gate"),
    ]
]
PIVOTED_MODELS = [
    PivotedCase((M,), K, N, R, order=order)
    for M in (1, 33, 1000, 4096)
    for K, N, R, order in [
        (768, 768, 136, "mixed"),
        (768, 3072, 192, "first"),
        (3072, 768, 256, "mixed"),
        (1024, 1024, 400, "last"),
        (768, 776, 40, "mixed"),
        (256, 256, 256, "mixed"),
    ]
]
MODELS = (
    [(LINEAR_OP, case, case) for case in LINEAR_MODELS]
    + [(GATED_OP, case, case) for case in GATED_MODELS]
    + [(PIVOTED_OP, case, case) for case in PIVOTED_MODELS]
    + [(CONV_OP, case, replace(case, last=False)) for case in CONV_MODELS]
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tested", "case", "other"), MODELS, ids=[f"{tested}-{case}" for tested, case, _ in MODELS])
def test_the_layers_of_models(tested, case, other, dtype: torch.dtype) -> None:
    full = {"activation": "gelu"} | ({"residual": True} if tested.definition.takes_residual else {})
    for end in (case, replace(case, **full), replace(other, activation="silu")):
        arguments = end.tensors(dtype, "cuda")
        wanted, torchs = tested.reference(*doubled(arguments)), tested.reference(*arguments)
        for y in (tested.op(*arguments), tested.op_train(*arguments)[0]):
            assert_close(y, wanted, torchs)
            assert_every_element_close(y, wanted)
            assert end.is_laid_out(y, arguments[0])


@EACH_OP
def test_the_native_kernels_run_here(tested) -> None:
    assert shrank.why_not(*tensors_of(CASES[tested.name].tensors(torch.bfloat16, "cuda"))[:4]) == []
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"shrank::{tested.definition.name}", "CUDA")


LAYERS = {
    "linear": lambda: shrank.LED(256, 384, 32, device="cuda", dtype=torch.bfloat16),
    "conv": lambda: shrank.CED(64, 96, 32, (3, 3), padding=1, device="cuda", dtype=torch.bfloat16),
}


def gradients(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(layer(x).float().square().mean(), [x, *layer.parameters()])


@pytest.mark.parametrize("tested", [LINEAR_OP, CONV_OP], ids=str)
def test_a_layer_is_one_op_and_trains(tested) -> None:
    layer, name = LAYERS[tested.name]().to(memory_format=torch.channels_last), tested.definition.name
    x = CASES[tested.name].tensors(torch.bfloat16, "cuda")[0].requires_grad_()
    with torch.no_grad():
        assert ops_of(lambda: layer(x)) == [name]
    assert ops_of(lambda: layer(x)) == [f"{name}_train"]
    found = gradients(layer, x)
    with shrank.backend("torch"):
        wanted = gradients(layer, x)
    for ours, torchs in zip(found, wanted, strict=True):
        assert_close(ours, torchs)


def test_led_computes_in_fp32() -> None:
    layer, x = shrank.LED(256, 384, 32, device="cuda"), torch.randn(64, 256, device="cuda")
    with torch.no_grad():
        assert ops_of(lambda: layer(x)) == ["low_rank_linear"]
        assert_close(layer(x), reference.low_rank_linear(x, layer.down, layer.up, layer.bias))


@pytest.mark.parametrize("M", [1, 16, 64, 300])
def test_several_layers_get_the_bits_that_they_get_alone(M: int) -> None:
    layers = [LinearCase((M,), 4096, N, R).tensors(torch.bfloat16, "cuda")[:4] for N, R in ((4096, 256), (1024, 128))]
    x, lists = layers[0][0], [[*each, each[0]] for each in zip(*(layer[1:] for layer in layers), strict=True)]
    found = shrank.low_rank_linear_multi(x, *lists, backend="native")
    for y, each in zip(found, zip(*lists, strict=True), strict=True):
        assert torch.equal(y, LINEAR_OP.op(x, *each))


CAPTURED = [
    *((LINEAR_OP, replace(CASES["linear"], activation=each), torch.bfloat16) for each in reference.ACTIVATIONS),
    *((GATED_OP, replace(CASES["gated"], batch=(M,)), torch.bfloat16) for M in (4, 256)),
    *((PIVOTED_OP, replace(CASES["pivoted"], batch=(M,)), torch.bfloat16) for M in (4, 256)),
    *((CONV_OP, CASES["conv"], dtype) for dtype in (torch.bfloat16, torch.float32)),
]


@pytest.mark.parametrize(("tested", "case", "dtype"), CAPTURED, ids=str)
def test_graph_capture(tested, case, dtype: torch.dtype) -> None:
    op, (x, *rest) = tested.op, case.tensors(dtype, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(x, *rest)  # on the first call of a stream cuBLAS makes its workspace, and cuDNN its plans
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = op(x, *rest)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, op(x, *rest))


@pytest.mark.parametrize(("tested", "dtype"), [(LINEAR_OP, torch.float32), (CONV_OP, torch.bfloat16)], ids=str)
def test_other_streams(tested, dtype: torch.dtype) -> None:
    """The kernel must queue behind what its own stream does, not the default one."""
    op, (x, *rest) = tested.op, CASES[tested.name].tensors(dtype, "cuda")
    expected = op(x + 1, *rest)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            torch.cuda._sleep(10_000_000)
            assert torch.equal(op(x + 1, *rest), expected)


@EACH_OP
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_other_devices(tested) -> None:
    arguments = CASES[tested.name].tensors(torch.float32, "cuda:1")
    y = tested.op(*arguments)  # while cuda:0 is the current one
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    assert_close(y, tested.reference(*arguments))


def test_more_elements_than_32_bits_count() -> None:
    M, N = 2**16 + 3, 2**15 + 8
    free, _ = torch.cuda.mem_get_info()
    assert free > 12 * M * N, "needs about 26 GB"
    x = torch.randn(M, 8, device="cuda", dtype=torch.bfloat16)
    down, up = torch.randn(8, 8, device="cuda").bfloat16(), torch.randn(N, 8, device="cuda").bfloat16()
    residual = torch.ones(1, 1, device="cuda", dtype=torch.bfloat16).expand(M, N).contiguous()
    y = LINEAR_OP.op(x, down, up, None, "relu", residual)
    for rows in (slice(0, 16), slice(M - 16, M)):
        assert_close(y[rows], reference.low_rank_linear(x[rows], down, up, None, "relu", residual[rows]))
    assert y.view(-1)[::1_000_003].isfinite().all()


def test_tf32_only_where_pytorch_allows_it() -> None:
    arguments = LinearCase((512,), 2048, 512, 256, False, "relu").tensors(torch.float32, "cuda")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert_close(LINEAR_OP.op(*arguments), reference.low_rank_linear(*doubled(arguments)))


def test_memory_of_one_call() -> None:
    """y and h, nothing else of their size: the epilogue works in place."""
    M, K, N, R = 4096, 1024, 4096, 64
    arguments = LinearCase((M,), K, N, R, True, "gelu", True).tensors(torch.bfloat16, "cuda")
    LINEAR_OP.op(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = LINEAR_OP.op(*arguments)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * 2 * (M * N + M * R)
    assert y.is_cuda


def test_explain_knows_this_gpu() -> None:
    facts = explain((64, 256, 384, 32), gpu=None)
    assert facts["device"]["name"]


def test_each_matrix_kernel_is_chosen_for_some_layer() -> None:
    """Or the tests above would not be of them. By select's model of this GPU."""
    kernels = {
        explain((M, K, N, R), gpu=None, activation=activation)["decision"]["kernel"]
        for M in (1, 128, 1000, 4096)
        for K, N, R in [(768, 768, 64), (4096, 4096, 256), (2048, 2048, 320)]
        for activation in ("none", "gelu")
    }
    assert {"fused", "gemm_expand"} <= kernels
