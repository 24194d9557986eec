"""`make mutants`: mistakes in the host code that launches kernels, which the rehearsal must notice every time.

Each is compiled into objects of its own, which take the place of the extension's in the library of csrc/rehearsal. What
kernels do on a device is left out of them: the rehearsal runs the emulated ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .conftest import BUILD
from .mutants import ROOT, commands

WORK = ROOT / "build" / "host_mutants"
OBJECTS = ROOT / "build" / "extension"
TESTS = ("tests/csrc/rehearsed/host_code.py",)
LAUNCH, EPILOGUE = "csrc/kernels/launch.cuh", "csrc/kernels/epilogue.cu"
LINEAR, CONV, BACKWARD = "csrc/ops/low_rank_linear.cpp", "csrc/ops/low_rank_conv.cpp", "csrc/ops/expand_backward.cpp"
REGISTER, DEVICE = "csrc/ops/register_cuda.cpp", "csrc/ops/cuda_device.cpp"
# What includes a header, as far as a mistake there needs it.
USERS = {
    LAUNCH: ("csrc/kernels/low_rank_linear_bf16.cu", EPILOGUE),
    "csrc/select/with_tile.h": ("csrc/kernels/low_rank_linear_bf16.cu",),
    "csrc/kernels/low_rank_linear_launch.cuh": ("csrc/kernels/low_rank_linear_bf16.cu",),
    "csrc/kernels/low_rank_conv_launch.cuh": ("csrc/kernels/low_rank_conv_bf16.cu",),
}


@dataclass(frozen=True)
class Mistake:
    what: str
    source: str
    before: str
    after: str


MISTAKES = (
    Mistake(
        "half of the shared memory",
        LAUNCH,
        "dynamicSmemBytes = Kernel::kSharedBytes",
        "dynamicSmemBytes = Kernel::kSharedBytes / 2",
    ),
    Mistake(
        "more shared memory than was asked for",
        LAUNCH,
        "dynamicSmemBytes = Kernel::kSharedBytes",
        "dynamicSmemBytes = Kernel::kSharedBytes + 16",
    ),
    Mistake(
        "asks for what is allowed anyway",
        LAUNCH,
        "MaxDynamicSharedMemorySize, Kernel::kSharedBytes",
        "MaxDynamicSharedMemorySize, 48 * 1024",
    ),
    Mistake(
        "never asks for shared memory", LAUNCH, "if (allowed.load(std::memory_order_relaxed) & bit) return;", "return;"
    ),
    Mistake("asks for shared memory on one device only", LAUNCH, "uint64_t{1} << device", "uint64_t{1}"),
    Mistake("asks for shared memory at every launch", LAUNCH, "allowed.fetch_or(bit, std::memory_order_relaxed);", ""),
    Mistake("half of the threads", LAUNCH, "dim3(Kernel::kThreads)", "dim3(Kernel::kThreads / 2)"),
    Mistake("the default stream", LAUNCH, "static_cast<cudaStream_t>(stream)", "nullptr"),
    Mistake("dependent on every GPU", LAUNCH, "dependent ? 1 : 0", "1"),
    Mistake("dependent on none", LAUNCH, "dependent ? 1 : 0", "0"),
    Mistake("an error is left to others", LAUNCH, "  cudaGetLastError();", "  "),
    Mistake("errors are ignored", LAUNCH, "if (error == cudaSuccess) return;", "return;"),
    Mistake(
        "rows and columns of the grid swapped",
        LAUNCH,
        "config.gridDim = grid;",
        "config.gridDim = dim3(grid.y, grid.x);",
    ),
    Mistake(
        "blocks of columns forgotten",
        "csrc/kernels/low_rank_linear_launch.cuh",
        "static_cast<unsigned>(grid.blocks_n)",
        "1u",
    ),
    Mistake(
        "blocks of rows forgotten",
        "csrc/kernels/low_rank_linear_launch.cuh",
        "static_cast<unsigned>(grid.blocks_m)",
        "1u",
    ),
    Mistake(
        "always the first tile",
        "csrc/select/with_tile.h",
        "else if (tile == TILES[I])",
        "else if (true)",
    ),
    Mistake("groups of the second stage forgotten", "csrc/kernels/low_rank_conv_launch.cuh", " * params.up_groups", ""),
    Mistake(
        "the other element type",
        "csrc/kernels/low_rank_linear.cu",
        "launch_linear<arch::float16>",
        "launch_linear<arch::bfloat16>",
    ),
    Mistake(
        "x and down swapped",
        LINEAR,
        "from_h ? nullptr : args.x.const_data_ptr(),",
        "from_h ? nullptr : args.down.const_data_ptr(),",
    ),
    Mistake("residual for bias", LINEAR, "data_of(args.bias),", "data_of(args.residual),"),
    Mistake("no residual", LINEAR, "data_of(args.residual),", "nullptr,"),
    Mistake("outputs for inputs", LINEAR, "static_cast<int>(problem.K)", "static_cast<int>(problem.N)"),
    Mistake("h is not kept", LINEAR, "if (problem.training && !from_h) h =", "if (false) h ="),
    Mistake("a convolution's bias forgotten", CONV, "params.bias = data_of(args.bias);", ""),
    Mistake(
        "a convolution's filters as they came",
        CONV,
        "params.down = down.const_data_ptr();",
        "params.down = args.up.const_data_ptr();",
    ),
    Mistake("no device guard", REGISTER, "const torch::stable::accelerator::DeviceGuard guard(index);", ""),
    Mistake("the stream of another device", REGISTER, "current_stream(index, &stream)", "current_stream(0, &stream)"),
    Mistake(
        "dependent launches before 9.0",
        REGISTER,
        "launch_low_rank_linear(params, grid, device.arch >= 90, stream)",
        "launch_low_rank_linear(params, grid, device.arch >= 80, stream)",
    ),
    Mistake("the first device's properties for all", DEVICE, "return known[index].device;", "return known[0].device;"),
    Mistake("no look at the capture", DEVICE, "return status == cudaStreamCaptureStatusActive;", "return false;"),
    Mistake(
        "rows and columns of the epilogue's block swapped",
        EPILOGUE,
        "dim3(tile.threads_n, tile.threads_m)",
        "dim3(tile.threads_m, tile.threads_n)",
    ),
    Mistake(
        "rows and columns of the epilogue's grid swapped",
        EPILOGUE,
        "dim3(tile.blocks_n, tile.blocks_m)",
        "dim3(tile.blocks_m, tile.blocks_n)",
    ),
    Mistake(
        "an epilogue's failure is ignored",
        EPILOGUE,
        "check_launch(cudaLaunchKernelEx(&config, epilogue_kernel<decltype(kernel), Params>, params), name);",
        "cudaLaunchKernelEx(&config, epilogue_kernel<decltype(kernel), Params>, params);",
    ),
    Mistake("h and up swapped on the way back", BACKWARD, "{args.h.const_data_ptr(),", "{args.up.const_data_ptr(),"),
    Mistake("no bias on the way back", BACKWARD, "data_of(args.bias),", "nullptr,"),
    Mistake(
        "the pre-activation for the gradient", BACKWARD, "grad.const_data_ptr(), dz.mut", "dz.const_data_ptr(), dz.mut"
    ),
    Mistake("half of the sums over rows", BACKWARD, "backward_sum_rows(grid))", "backward_sum_rows(grid) / 2)"),
    Mistake("sums over one row of threads", BACKWARD, "tile.blocks_m * tile.threads_m)", "1)"),
    Mistake("sums of 16 bits", BACKWARD, ", type);", ");"),
    Mistake(
        "blocks of rows forgotten on the way back",
        "csrc/kernels/expand_backward.cu",
        "static_cast<unsigned>(grid.blocks_m)",
        "1u",
    ),
    Mistake(
        "the other element type on the way back",
        "csrc/kernels/expand_backward.cu",
        "launch_tile<arch::float16>",
        "launch_tile<arch::bfloat16>",
    ),
)


def compiled(source: str, folder: Path, flags: dict[str, str]) -> Path:
    """The object of a source in the folder, with the flags that the extension's had."""
    made = folder / f"{Path(source).stem}.o"
    if source.endswith(".cu"):
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        command = (
            f"{nvcc} -std=c++17 -O1 -arch=sm_90 -Xcompiler=-fPIC,-fvisibility=hidden -c {folder / source} -o {made}"
        )
    else:
        command = f"c++ {flags['cflags']} -c {folder / source} -o {made} {flags['post_cflags']}"
    subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True, text=True)
    return made


