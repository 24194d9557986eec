"""The emulator itself: every kind of mistake is reported, whatever the order of threads, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parent / "emulated" / "micro_kernels.cuh"
SEEDS = range(8)
EARLY = pytest.mark.parametrize("copies_early", [False, True], ids=["copies_late", "copies_early"])

MISTAKES = {  # kernel: the kind of the report, and the instruction in it
    "no_barrier": ("race: ", "load_shared"),  # which of the two comes first, the schedule decides
    "warp_barrier_for_a_block": ("race: ", "load_shared"),
    "no_warp_barrier": ("race: ", "load_shared"),
    "written_again_too_soon": ("race: ", "store_shared"),
    "two_writers": ("race: write after unordered write", "store_shared"),
    "two_barriers": ("divergent barrier", "sync_threads"),
    "skipped_barrier": ("deadlock", "sync_threads"),
    "skipped_by_lanes": ("deadlock", "load_matrices"),
    "divergent_lanes": ("divergent warp instruction", "load_matrices"),
    "read_before_the_wait": ("read of a copy in flight", "load_shared"),
    "waits_for_another_group": ("read of a copy in flight", "load_shared"),
    "copy_seen_without_a_barrier": ("", "load_shared"),  # in flight, unordered or not begun
    "copied_over_too_soon": ("race: ", "copy_async"),
    "never_awaited": ("copy never awaited", "copy_async"),
    "never_committed": ("copy never awaited", "copy_async"),
    "written_while_copied": ("write over a copy in flight", "store_shared"),
    "uninitialised": ("read of uninitialised shared memory", "load_shared"),
    "past_shared": ("shared memory out of bounds", "store_shared"),
    "before_shared": ("shared memory out of bounds", "store_shared"),
    "misaligned_shared": ("misaligned shared access", "load_shared"),
    "past_the_input": ("global memory out of bounds", "load"),
    "one_past_the_output": ("global memory out of bounds", "store"),
    "copy_past_the_input": ("global memory out of bounds", "copy_async"),
    "misaligned_global": ("misaligned global access", "load"),
    "writes_the_input": ("write to a read-only buffer", "store"),
    "reads_the_output": ("read of uninitialised global memory", "load"),
    "one_place_two_threads": ("race: write after unordered write", "store"),
    "register_array_overrun": ("undefined behaviour", "out_of_bounds"),
    "register_array_overrun_far": ("undefined behaviour", "out_of_bounds"),
    "divides_by_zero": ("undefined behaviour", "divrem_overflow"),
    "writes_the_host": ("global memory out of bounds", "store"),
    "read_by_two_lanes": ("race: ", "_shared"),  # as no_barrier
    "one_lane_past_shared": ("shared memory out of bounds", "load_matrices"),
    "half_a_warp": ("warp instruction in a part of a warp", "multiply_add"),
    "two_blocks_one_place": ("two blocks write one place", "store"),
    "before_the_grid_before": ("access before grid_dependency_wait", "load"),
    "never_waits_for_the_grid_before": ("access before grid_dependency_wait", "load"),
}
REFUSED = {
    "too_much_shared": "233472 bytes of shared memory, at most 232448",
    "too_many_threads": "1056 threads, at most 1024",
}
# 16 bytes a lane: 4 phases of 8 lanes, all in one group of banks, are 4 x 7 passes more; 8 bytes a lane, 16 bytes
# apart: 2 phases of 16 lanes, each word of a bank twice.
CONFLICTS = {
    "matrix_rows_in_one_bank_group": 4 * 7 + 4 * 31,
    "matrix_rows_side_by_side": 0,
    "pairs_side_by_side": 0,
    "pairs_with_gaps": 2,
    "copies_into_one_bank_group": 4 * 7,
}


def micro(dev, name: str, seed: int = 0, copies_early: bool = False) -> tuple[object, torch.Tensor, torch.Tensor]:
    numbers = torch.arange(1, 1025, dtype=torch.int32)
    output = torch.full_like(numbers, -1)
    return dev.emulator.micro(name, numbers.data_ptr(), output.data_ptr(), seed, copies_early), numbers, output


def line_of(name: str) -> int:
    """Where the kernel's mistake stands, by its mark."""
    lines = SOURCE.read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"// BUG {name}"))


