"""What only a GPU can show: capture, streams, devices, sizes beyond 32 bits. Run with `-m gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import shrank
from shrank.measuring.explain import explain
from shrank.ops import reference
from tests.common.cases import Case
from tests.common.tolerances import assert_close, assert_every_element_close
from tests.ops.test_api import ops_of

pytestmark = pytest.mark.gpu
op = torch.ops.shrank.low_rank_linear
CASE = Case((64,), 256, 384, 32, True, "gelu", True)


def test_the_native_kernels_run_here() -> None:
    assert shrank.why_not(*CASE.tensors(torch.bfloat16, "cuda")[:4]) == []
    assert torch._C._dispatch_has_kernel_for_dispatch_key("shrank::low_rank_linear", "CUDA")


def test_led_is_one_op() -> None:
    layer, x = shrank.LED(256, 384, 32, device="cuda"), torch.randn(64, 256, device="cuda")
    assert ops_of(lambda: layer(x)) == ["low_rank_linear_train"]
    with torch.no_grad():
        assert ops_of(lambda: layer(x)) == ["low_rank_linear"]
        assert_close(layer(x), reference.low_rank_linear(x, layer.down, layer.up, layer.bias))


def test_explain_knows_this_gpu() -> None:
    facts = explain((64, 256, 384, 32), gpu=None)
    assert facts["device"]["name"]


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_graph_capture(activation: str) -> None:
    x, *rest = replace(CASE, activation=activation).tensors(torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(x, *rest)  # cuBLAS makes its workspace on the first call of a stream
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = op(x, *rest)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, op(x, *rest))


def test_other_streams() -> None:
    """The kernel must queue behind what its own stream does, not the default one."""
    x, *rest = CASE.tensors(torch.float32, "cuda")
    expected = op(x + 1, *rest)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            torch.cuda._sleep(10_000_000)
            y = op(x + 1, *rest)
            assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_other_devices() -> None:
    arguments = CASE.tensors(torch.float32, "cuda:1")
    y = op(*arguments)  # while cuda:0 is the current one
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    assert_close(y, reference.low_rank_linear(*arguments))


def test_more_elements_than_32_bits_count() -> None:
    M, N = 2**16 + 3, 2**15 + 8
    free, _ = torch.cuda.mem_get_info()
    assert free > 12 * M * N, "needs about 26 GB"
    x = torch.randn(M, 8, device="cuda", dtype=torch.bfloat16)
    down, up = torch.randn(8, 8, device="cuda").bfloat16(), torch.randn(N, 8, device="cuda").bfloat16()
    residual = torch.ones(1, 1, device="cuda", dtype=torch.bfloat16).expand(M, N).contiguous()
    y = op(x, down, up, None, "relu", residual)
    for rows in (slice(0, 16), slice(M - 16, M)):
        assert_close(y[rows], reference.low_rank_linear(x[rows], down, up, None, "relu", residual[rows]))
    assert y.view(-1)[::1_000_003].isfinite().all()


def test_tf32_only_where_pytorch_allows_it() -> None:
    arguments = Case((512,), 2048, 512, 256, False, "relu").tensors(torch.float32, "cuda")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert_close(op(*arguments), reference.low_rank_linear(*(a.double() if hasattr(a, "double") else a
                                                             for a in arguments)))


def test_memory_of_one_call() -> None:
    """y and h, nothing else of their size: the epilogue works in place."""
    M, K, N, R = 4096, 1024, 4096, 64
    arguments = Case((M,), K, N, R, True, "gelu", True).tensors(torch.bfloat16, "cuda")
    op(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = op(*arguments)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * 2 * (M * N + M * R)
    assert y.is_cuda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 33, 128, 1000, 4096])
@pytest.mark.parametrize(("K", "N", "R"), [(768, 768, 64), (768, 3072, 96), (3072, 768, 128), (1024, 1032, 192),
                                           (4096, 4096, 256), (768, 776, 40), (2048, 2048, 320)])
def test_the_layers_of_models(M: int, K: int, N: int, R: int, dtype: torch.dtype) -> None:
    for case in (Case((M,), K, N, R), Case((M,), K, N, R, True, "gelu", True), Case((M,), K, N, R, True, "silu")):
        arguments = case.tensors(dtype, "cuda")
        wide = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
        wanted, torchs = reference.low_rank_linear(*wide), reference.low_rank_linear(*arguments)
        for y in (op(*arguments), torch.ops.shrank.low_rank_linear_train(*arguments)[0]):
            assert_close(y, wanted, torchs)
            assert_every_element_close(y, wanted)


def test_each_matrix_kernel_is_chosen_for_some_layer() -> None:
    """Or the tests above would not be of them. By select's model of this GPU."""
    kernels = {explain((M, K, N, R), gpu=None, activation=activation)["decision"]["kernel"]
               for M in (1, 128, 1000, 4096) for K, N, R in [(768, 768, 64), (4096, 4096, 256), (2048, 2048, 320)]
               for activation in ("none", "gelu")}
    assert {"fused", "gemm_expand"} <= kernels
