"""The native extension is loaded without a question to CUDA's driver, which would tie the process to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shrank.ops import native
from tests.common.compiled import shared_library

# Says what it is asked, and that there is no device. The runtime asks for everything by name.
DRIVER = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
static int log(const char* name, int result) {
  FILE* file = fopen(getenv("STAND_IN_LOG"), "a");
  fprintf(file, "%s\\n", name);
  fclose(file);
  return result;
}
static int unknown() { return log("another function", 999); }
extern "C" {
int cuInit(unsigned) { return log("cuInit", 100); }
int cuDriverGetVersion(int* version) { *version = 13070; return log("cuDriverGetVersion", 0); }
int cuDeviceGetCount(int* count) { *count = 0; return log("cuDeviceGetCount", 0); }
int cuGetExportTable(const void**, const void*) { return log("cuGetExportTable", 1); }
int cuGetProcAddress_v2(const char* name, void** found, int, uint64_t, int* status) {
  if (status) *status = 0;
  *found = !strcmp(name, "cuInit") ? (void*)cuInit : !strcmp(name, "cuDriverGetVersion") ? (void*)cuDriverGetVersion
           : !strcmp(name, "cuDeviceGetCount") ? (void*)cuDeviceGetCount
           : !strcmp(name, "cuGetExportTable") ? (void*)cuGetExportTable
           : !strncmp(name, "cuGetProcAddress", 16) ? (void*)cuGetProcAddress_v2 : (void*)unknown;
  return 0;
}
int cuGetProcAddress(const char* name, void** found, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, found, version, flags, nullptr);
}
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """The folder of a libcuda.so.1 that writes what it is asked to the file STAND_IN_LOG."""
    folder = tmp_path_factory.mktemp("driver")
    shared_library(folder / "libcuda.so.1", DRIVER)
    return folder


def asked(driver: Path, log: Path, *command: str) -> tuple[list[str], str]:
    """What a command of this Python asks the driver, and what it prints."""
    log.touch()
    ran = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(driver), "STAND_IN_LOG": str(log)},
    )
    return log.read_text().split("\n")[:-1], ran.stdout


def test_import_asks_the_driver_nothing(driver: Path, tmp_path: Path) -> None:
    assert asked(driver, tmp_path / "log", "-c", "import shrank")[0] == []


def test_what_runs_on_a_cpu_asks_the_driver_nothing(driver: Path, tmp_path: Path) -> None:
    """With a torch that would ask it for its devices."""
    code = (
        "import shrank, torch; x = torch.ones(4, 4); torch.version.cuda = '13.0'\n"
        "torch.cuda.is_available = lambda: exit('torch was asked for CUDA devices')\n"
        "shrank.low_rank_linear(x, x, x, backend='auto'); shrank.LED(4, 4, 2)(x)\n"
        "shrank.low_rank_conv(x[None], x[..., None], x[..., None]); shrank.CED(4, 4, 2, (1,))(x[None])\n"
        "shrank.auto_fact(torch.nn.Linear(64, 64), 8)(torch.ones(4, 64))"
    )
    assert asked(driver, tmp_path / "log", "-c", code)[0] == []


def test_the_version_of_the_driver_is_asked_and_nothing_else(driver: Path, tmp_path: Path) -> None:
    code = "from shrank.ops import native; print(native.driver(), native.build_info().get('driver'))"
    questions, printed = asked(driver, tmp_path / "log", "-c", code)
    assert set(questions) == {"cuDriverGetVersion"}
    assert printed.split() == ["13.7", "None" if native.problems() else "13.7"]


def test_info_says_what_the_driver_runs(driver: Path, tmp_path: Path) -> None:
    questions, printed = asked(driver, tmp_path / "log", "-m", "shrank", "info")
    assert ("cuDriverGetVersion" in questions) == ("CUDA up to 13.7" in printed) == (not native.problems())


def test_without_a_driver_there_is_no_version(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(native.ctypes, "CDLL", missing)
    assert native.driver() is None
