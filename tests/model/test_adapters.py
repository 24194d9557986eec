"""Every supported layer type against its low-rank twin: outputs, optimality, interface, merge and cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import shrank
from shrank.layers.two_stage import memory_format
from shrank.model.refusals import why_not
from tests.common.models import draw, seeded
from tests.common.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:the dense weight of")
FULL = 10**9


@dataclass(frozen=True)
class Case:
    """A dense layer, the shape of its input, and the options that make its twin; `blocks` cuts the weight, seen as an
    ungrouped matrix, into the parts that the twin approximates one by one."""

    id: str
    build: Callable[[], nn.Module]
    input: tuple[int, ...]
    options: dict
    rank: int = 4

    def dense(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return seeded(self.build).to(dtype)

    def twin(self, rank: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        return shrank.auto_fact(self.dense(dtype), rank, allow_growth=True, **self.options)


def conv(
    id: str,
    dim: int = 2,
    channels: tuple[int, int] = (8, 12),
    kernel=3,
    rank: int = 4,
    options: dict | None = None,
    layout: torch.memory_format = torch.contiguous_format,
    **kwargs,
) -> Case:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dim]
    shape = (2, channels[0], *(9, 8, 7)[:dim])
    return Case(id, lambda: kind(*channels, kernel, **kwargs).to(memory_format=layout), shape, options or {}, rank)


GROUPS_OUT, ALL_GROUPS = {"groups_out": True}, {"skip_high_groups": False}
CASES = [
    Case("linear", lambda: nn.Linear(24, 18), (3, 5, 24), {}),
    Case("linear-wide", lambda: nn.Linear(12, 40), (12,), {}),
    Case("linear-no-bias", lambda: nn.Linear(24, 18, bias=False), (0, 24), {}),
    Case("hf-conv1d", lambda: Conv1D(20, 16), (2, 5, 16), {}),
    conv("conv1d", 1),
    conv("conv1d-same-dilated", 1, padding="same", dilation=2),
    conv("conv2d"),
    conv("conv2d-stride-padding", stride=(2, 1), padding=(2, 1)),
    conv("conv2d-no-bias", bias=False, padding="valid"),
    conv("conv2d-kernel-tuple", kernel=(1, 3), padding="same"),
    conv("conv2d-pointwise", channels=(12, 16), kernel=1),
    conv("conv2d-channels-last", layout=torch.channels_last),
    conv("conv2d-reflect", padding=2, padding_mode="reflect"),
    conv("conv2d-replicate-same", padding="same", padding_mode="replicate"),
    conv("conv2d-circular-stride", padding=1, padding_mode="circular", stride=2),
    conv("conv3d", 3, kernel=(3, 2, 2), padding=(1, 0, 1), dilation=(1, 2, 1)),
    conv("conv3d-channels-last", 3, kernel=2, layout=torch.channels_last_3d),
    conv("conv1d-grouped", 1, groups=2),
    conv("conv2d-grouped", groups=4, padding=1),
    conv("conv2d-grouped-channels-last", groups=4, layout=torch.channels_last),
    conv("conv2d-grouped-out", groups=4, options=GROUPS_OUT, padding=1),
    conv("conv2d-grouped-out-reflect", groups=2, options=GROUPS_OUT, stride=2, padding=1, padding_mode="reflect"),
    conv("conv3d-grouped-out", 3, kernel=2, groups=2, options=GROUPS_OUT),
    conv("conv2d-high-groups", groups=4, rank=2, options=ALL_GROUPS),
    conv("conv2d-high-groups-out", groups=4, rank=2, options=GROUPS_OUT | ALL_GROUPS),
    conv("conv2d-high-groups-uneven", channels=(12, 24), groups=6, rank=4, options=ALL_GROUPS),
    conv("conv2d-depthwise-multiplier", channels=(4, 16), groups=2, rank=2, options=ALL_GROUPS),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def matrix(layer: nn.Module) -> Tensor:
    """The dense weight as (outputs, inputs x kernel) without groups: zero where no connection exists."""
    weight = torch.clone(layer.weight).detach().double()
    if isinstance(layer, Conv1D) or hasattr(layer, "nf"):
        return weight.T
    return torch.block_diag(*weight.flatten(1).chunk(getattr(layer, "groups", 1)))


def optimal_error(dense: nn.Module, rank: int, groups_out: bool) -> float:
    """The least Frobenius error of a twin of this rank: a truncated SVD of each block that one group of its first
    stage feeds."""
    weight, groups = matrix(dense), min(rank, getattr(dense, "groups", 1))
    squared = 0.0
    for i, columns in enumerate(weight.chunk(groups, 1)):
        block = columns.chunk(groups)[i] if groups_out else columns
        squared += torch.linalg.svd(block).S[rank // groups :].square().sum().item()
        squared += columns.square().sum().item() - block.square().sum().item()
    return math.sqrt(squared)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_full_rank_equals_dense(case: Case, dtype: torch.dtype):
    dense, x = case.dense(dtype), draw(*case.input, dtype=dtype)
    twin = case.twin(FULL, dtype)
    assert type(twin) is not type(dense)
    assert twin.weight.dtype == twin(x).dtype == dtype
    assert_close(twin(x), dense(x))


@each_case
def test_error_is_the_optimum(case: Case):
    dense, twin = case.dense(torch.float64), case.twin(case.rank, torch.float64)
    error = (matrix(twin) - matrix(dense)).norm()
    optimum = torch.tensor(optimal_error(dense, case.rank, case.options.get("groups_out", False)), dtype=torch.float64)
    assert twin.rank == case.rank
    assert_close(error, optimum)
    assert_close(torch.tensor(twin.shrank_plan[""].error, dtype=torch.float64), optimum / matrix(dense).norm())


@each_case
def test_output_is_that_of_the_approximated_weight(case: Case):
    dense, twin = case.dense(torch.float64), case.twin(case.rank, torch.float64)
    x = draw(*case.input, dtype=torch.float64)
    with torch.no_grad():
        if hasattr(twin, "groups"):
            dense = type(dense)(
                dense.in_channels,
                dense.out_channels,
                dense.kernel_size,
                dense.stride,
                dense.padding,
                dense.dilation,
                twin.groups,
                dense.bias is not None,
                dense.padding_mode,
            ).double()
        dense.weight.copy_(twin.weight)
        if dense.bias is not None:
            dense.bias.copy_(twin.bias)
    assert_close(twin(x), dense(x))


@each_case
def test_merge_gives_the_original_type_back(case: Case):
    dense, twin, x = case.dense(), case.twin(case.rank), draw(*case.input)
    expected = twin(x)
    merged = shrank.merge(twin)
    assert type(merged) is type(dense)
    if getattr(twin, "down_groups", 1) == getattr(dense, "groups", 1):
        assert repr(merged) == repr(dense) and merged.weight.shape == dense.weight.shape
    assert merged.state_dict().keys() == dense.state_dict().keys()
    assert memory_format(merged.weight) == memory_format(dense.weight)
    assert_close(merged(x), expected)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6]], ids=lambda case: case.id)
def test_merge_leaves_no_attributes_of_the_twin_behind(case: Case):
    assert set(vars(shrank.merge(case.twin(case.rank)))) - {"shrank_plan"} == set(vars(case.dense()))


@each_case
def test_attributes_answer_as_the_dense_layers(case: Case):
    dense, twin = case.dense(), case.twin(case.rank)
    public = {name for name in vars(dense) if not name.startswith("_")} - {"groups"}
    assert public
    for name in public:
        assert getattr(twin, name) == getattr(dense, name), name
    assert (twin.bias is None) == (dense.bias is None)
    if case.rank >= getattr(dense, "groups", 1) and ("groups_out" in case.options or getattr(dense, "groups", 1) == 1):
        assert getattr(twin, "groups", 1) == getattr(dense, "groups", 1)
        assert twin.weight.shape == dense.weight.shape


@each_case
def test_parameter_count_is_the_plans(case: Case):
    for rank in (case.rank, FULL):
        plan = shrank.make_plan(case.dense(), rank, allow_growth=True, **case.options)
        twin = case.twin(rank)
        assert sum(p.numel() for p in twin.parameters()) == plan.params_after
        assert sum(p.numel() for p in twin.parameters() if p.dim() > 1) == plan[""].params_after
        assert sum(p.numel() for p in case.dense().parameters()) == plan.params_before


@each_case
def test_layout_and_names_of_the_factors(case: Case):
    dense, twin = case.dense(), case.twin(case.rank)
    unit = "ced_unit" if isinstance(twin, shrank.CED) else "led_unit"
    names = [f"{unit}.0.weight", f"{unit}.1.weight"] + ([f"{unit}.1.bias"] if dense.bias is not None else [])
    assert list(twin.state_dict()) == names
    assert twin[0].weight is twin.down and twin[1].weight is twin.up
    if dense.weight.dim() > 3 and not dense.weight.is_contiguous():
        assert memory_format(twin.down) == memory_format(dense.weight)


@pytest.mark.parametrize("channels, groups, rank", [((12, 12), 6, 5), ((12, 18), 6, 4)], ids=["inputs", "outputs"])
def test_groups_that_do_not_divide_keep_it_dense(channels, groups, rank):
    plan = shrank.make_plan(
        nn.Conv2d(*channels, 3, groups=groups), rank, allow_growth=True, groups_out=True, skip_high_groups=False
    )
    assert plan[""].rank is None and "divide" in plan[""].reason


def test_depthwise_and_high_groups_stay_dense_with_the_reason():
    assert "depthwise" in why_not(nn.Conv2d(16, 16, 3, groups=16))[0]
    plan = shrank.make_plan(nn.Conv2d(16, 32, 3, groups=8), 4, allow_growth=True)
    assert plan[""].rank is None and "skip_high_groups" in plan[""].reason
