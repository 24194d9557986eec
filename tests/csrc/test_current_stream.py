"""The extension finds the function of libtorch_cuda.so that it needs: shown with libraries named and linked alike."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from tests.common.compiled import shared_library

ROOT = Path(__file__).parents[2]
CUDA = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = (void*)0x5EA; return 0; }'
OURS = f"""
#include "{ROOT}/csrc/ops/current_stream.cpp"
#include <string>
extern "C" bool linked() {{ return aoti_torch_get_current_cuda_stream != nullptr; }}
extern "C" const char* ask(void** stream) {{
  static std::string told;
  try {{ shrank::find_current_stream()(0, stream); }} catch (const std::exception& error) {{ told = error.what(); }}
  return told.c_str();
}}
"""
# As Python loads torch, for itself alone, and then torch the extension.
PROGRAM = """
import ctypes, sys
torch, ours = (ctypes.CDLL(path) for path in sys.argv[1:])
stream = ctypes.c_void_p()
ours.ask.restype, ours.linked.restype = ctypes.c_char_p, ctypes.c_bool
told = ours.ask(ctypes.byref(stream)).decode()
print(ours.linked(), hex(stream.value or 0), told)
"""


@pytest.fixture
def link_torch(monkeypatch) -> list[str]:
    """How setup.py links torch."""
    monkeypatch.setenv("SHRANK_BUILD", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))["LINK_TORCH"]


def answer(folder: Path, link: list[str], cuda: bool = True) -> list[str]:
    """Whether the linker found the function, the stream it gave, and the error."""
    brought = ["-Wl,--no-as-needed", "-ltorch_cuda"] if cuda else []
    if cuda:
        shared_library(folder / "libtorch_cuda.so", CUDA)
    shared_library(folder / "libtorch.so", "", *brought)
    python = shared_library(folder / "libtorch_python.so", "", "-Wl,--no-as-needed", "-ltorch")
    ours = shared_library(folder / "_C.abi3.so", OURS, *link)
    ran = subprocess.run([sys.executable, "-c", PROGRAM, python, ours], capture_output=True, text=True, check=True)
    return ran.stdout.strip().split(" ", 2)


def test_setup_py_links_so_that_it_is_found(link_torch: list[str], tmp_path: Path) -> None:
    assert answer(tmp_path, link_torch) == ["True", "0x5ea"]


def test_linked_in_another_way_it_is_found_in_what_is_loaded(tmp_path: Path) -> None:
    assert answer(tmp_path, ["-ltorch"]) == ["False", "0x5ea"]


@pytest.mark.parametrize("link", ["setup.py's", "another"])
def test_a_torch_without_cuda_is_an_error_with_words(link: str, link_torch: list[str], tmp_path: Path) -> None:
    linked, stream, told = answer(tmp_path, link_torch if link == "setup.py's" else ["-ltorch"], cuda=False)
    assert (linked, stream) == ("False", "0x0")
    assert "aoti_torch_get_current_cuda_stream was not found" in told and "built with CUDA" in told
