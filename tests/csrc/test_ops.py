"""The C++ implementations, on the CPU: the tests of tests/ops, in a process that loads one before shrank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shrank.ops import native

from .conftest import BUILD

# What does not depend on who implements the ops.
OF_PYTHON = [f"--ignore=tests/ops/test_{name}.py" for name in ("availability", "cpu", "host", "native", "onednn")]


@pytest.mark.parametrize(
    ("library", "tests"),
    [
        pytest.param(BUILD / "libshrank.so", ["tests/ops"], id="for_the_cpu"),
        pytest.param(
            BUILD / "libshrank_emulated.so",
            ["tests/ops", "tests/csrc/emulated/named_ops.py"],
            id="as_on_a_gpu_with_its_kernels_emulated",
        ),
        pytest.param(
            BUILD / "libshrank_rehearsal.so",
            ["tests/ops", "tests/csrc/rehearsed/host_code.py"],
            id="by_the_extensions_host_code",
            marks=pytest.mark.skipif(not native.LIBRARY.exists(), reason="no nvcc on this machine, so no extension"),
        ),
    ],
)
def test_cpp_passes_the_tests_of_the_ops(library: Path, tests: list[str]) -> None:
    assert library.exists(), "cmake -S . -B build/cmake && cmake --build build/cmake"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, *OF_PYTHON, "-p", "no:cacheprovider"],
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "SHRANK_TEST_LIBRARY": str(library)},
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


def test_the_ctest_suite_passes() -> None:
    ran = subprocess.run([BUILD / "select_test"], text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
