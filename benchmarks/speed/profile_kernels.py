"""Four kernels under Nsight Compute: their time, issue slots, tensor pipe, memory and stalls, as the card counts them.

    python -m benchmarks.speed.profile_kernels --out FILE                      # ncu must be there
    python -m benchmarks.speed.profile_kernels --launch [--device cpu --library LIBRARY --tiny]   # what it profiles

What csrc/select/kernel_slots.h and kernel_cost.cpp suppose is compared by hand: a profiler changes the clocks.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

MODULE = "benchmarks.speed.profile_kernels"
NCU = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")
NAMES = ("linear from x", "linear from h", "convolution", "depthwise")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="profile, and write what ncu counted")
    parser.add_argument("--launch", action="store_true", help="launch every kernel twice, and no more")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--library", type=Path, help="native code for the CPU, loaded in the extension's place")
    parser.add_argument("--tiny", action="store_true", help="problems for a rehearsal")
    given = parser.parse_args()
    if given.launch == bool(given.out):
        parser.error("wanted: one of --launch and --out")
    if given.out:
        given.out.write_text(json.dumps(profiled(), indent=1))
        return 0
    if given.library:
        torch.ops.load_library(str(given.library))
    for name, grid in launched(given.tiny, given.device):
        print(f"{name}: {grid}")
    return 0


def launched(tiny: bool, device: str) -> Iterator[tuple[str, str]]:
    """Launch each kernel twice, with the cheapest grid by the model: the second time its code is in the caches."""
    from shrank.measuring.ways import ways  # shrank is imported after the library that takes its place
    from shrank.ops.conv import CONV
    from shrank.ops.linear import LINEAR
    from tests.common.conv_cases import ConvCase
    from tests.common.linear_cases import LinearCase

    rows, size, batch = (16, (4, 4), 1) if tiny else (16384, (56, 56), 32)
    narrow = dict(kernel=(3, 3), C=128, N=128, R=64, padding=(1, 1), activation="relu", residual=True)
    separable = dict(kernel=(7, 7), C=96, N=96, R=96, padding=(3, 3), groups=96)
    cases = (
        (LINEAR, "fused", LinearCase((rows,), 768, 3072, 96, True, "gelu")),
        (LINEAR, "gemm_expand", LinearCase((rows,), 768, 3072, 512, True, "gelu")),
        (CONV, "fused", ConvCase(size, **narrow, B=batch, last=True)),
        (CONV, "fused", ConvCase(size, **separable, B=batch, last=True)),
    )
    for name, (op, kernel, case) in zip(NAMES, cases, strict=True):
        arguments = case.tensors(torch.bfloat16, device)
        way = next(way for way in ways(op, arguments, 1) if way.kernel == kernel)
        for _ in range(2):
            op.run_named(arguments, way.kernel, way.grid, False)
        yield name, str(way)
    if device != "cpu":
        torch.cuda.synchronize(device)


def profiled() -> dict[str, dict[str, str]]:
    """What ncu says of the second launch of each case.

    Raises:
        RuntimeError: ncu failed, with its last words; or it saw another number of launches.
    """
    # Our matrix kernels are all instances of `entry`.
    command = [NCU, "--csv", "--page", "details", "--kernel-name", "regex:entry"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    ran = subprocess.run(
        [*command, sys.executable, "-m", MODULE, "--launch"], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise RuntimeError(f"{NCU} ended with {ran.returncode}: {(ran.stdout + ran.stderr)[-2000:]}")
    launches = parsed(ran.stdout)
    if len(launches) != 2 * len(NAMES):
        raise RuntimeError(f"ncu saw {len(launches)} launches, wanted {2 * len(NAMES)}")
    return dict(zip(NAMES, launches[1::2], strict=True))


def parsed(printed: str) -> list[dict[str, str]]:
    """The metrics of every launch, each with its unit, from what `ncu --csv --page details` printed."""
    lines = printed.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    launches: dict[int, dict[str, str]] = {}
    for row in csv.DictReader(lines[header:]):
        found = launches.setdefault(int(row["ID"]), {"kernel": row["Kernel Name"]})
        if row["Metric Name"]:  # else it is advice
            found[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return [launches[number] for number in sorted(launches)]


if __name__ == "__main__":
    raise SystemExit(main())
