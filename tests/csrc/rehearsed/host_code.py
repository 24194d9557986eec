"""The extension's own host code, launch by launch, on a machine that checks each as the CUDA runtime does.

tests/csrc/test_ops.py runs this in the process that loads the library of csrc/rehearsal.
"""

from __future__ import annotations

import re

import pytest
import torch

import shrank
from shrank.ops.conv import CONV
from shrank.ops.linear import LINEAR
from tests.common.linear_cases import LinearCase
from tests.common.tolerances import assert_close
from tests.csrc.emulated import named_ops
from tests.csrc.emulated.named_ops import BACKWARD_TILES, DEV, HALVES
from tests.csrc.rehearsed.machine import (
    GPUS,
    ILLEGAL_ADDRESS,
    INVALID_VALUE,
    NO_IMAGE,
    OUT_OF_MEMORY,
    OUT_OF_RESOURCES,
    Machine,
)

MACHINE = Machine()
GIVEN = LinearCase((37,), 72, 264, 40, True, "silu", True)
TILE = (64, 64, 2)


@pytest.fixture(autouse=True)
def machine() -> Machine:
    MACHINE.reset()
    yield MACHINE
    MACHINE.reset()


def given(dtype: torch.dtype = torch.bfloat16) -> tuple:
    return GIVEN.tensors(dtype, "cpu")


def run(kernel: str = "fused", grid: tuple = TILE):
    return LINEAR.run_named(given(), kernel, grid).y


# ---- every kernel, by the launches of the shipped objects


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.LINEAR_TILES, ids=repr)
def test_every_tile_of_linear_layers_is_launched(machine, tile, dtype) -> None:
    named_ops.test_every_tile_of_linear_layers(tile, dtype)
    name = f"LowRankLinear<shrank::arch::{str(dtype).removeprefix('torch.')}, {tile.block_m}, {tile.max_rank}, 1>"
    asked = f"grid {-(-37 // tile.block_m)}x2 block {tile.threads}x1 shared {tile.shared_bytes} "
    assert all(name in launch and asked in launch for launch in machine.launches)
    assert len(machine.launches) == (4 if tile.holds_h else 2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.GATED_TILES, ids=repr)
def test_every_tile_of_gated_layers_is_launched(machine, tile, dtype) -> None:
    named_ops.test_every_tile_of_gated_layers(tile, dtype)
    name = f"LowRankLinear<shrank::arch::{str(dtype).removeprefix('torch.')}, {tile.block_m}, {tile.max_rank}, 2>"
    asked = f"grid {-(-37 // tile.block_m)}x2 block {tile.threads}x1 shared {tile.shared_bytes} "
    assert all(name in launch and asked in launch for launch in machine.launches)
    assert len(machine.launches) == (4 if tile.holds_h else 2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.PIVOTED_TILES, ids=repr)
def test_every_tile_of_pivoted_layers_is_launched(machine, tile, dtype) -> None:
    named_ops.test_every_tile_of_pivoted_layers(tile, dtype)
    name = f"LowRankLinear<shrank::arch::{str(dtype).removeprefix('torch.')}, {tile.block_m}, {tile.max_rank}, 3>"
    asked = f"grid {-(-37 // tile.block_m)}x2 block {tile.threads}x1 shared {tile.shared_bytes} "
    assert all(name in launch and asked in launch for launch in machine.launches)
    assert len(machine.launches) == (4 if tile.holds_h else 2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.CONV_TILES, ids=repr)
def test_every_tile_of_convolutions_is_launched(machine, tile, dtype) -> None:
    named_ops.test_every_tile_of_convolutions(tile, dtype)
    kind = "LowRankDepthwise" if tile.gather == "depthwise" else "LowRankConv"
    assert len(machine.launches) == 2 and all(kind in launch for launch in machine.launches)