def neighbours(numbers: torch.Tensor, of: int) -> torch.Tensor:
    return numbers[:256].view(-1, of, 4).roll(-1, 1).flatten()


def test_every_kernel_is_tested(dev) -> None:
    clean = {"through_shared", "within_a_warp", "by_copies", "copy_of_nothing_is_zero", "copies_an_odd_struct"}
    assert set(dev.emulator.MICRO) == clean | set(MISTAKES) | set(REFUSED) | set(CONFLICTS)
    marked = set(re.findall(r"// BUG (\w+)$", SOURCE.read_text(), re.MULTILINE))
    assert marked == set(MISTAKES)


@EARLY
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "of"), [("through_shared", 64), ("within_a_warp", 32), ("by_copies", 64)])
def test_a_right_kernel_gives_the_right_numbers_and_no_report(dev, name, of, seed, copies_early) -> None:
    result, numbers, output = micro(dev, name, seed, copies_early)
    assert result.problems == []
    assert torch.equal(output[:256], neighbours(numbers, of)) and (output[256:] == -1).all()


@EARLY
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported_with_its_line(dev, name, seed, copies_early) -> None:
    kind, instruction = MISTAKES[name]
    problems = micro(dev, name, seed, copies_early)[0].problems
    assert all(f"| kernel {name} |" in text for text in problems)
    here = f"micro_kernels.cuh:{line_of(name)}"
    assert any(text.startswith(kind) and instruction in text and here in text for text in problems), problems


def test_a_race_is_reported_with_both_sides(dev) -> None:
    report = micro(dev, "written_again_too_soon")[0].problems[0]
    here = line_of("written_again_too_soon")
    assert re.fullmatch(
        r"race: write after unordered read \| kernel written_again_too_soon \| store_shared at "
        rf"micro_kernels.cuh:{here} from .*? \| block 0,0 thread \d+ \| shared offset \d+ \| "
        rf"read by thread \d+ at micro_kernels.cuh:{here - 1} from .*",
        report,
    ), report


def test_an_early_copy_shows_what_it_overwrites_and_a_late_one_what_is_missing(dev) -> None:
    """The same wrong kernel, by numbers alone: the copy lands at once, or after the read."""
    early, late = (micro(dev, "read_before_the_wait", 0, copies_early)[2][:256] for copies_early in (True, False))
    assert torch.equal(early, torch.arange(1, 257, dtype=torch.int32)) and (late == -1).all()


def test_a_copy_of_no_bytes_writes_zeros(dev) -> None:
    result, _, output = micro(dev, "copy_of_nothing_is_zero")
    assert result.problems == [] and (output[:256] == 0).all()


def test_a_struct_that_is_no_power_of_two_may_be_copied(dev) -> None:
    result, numbers, output = micro(dev, "copies_an_odd_struct")
    assert result.problems == [] and torch.equal(output[:192], numbers[:192]) and (output[192:] == -1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_report_of_a_warp_names_the_lane_at_fault(dev, seed) -> None:
    assert "| block 0,0 thread 37 |" in micro(dev, "one_lane_past_shared", seed)[0].problems[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_launch_that_no_gpu_would_take_is_refused(dev, name) -> None:
    assert micro(dev, name)[0].problems == [f"launch refused | kernel {name} | {REFUSED[name]}"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CONFLICTS)
def test_bank_conflicts_are_counted(dev, name, seed) -> None:
    result = micro(dev, name, seed)[0]
    assert result.problems == [] and result.counts.bank_conflicts == CONFLICTS[name]


def test_the_emulator_is_as_good_as_new_after_a_failure(dev) -> None:
    for name in ("skipped_barrier", "past_shared", "divergent_lanes", "register_array_overrun_far", "divides_by_zero"):
        assert micro(dev, name)[0].problems
        assert micro(dev, "through_shared")[0].problems == []


def test_an_unknown_kernel_is_refused(dev) -> None:
    with pytest.raises(ValueError, match="no kernel is called perfect"):
        micro(dev, "perfect")
