"""`weight` of a low-rank layer: its metadata is free, its use is right, and writing to it is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import shrank
from shrank.layers.led import LEDConv1D
from tests.common.models import draw, seeded
from tests.common.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:the dense weight of")
LAYERS = {
    "linear": (lambda: nn.Linear(24, 18), {}),
    "hf-conv1d": (lambda: Conv1D(20, 16), {}),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3), {}),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), {}),
    "conv2d-grouped-out": (lambda: nn.Conv2d(8, 12, 3, groups=4), {"groups_out": True}),
}
each_layer = pytest.mark.parametrize("build, options", LAYERS.values(), ids=LAYERS)


def low_rank(build, options) -> nn.Module:
    return shrank.auto_fact(seeded(build).double(), 4, allow_growth=True, **options)


class Products(TorchDispatchMode):
    """Counts everything that multiplies matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "bmm", "mul", "addmm", "convolution")
        return func(*args, **(kwargs or {}))


@each_layer
def test_metadata_costs_nothing(build, options):
    twin = low_rank(build, options)
    with Products() as products:
        shape = twin.dense_weight().shape
        assert products.count == 1  # the counter works
        weight = twin.weight
        assert isinstance(weight, Tensor)
        assert (weight.dtype, weight.device.type) == (torch.float64, "cpu")
        assert weight.shape == shape and weight.ndim == weight.dim() == len(shape)
        assert weight.size(0) == weight.shape[0] == len(weight) and weight.numel() == weight.nelement() == shape.numel()
        assert weight.is_floating_point() and weight.requires_grad and not weight.is_cuda and not weight.is_meta
        assert "Weight" in repr(weight)
    assert products.count == 1


USES = {
    "square": lambda w: w.square().sum(),
    "linear": lambda w: F.linear(w.flatten(1)[:2], w.flatten(1)),
    "index": lambda w: w[0] + 1,
    "stack": lambda w: torch.stack([w, w]),
    "scale": lambda w: 2 * w,
    "cast": lambda w: w.to(torch.float32),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "transpose": lambda w: w.transpose(0, 1),
    "clone": lambda w: w.clone(),
    "norm": torch.linalg.norm,
    "kwarg": lambda w: torch.add(input=w, other=w),
    "mT": lambda w: w.flatten(1).mT,
}


@each_layer
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_functional_use_is_right(build, options, use):
    twin = low_rank(build, options)
    assert_close(use(twin.weight) + 0, use(twin.dense_weight().detach()))


@each_layer
def test_gradients_reach_the_factors(build, options):
    twin, reference = low_rank(build, options), low_rank(build, options)
    (twin.weight * twin.weight.detach()).sum().backward()
    (reference.dense_weight() * reference.dense_weight().detach()).sum().backward()
    assert_close(twin.down.grad, reference.down.grad)
    assert_close(twin.up.grad, reference.up.grad)


WRITES = {
    "fill_": lambda w: w.fill_(0),
    "init": nn.init.xavier_uniform_,
    "setitem": lambda w: w.__setitem__(0, 1),
    "iadd": lambda w: w.__iadd__(1),
    "imul": lambda w: w.__imul__(torch.ones(w.shape)),
    "floor": lambda w: w.div_(2, rounding_mode="floor"),
    "out": lambda w: torch.add(w, w, out=w),
    "data": lambda w: w.data.fill_(0),
    "detach": lambda w: w.detach().zero_(),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
}


@each_layer
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_in_place_writes_are_refused(build, options, write):
    twin = low_rank(build, options)
    before = twin.dense_weight()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"(LED|CED).*down.*up"):
        write(twin.weight)
    assert torch.equal(twin.dense_weight(), before)


SCALES = {
    "mul_": lambda w: w.mul_(3),
    "div_": lambda w: w.div_(2),
    "other": lambda w: w.mul_(other=3),
    "imul": lambda w: w.__imul__(3),
    "data": lambda w: w.data.mul_(3),
}


@each_layer
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_scaling_in_place_scales_the_product(build, options, scale):
    twin = low_rank(build, options)
    expected = twin.dense_weight().detach().clone()
    with torch.no_grad():
        scale(twin.weight)
        scale(expected)
    assert_close(twin.dense_weight(), expected)


ASSIGNMENTS = {
    "parameter": lambda twin, value: setattr(twin, "weight", nn.Parameter(value)),
    "data": lambda twin, value: setattr(twin.weight, "data", value),
    "copy_": lambda twin, value: twin.weight.copy_(value),
    "register_parameter": lambda twin, value: twin.register_parameter("weight", nn.Parameter(value)),
}
each_assignment = pytest.mark.parametrize("assign", ASSIGNMENTS.values(), ids=ASSIGNMENTS)


@each_layer
@each_assignment
def test_a_weight_of_the_same_rank_goes_into_the_factors(build, options, assign):
    twin = low_rank(build, options)
    twin.up.requires_grad_(False)
    outputs = 1 if isinstance(twin, LEDConv1D) else 0
    by_output = [-1 if i == outputs else 1 for i in range(len(twin.weight_shape))]
    scales = (draw(twin.weight_shape[outputs]).double().abs() + 0.5).view(by_output)
    scaled = twin.dense_weight().detach() * scales
    with torch.no_grad():
        assign(twin, scaled)
    assert_close(twin.dense_weight(), scaled)
    assert twin.down.requires_grad and not twin.up.requires_grad
    assert "weight" not in twin._parameters and "weight" not in vars(twin)


@each_layer
@each_assignment
def test_a_weight_of_another_rank_is_refused(build, options, assign):
    twin = low_rank(build, options)
    before = twin.dense_weight()
    with torch.no_grad(), pytest.raises(ValueError, match=r"no factors of rank 4 have.*merge the model"):
        assign(twin, draw(*twin.weight_shape).double())
    assert torch.equal(twin.dense_weight(), before)
    with pytest.raises(ValueError, match=r"weight is \("):
        twin.weight = nn.Parameter(torch.zeros(3, 3))
