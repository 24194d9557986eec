"""Machine instructions are spelled in csrc/arch, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SPELLINGS = re.compile(r"\b(?:asm|threadIdx|blockIdx|blockDim|gridDim|warpSize|__\w+)\b")
# Words with two underscores that are no instruction.
ALLOWED = {
    "__CUDACC__": "which compiler reads the file",
    "__global__": "what a kernel's entry is",
    "__launch_bounds__": "how many threads it has",
    "__grid_constant__": "where its parameters stay",
    "__attribute__": "weak symbols of torch, and vectors: a host's business",
    "__builtin_convertvector": "vectors on a host",
    "__FILE__": "C++",
    "__LINE__": "C++",
    "__VA_ARGS__": "C++",
    "__repr__": "Python's, in the bindings",
}
# attributes of a launch on the host side, of dim3 and of cudaLaunchConfig_t
HOST_FIELDS = re.compile(r"\.(?:gridDim|blockDim)\b")


def sources() -> list[Path]:
    """All of csrc but the home of instructions, their emulation, and the stand-in for the CUDA runtime, whose names are
    those of the real one."""
    found = [path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cu", ".cpp"}]
    return [path for path in found if path.relative_to(CSRC).parts[0] not in ("arch", "emulator", "rehearsal")]


def spellings(text: str) -> set[str]:
    code = HOST_FIELDS.sub("", re.sub(r"//.*", "", text))
    return set(SPELLINGS.findall(code)) - ALLOWED.keys()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(CSRC)))
def test_no_instruction_is_spelled_outside_arch(path: Path) -> None:
    assert not spellings(path.read_text()), "belongs into csrc/arch, as a function with a name"


def test_an_instruction_would_be_seen() -> None:
    for line in (
        "__syncthreads();",
        'asm volatile("nop;");',
        "int i = threadIdx.x;",
        "x = __ldg(p);",
        "v = __shfl_xor_sync(~0u, v, 1);",
        "float f = __uint_as_float(u);",
    ):
        assert spellings(line), line
    assert not spellings("config.gridDim = grid;  // __syncthreads")


def test_only_arch_knows_the_emulators_instructions() -> None:
    users = [path for path in sources() if "emulator/instructions.h" in path.read_text()]
    assert not users
