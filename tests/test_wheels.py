"""What the built extension asks of its surroundings, and how setup.py decides. Whole wheels: `make wheels`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shrank.ops import host, native
from tests.common.compiled import shared_library
from tests.common.ops import needs_host_kernels

ROOT = Path(__file__).parents[1]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine, so no extension")


@pytest.fixture(scope="module")
def wheels():
    spec = importlib.util.spec_from_file_location("wheels", ROOT / ".ci" / "wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_nvcc
def test_the_extension_loads_without_a_gpu() -> None:
    assert native.problems() == ()
    listed = json.loads((ROOT / "csrc/sources.json").read_text())
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or listed["archs"]
    assert native.build_info()["archs"].split(", ") == wanted.replace(";", " ").split()


@needs_nvcc
def test_the_extension_ties_itself_to_no_torch_and_no_python(wheels) -> None:
    symbols = wheels.undefined_symbols(native.LIBRARY)
    assert "torch_call_dispatcher" in symbols
    assert wheels.forbidden(symbols) == []


@needs_nvcc
def test_the_extension_brings_what_finds_the_current_stream(wheels) -> None:
    assert "libtorch.so" in wheels.needed(native.LIBRARY)
    assert wheels.faults_of_library(native.LIBRARY) == []


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        (["-ltorch"], ["shrank/_C.abi3.so does not need libtorch.so"]),  # and the linker drops it
        (["-Wl,--no-as-needed", "-ltorch"], []),
    ],
)
def test_a_wheel_whose_extension_does_not_bring_it_is_refused(wheels, link: list, fault: list, tmp_path: Path) -> None:
    shared_library(tmp_path / "libtorch.so", "")
    source = '#include <cstdlib>\nextern "C" void* ours() { return malloc(1); }'
    library = shared_library(tmp_path / "_C.abi3.so", source, *link)
    wheel = tmp_path / "shrank-0.1.0+cu130-cp310-abi3-manylinux_2_34_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(library, wheels.LIBRARY)
        archive.write(shared_library(tmp_path / "_host.abi3.so", source), wheels.HOST_LIBRARY)
        archive.writestr("shrank-0.1.0+cu130.dist-info/METADATA", "Name: shrank\nVersion: 0.1.0+cu130\n")
    assert [found.split(",")[0] for found in wheels.faults(wheel)] == fault


@pytest.mark.parametrize(
    "symbol",
    [
        "_ZN2at4_ops6linear4callERKNS_6TensorES4_RKSt8optionalIS2_E",
        "PyLong_FromLong",
        "_Py_NoneStruct",
        "cudaLaunchKernel",
        "cudaLaunchKernel@libcudart.so.13",
        "cuLaunchKernel",
        "_ZN3c105ErrorC1ERKS0_",
        "_ZTIN3c105ErrorE",
    ],
)
def test_such_symbols_are_refused(wheels, symbol: str) -> None:
    fine = ["aoti_torch_get_dim", "malloc@GLIBC_2.2.5", "_ZSt9terminatev@GLIBCXX_3.4"]
    assert wheels.forbidden([*fine, symbol]) == [symbol]


def setup(**env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


def test_pure_python_on_request() -> None:
    ran = setup(SHRANK_BUILD="0")
    assert "+cu" not in ran.stdout and "pure Python, without its CUDA kernels: SHRANK_BUILD=0" in ran.stderr


@needs_nvcc
def test_native_where_there_is_a_compiler() -> None:
    assert "+cu" in setup(SHRANK_BUILD="1").stdout


@needs_host_kernels
def test_kernels_for_a_cpu_alone_on_request() -> None:
    ran = setup(SHRANK_BUILD="cpu")
    assert "+cu" not in ran.stdout and "with kernels for a CPU, by " in ran.stderr
    assert "shrank: without its CUDA kernels: SHRANK_BUILD=cpu" in ran.stderr


@needs_host_kernels
def test_the_kernels_for_a_cpu_tie_themselves_to_no_torch_and_no_python(wheels) -> None:
    assert "torch_call_dispatcher" in wheels.undefined_symbols(host.LIBRARY)
    assert wheels.faults_of_library(host.LIBRARY, wheels.HOST_LIBRARY) == []


@pytest.mark.parametrize(
    ("name", "held", "faults"),
    [
        ("0.1.0-py3-none-any", [], []),
        ("0.1.0-py3-none-any", ["_host"], ["shrank/_host.abi3.so is in it"]),
        ("0.1.0-cp310-abi3-manylinux_2_34_x86_64", ["_host"], []),
        ("0.1.0-cp310-abi3-manylinux_2_34_x86_64", [], ["shrank/_host.abi3.so is missing"]),
        ("0.1.0-cp310-abi3-manylinux_2_34_x86_64", ["_C", "_host"], ["shrank/_C.abi3.so is in it"]),
        ("0.1.0-cp310-abi3-linux_x86_64", ["_host"], ["its tag is cp310-abi3-linux_x86_64"]),
        ("0.1.0+cu130-cp310-abi3-manylinux_2_34_x86_64", ["_C"], ["shrank/_host.abi3.so is missing"]),
        ("0.1.0+cu130-py3-none-any", [], ["shrank/_C.abi3.so is missing", "its tag is py3-none-any"]),
    ],
)
def test_what_a_wheel_must_hold(wheels, name: str, held: list, faults: list, tmp_path: Path) -> None:
    shared_library(tmp_path / "libtorch.so", "")
    source = '#include <cstdlib>\nextern "C" void* ours() { return malloc(1); }'
    library = shared_library(tmp_path / "some.so", source, "-Wl,--no-as-needed", "-ltorch")
    wheel = tmp_path / f"shrank-{name}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for each in held:
            archive.write(library, f"shrank/{each}.abi3.so")
        version = name.split("-")[0]
        archive.writestr(f"shrank-{version}.dist-info/METADATA", f"Name: shrank\nVersion: {version}\n")
    assert wheels.faults(wheel) == faults


def test_an_unknown_wish_is_refused() -> None:
    ran = setup(SHRANK_BUILD="2")
    assert ran.returncode and "SHRANK_BUILD is '2', wanted 0, 1, cpu or nothing" in ran.stderr


def test_insisting_without_a_compiler_fails(tmp_path: Path) -> None:
    """SHRANK_CUDA_DEFAULT stands in for a machine without /usr/local/cuda."""
    empty = {"PATH": str(tmp_path), "CUDA_HOME": "", "CUDA_PATH": "", "SHRANK_CUDA_DEFAULT": str(tmp_path)}
    ran = setup(SHRANK_BUILD="1", **empty)
    assert ran.returncode and "nvcc is not on PATH" in ran.stderr
    ran = setup(SHRANK_BUILD="auto", **empty)
    assert not ran.returncode and "pure Python" in ran.stderr and "nvcc is not on PATH" in ran.stderr
    ran = setup(SHRANK_BUILD="cpu", **empty)
    assert ran.returncode and "SHRANK_BUILD=cpu, but without its kernels for a CPU: no C++ compiler" in ran.stderr


@pytest.fixture
def compiler(tmp_path: Path) -> dict[str, str]:
    """A CUDA_HOME whose nvcc answers what setup.py asks, and compiles nothing."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'sm_80 sm_90 release 13.0'\n")
    nvcc.chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    return {"CUDA_HOME": str(tmp_path)}