def extension_flags() -> dict[str, str]:
    text = (OBJECTS / "build.ninja").read_text()
    return {
        name: re.search(rf"^{name} = (.*)$", text, re.M)[1].replace("$$", "$") for name in ("cflags", "post_cflags")
    }


def library(mistake: Mistake, number: int) -> Path:
    """The rehearsal's library with the mistake in it."""
    folder = WORK / str(number)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    text = (folder / mistake.source).read_text()
    if mistake.before not in text:
        raise LookupError(f"{mistake.what}: {mistake.source} has no {mistake.before!r}")
    (folder / mistake.source).write_text(text.replace(mistake.before, mistake.after, 1))
    launch = folder / LAUNCH
    launch.write_text(launch.read_text().replace("  Kernel::run(params);\n", ""))
    linked, made = commands("-o libshrank_rehearsal.so", "shrank_rehearsal"), folder / "librehearsal.so"
    for source in USERS.get(mistake.source, (mistake.source,)):
        own = OBJECTS / Path(source).with_suffix(".o")
        linked = linked.replace(str(own), str(compiled(source, folder, extension_flags())))
    linked = linked.replace("-o libshrank_rehearsal.so", f"-o {made}")
    subprocess.run(linked, shell=True, cwd=BUILD, check=True, capture_output=True, text=True)
    return made


def noticed(both: tuple[int, Mistake]) -> tuple[Mistake, str | None]:
    """What the rehearsal says of a mistake; None if nothing."""
    number, mistake = both
    try:
        made = library(mistake, number)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{mistake.what} does not compile: {error.stderr[:2000]}") from error
    command = [sys.executable, "-m", "pytest", *TESTS, "-x", "-p", "no:cacheprovider", "--tb=line"]
    env = {**os.environ, "SHRANK_TEST_LIBRARY": str(made), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    shutil.rmtree(made.parent)
    if ran.returncode == 0:
        return mistake, None
    return mistake, next((x for x in ran.stdout.splitlines() if "Error" in x or "FAILED" in x), "the process died")


def main(only: str = "") -> int:
    """`only`: of the mistakes whose description holds this."""
    shutil.rmtree(WORK, ignore_errors=True)
    started, survived = time.monotonic(), []
    planted = [(i, each) for i, each in enumerate(MISTAKES) if only in f"{each.source} {each.what}"]
    with ThreadPoolExecutor(2) as pool:
        for mistake, said in pool.map(noticed, planted):
            survived += [] if said else [mistake]
            found = "ok   " if said else "WRONG"
            print(f"{found} {Path(mistake.source).name}: {mistake.what}", flush=True)
            print(f"        {(said or 'SURVIVED')[:160]}", flush=True)
    print(f"{len(planted) - len(survived)} of {len(planted)} mistakes noticed, in {time.monotonic() - started:.0f} s")
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