@pytest.mark.parametrize("shares", [1, 2])
def test_groups_of_the_second_stage_are_blocks(machine, shares: int) -> None:
    named_ops.test_groups_of_both_stages(shares)
    assert all(f" grid 1x{2 * shares} " in launch for launch in machine.launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("N", [64, 37])
def test_the_epilogue_is_launched_for_every_element(machine, dtype, N) -> None:
    case = LinearCase((6,), 32, N, 8, True, "gelu", True).tensors(dtype, "cpu")
    named_ops.held_to_pytorch(LINEAR, case, "two_gemms_epilogue", ())
    assert len(machine.launches) == 2 and all("Epilogue<" in launch for launch in machine.launches)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", DEV.select.SHRINK_EXPAND_TILES, ids=repr)
def test_every_tile_for_a_few_rows_is_launched(machine, tile, dtype) -> None:
    named_ops.test_every_tile_for_a_few_rows(tile, dtype)
    groups = -(-37 // tile.tokens)
    if tile.layers > 1:  # the layers together, and each of them alone
        # Pivots are the affair of the second kernel.
        forms = f", {tile.tokens}, 1, {tile.layers}>", f", {tile.tokens}, {tile.form}, {tile.layers}>"
        together = [launch for launch in machine.launches if any(form in launch for form in forms)]
        blocks = [(5 + 2 + 3, groups), (3 + 1 + 2, groups), (5 + 2 + 3, 3 * groups), (3 + 1 + 2, groups)]
        assert all(f"grid {x}x{y} " in launch for (x, y), launch in zip(blocks, together, strict=True)), together
        assert len(machine.launches) == 16
        return
    for i, launch in enumerate(machine.launches):  # of one split and of two, each in training and not
        name, factor_blocks = ("Shrink", 5 + 3 * (tile.pairs - 1)) if i % 2 == 0 else ("Expand", 3)
        splits = (1, 1, 2, 2)[i // 2] if name == "Shrink" else 1
        element = f"shrank::arch::{str(dtype).removeprefix('torch.')}"
        form = tile.pairs if name == "Shrink" else tile.form  # pivots are the affair of the second
        assert f"{name}<{element}, {tile.tokens}, {form}, 1>" in launch
        assert f"grid {factor_blocks}x{groups * splits} " in launch
        assert launch.endswith("dependent"), "the second kernel starts while the first one runs"
    assert len(machine.launches) == 8


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", BACKWARD_TILES, ids=repr)
def test_every_tile_of_gradients_is_launched(machine, tile, dtype) -> None:
    named_ops.test_every_tile_of_gradients(tile, dtype)
    tiles = f"{tile.block_m}, {tile.max_rank}, {tile.form}"
    name = f"ExpandBackward<shrank::arch::{str(dtype).removeprefix('torch.')}, {tiles}>"
    asked = f"grid {-(-137 // tile.block_m)}x2 block {tile.threads}x1 shared {tile.expand_bytes} "
    assert len(machine.launches) == 2
    assert all(name in launch and asked in launch for launch in machine.launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize(("M", "N"), [(6, 64), (6, 37), (300, 72)])
def test_the_backward_epilogue_is_launched_for_every_element(machine, dtype, M: int, N: int) -> None:
    named_ops.test_gradients_by_a_gemm_and_one_pass(dtype, M, N)
    # Of layers with one pair of factors the first and the last; else the gate is opened, and its gradient goes back.
    kinds = ["EpilogueBackward<" if "EpilogueBackward<" in each else "Epilogue<" for each in machine.launches]
    assert kinds == ["EpilogueBackward<", *["Epilogue<", "EpilogueBackward<"] * 2, "EpilogueBackward<"]


@pytest.mark.parametrize(("rows", "launches"), [(1, 4), (65, 0)])
def test_layers_of_one_input_share_the_launches_for_a_few_rows(machine, rows: int, launches: int) -> None:
    """Four layers of a language model: three together, and one."""
    x = LinearCase((rows,), 2048, 8, 8).tensors(torch.bfloat16, "cpu")[0]
    layers = [LinearCase((1,), 2048, N, 256, False).tensors(torch.bfloat16, "cpu") for N in (2048, 512, 512, 1024)]
    down, up = ([layer[i] for layer in layers] for i in (1, 2))
    found = torch.ops.shrank.low_rank_linear_multi(x, down, up, *[[None] * 4] * 3)
    assert len([line for line in machine.launches if "Shrink<" in line or "Expand<" in line]) == launches
    for y, a, b in zip(found, down, up, strict=True):
        assert torch.equal(y, LINEAR.overload(x, a, b))


# ---- what a launch asks of the device


def test_shared_memory_is_asked_for_once_for_each_kernel_and_device(machine) -> None:
    for device in (0, 0, 1, 1, 0):
        machine.put_tensors_on(device)
        run()
    opted = [line for line in machine.log if line.startswith("opt-in ")]
    launches = machine.launches
    assert len(launches) == 5 and [re.search(r"device (\d)", line)[1] for line in launches] == list("00110")
    # In a process, the extension remembers for whom it asked: other tests may have been first.
    assert len(opted) <= 2


def test_the_grid_before_may_still_run_where_the_gpu_can_that(machine) -> None:
    for device, gpu in enumerate(GPUS):
        machine.put_tensors_on(device)
        run()
        assert machine.launches[-1].endswith("dependent") == (gpu in ("h200", "b200")), gpu
        assert f" device {device} " in machine.launches[-1]


def test_no_gpu_is_given_a_tile_that_does_not_fit(machine) -> None:
    machine.put_tensors_on(GPUS.index("l40s"))
    wide = LinearCase((37,), 72, 264, 256).tensors(torch.bfloat16, "cpu")
    with pytest.raises(RuntimeError, match="more shared memory than a block has here"):
        LINEAR.run_named(wide, "fused", (128, 256, 1))
    assert not machine.launches


def test_a_kernel_runs_on_the_device_and_the_stream_of_its_tensors(machine) -> None:
    for device, stream in ((0, 1), (1, 2), (1, 0), (0, 2)):
        machine.put_tensors_on(device)
        machine.use_stream(device, stream)
        run()
        assert f" device {device} " in machine.launches[-1] and f" stream {stream}" in machine.launches[-1]
        assert machine.current_device == 0, "the device that was current is current again"
    assert not [line for line in machine.log if "failed" in line]


def test_a_launch_into_a_graph_is_known(machine) -> None:
    torch.ops.shrank.note_problems(True)
    LINEAR.overload(*given())
    machine.capture()
    LINEAR.overload(*given())
    keys = torch.ops.shrank.noted_problems()
    torch.ops.shrank.note_problems(False)
    assert keys.count(" captured on ") == 1


# ---- faults


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        (
            "cudaLaunchKernelExC",
            OUT_OF_RESOURCES,
            "low_rank_linear kernel was not launched: cudaErrorLaunchOutOfResources",
        ),
        ("cudaLaunchKernelExC", NO_IMAGE, "low_rank_linear kernel was not launched: cudaErrorNoKernelImageForDevice"),
        ("cudaLaunchKernelExC", OUT_OF_MEMORY, "low_rank_linear kernel was not launched: cudaErrorMemoryAllocation"),
        ("cudaGetDevice", INVALID_VALUE, "low_rank_linear kernel was not launched: cudaErrorInvalidValue"),
        ("cudaStreamIsCapturing", ILLEGAL_ADDRESS, "cudaStreamIsCapturing: cudaErrorIllegalAddress"),
    ],
)
def test_a_failed_call_is_an_error_and_leaves_none_to_others(machine, function, error, said) -> None:
    right = run()
    machine.fail(function, error)
    with pytest.raises(RuntimeError, match=said):
        run()
    if function != "cudaStreamIsCapturing":
        assert machine.last_error == 0, "who asks next would take it for his own"
    assert torch.equal(run(), right), "the next call is as if nothing had been"


def test_the_epilogue_reports_its_own_error_alone(machine) -> None:
    machine.leave_error(ILLEGAL_ADDRESS)
    case = LinearCase((6,), 32, 64, 8, True, "relu", True).tensors(torch.float32, "cpu")
    y = LINEAR.run_named(case, "two_gemms_epilogue").y
    assert_close(y, LINEAR.forward(*LINEAR.packed(case)).y)
    assert machine.last_error == ILLEGAL_ADDRESS, "it is for him who caused it"
    machine.leave_error(0)
    machine.fail("cudaLaunchKernelExC", OUT_OF_RESOURCES)
    with pytest.raises(RuntimeError, match="the epilogue kernel was not launched: cudaErrorLaunchOutOfResources"):
        LINEAR.run_named(case, "two_gemms_epilogue")
    assert machine.last_error == 0


def test_a_card_without_code_is_a_reason_and_no_error(machine) -> None:
    assert torch.ops.shrank.why_no_image(0) == ""
    machine.fail("cudaFuncGetAttributes", NO_IMAGE)
    assert torch.ops.shrank.why_no_image(0) == "cudaErrorNoKernelImageForDevice"
    assert machine.last_error == 0 and torch.ops.shrank.why_no_image(0) == ""


def test_a_device_that_is_not_there_is_an_error(machine) -> None:
    machine.put_tensors_on(7)
    with pytest.raises(RuntimeError):
        run()
    machine.put_tensors_on(64)
    with pytest.raises(RuntimeError):
        run()
    assert not machine.launches


def test_it_is_the_extensions_own_code() -> None:
    assert shrank.ops.native.build_info()["archs"], "the extension's inspection is in the library"
    assert CONV.overload is not None