@pytest.mark.parametrize(
    ("asked", "kept", "left_out"),
    [
        ("7.0;7.5;8.0;9.0+PTX", "8.0 9.0+PTX", "7.0, 7.5"),
        ("5.2 8.6 ", "8.6", "5.2"),
        ("Volta Ampere", "Ampere", "Volta"),
        ("7.5+PTX 12.0", "12.0", "7.5+PTX"),
        ("Volta+Tegra;Hopper", "Hopper", "Volta+Tegra"),
        ("9.0a", "9.0a", ""),
    ],
)
def test_an_inherited_list_of_architectures_loses_those_that_are_too_old(compiler, asked, kept, left_out) -> None:
    """Images of containers set TORCH_CUDA_ARCH_LIST; below 8.0 ptxas fails."""
    ran = setup(SHRANK_BUILD="1", TORCH_CUDA_ARCH_LIST=asked, **compiler)
    assert f"with CUDA kernels, {ran.stdout.strip()} for {kept}\n" in ran.stderr
    assert ("of TORCH_CUDA_ARCH_LIST" in ran.stderr) == bool(left_out)
    assert (
        f"without {left_out} of TORCH_CUDA_ARCH_LIST: the kernels need compute capability 8.0" in ran.stderr
        or not left_out
    )


def test_a_list_of_architectures_that_are_all_too_old_is_refused(compiler) -> None:
    ran = setup(SHRANK_BUILD="1", TORCH_CUDA_ARCH_LIST="6.1;7.5", **compiler)
    assert ran.returncode and "TORCH_CUDA_ARCH_LIST is 6.1 7.5: the kernels need compute capability 8.0" in ran.stderr
