"""Builds shrank with its native extension where CUDA's compiler is at hand, else as pure Python, and says which.

SHRANK_BUILD=1 insists on the extension, SHRANK_BUILD=0 leaves it out; CUDA_HOME and TORCH_CUDA_ARCH_LIST are respected.
The extension uses torch's stable ABI only, so one build serves every Python and every torch from 2.10, CPU builds too.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "shrank/version.py"))["__version__"]
WANTED = os.environ.get("SHRANK_BUILD", "auto")
# libtorch.so brings libtorch_cuda.so, where the current stream is asked for, and exports nothing itself: a linker that
# keeps only what is used, as those of Debian and conda do, would drop it.
LINK_TORCH = ["-Wl,--push-state,--no-as-needed,-ltorch,--pop-state"]
# Objects stay here, for editable installations too: the next build compiles what changed, and CMake can link them.
OBJECTS = "build/extension"
NEEDS_8_0 = "the kernels need compute capability 8.0 (cp.async, bfloat16)"


class NotBuildable(Exception):
    """Why the extension cannot be built here."""


def find_cuda_home() -> Path:
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and Path(nvcc).resolve().parent.parent,
        os.environ.get("SHRANK_CUDA_DEFAULT", "/usr/local/cuda"),
    ]
    for home in map(Path, filter(None, candidates)):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime_api.h").exists():
            return home
    raise NotBuildable("no CUDA compiler: nvcc is not on PATH and CUDA_HOME is not set")


def find_torch() -> None:
    """pip builds in an environment of its own, which hides the very torch that the package will run with."""
    if find_spec("torch") is None:
        sys.path.append(sysconfig.get_path("platlib"))
    if find_spec("torch") is None:
        raise NotBuildable("torch is not installed beside this pip: install it first, or pass --no-build-isolation")


def nvcc_says(home: Path, option: str) -> str:
    return subprocess.run([home / "bin/nvcc", option], check=True, capture_output=True, text=True).stdout


def architectures(home: Path, wanted: str) -> str:
    """Those of `wanted` that this nvcc knows; or those that the user asked for, so that nvcc names an unknown one.

    Images of containers set TORCH_CUDA_ARCH_LIST for every package: what the kernels cannot run on is left out.
    """
    if asked := re.findall("[^; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")):
        too_old = [arch for arch in asked if is_too_old(arch)]
        if too_old == asked:
            raise NotBuildable(f"TORCH_CUDA_ARCH_LIST is {' '.join(asked)}: {NEEDS_8_0}")
        if too_old:
            print(f"shrank: without {', '.join(too_old)} of TORCH_CUDA_ARCH_LIST: {NEEDS_8_0}", file=sys.stderr)
        return " ".join(arch for arch in asked if arch not in too_old)
    known = re.findall(r"sm_(\d+)", nvcc_says(home, "--list-gpu-code"))
    kept = [arch for arch in wanted.split() if re.sub(r"\D", "", arch) in known]
    return " ".join([*kept[:-1], kept[-1].removesuffix("+PTX") + "+PTX"])


def is_too_old(arch: str) -> bool:
    """Of an entry of TORCH_CUDA_ARCH_LIST: a number, or a name as torch knows them ("Volta+Tegra")."""
    number = re.match(r"(\d+)\.\d", arch)
    return int(number[1]) < 8 if number else arch.split("+")[0] in ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")


def included(source: Path) -> set[Path]:
    """Our own files of which a source is made, itself among them."""
    found, left = set(), [source]
    while left:
        path = left.pop().resolve()
        if path not in found:
            found.add(path)
            left += [path.parent / name for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)]
    return found


def remove_old_kernels(sources: list[str]) -> None:
    """Those older than what they include: beside a torch without CUDA, ninja does not know that of nvcc's objects."""
    for source in (source for source in sources if source.endswith(".cu")):
        made = ROOT / OBJECTS / f"{source.removesuffix('.cu')}.o"
        if made.exists() and made.stat().st_mtime < max(path.stat().st_mtime for path in included(ROOT / source)):
            made.unlink()


def native_extension() -> dict:
    """The arguments of setup() that build the extension."""
    home = find_cuda_home()
    find_torch()
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            self.build_temp = OBJECTS  # only now: an editable installation sets a temporary one
            remove_old_kernels(listed["cuda"])
            super().build_extensions()

    listed = json.loads((ROOT / "csrc/sources.json").read_text())
    archs = architectures(home, listed["archs"])
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    cpp_extension.CUDA_HOME = str(home)  # torch looks for it only if it was itself built with CUDA
    cpp_extension._check_cuda_version = lambda *_: None  # torch's own CUDA does not matter: the runtime is static
    defines = [
        f"-DTORCH_TARGET_VERSION={listed['torch_target_version']}",
        f'-DSHRANK_CUDA_ARCHS="{re.sub("[; ]+", ", ", archs)}"',
    ]
    # Of CUDA 12.8 and later: the kernels take a third of the space.
    smaller = ["--compress-mode=size"] if "--compress-mode" in nvcc_says(home, "--help") else []
    extension = cpp_extension.CUDAExtension(
        "shrank._C",
        listed["select"] + listed["ops"] + listed["cuda"],
        py_limited_api=True,
        extra_compile_args={
            "cxx": ["-O2", "-Wall", "-fvisibility=hidden", *defines],
            "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden", *smaller, *defines],
        },
    )
    # A static runtime works with every CUDA of the same major.
    extension.libraries = ["torch_cpu", "cudart_static", "rt", "dl", "pthread"]
    extension.extra_link_args = LINK_TORCH
    extension.library_dirs.extend(str(home / folder) for folder in ("lib64", "lib"))
    release = re.search(r"release (\d+)\.(\d+)", nvcc_says(home, "--version"))
    return {
        "version": f"{VERSION}+cu{release[1]}{release[2]}",
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def arguments() -> dict:
    if WANTED not in ("auto", "0", "1"):
        raise SystemExit(f"SHRANK_BUILD is {WANTED!r}, wanted 0, 1 or nothing")
    try:
        if WANTED == "0":
            raise NotBuildable("SHRANK_BUILD=0")
        made = native_extension()
    except NotBuildable as reason:
        if WANTED == "1":
            raise SystemExit(f"shrank: SHRANK_BUILD=1, but {reason}") from None
        print(f"shrank: pure Python, without its CUDA kernels: {reason}", file=sys.stderr)
        return {"version": VERSION}
    print(f"shrank: with CUDA kernels, {made['version']} for {os.environ['TORCH_CUDA_ARCH_LIST']}", file=sys.stderr)
    return made


setup(**arguments())
