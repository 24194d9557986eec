"""Builds shrank with its native extension where CUDA's compiler is at hand, and with its kernels for a CPU where one
for C++ is, else as pure Python, and says which.

SHRANK_BUILD=1 insists on the extension, SHRANK_BUILD=cpu on the kernels for a CPU alone, SHRANK_BUILD=0 leaves both
out; CUDA_HOME, CXX and TORCH_CUDA_ARCH_LIST are respected. Both use torch's stable ABI only, so one build serves every
Python and every torch from 2.10, CPU builds too.
"""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command, Extension, setup

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "shrank/version.py"))["__version__"]
WANTED = os.environ.get("SHRANK_BUILD", "auto")
# libtorch.so brings libtorch_cuda.so, where the current stream is asked for, and exports nothing itself: a linker that
# keeps only what is used, as those of Debian and conda do, would drop it.
LINK_TORCH = ["-Wl,--push-state,--no-as-needed,-ltorch,--pop-state"]
# Objects stay here, for editable installations too: the next build compiles what changed, and CMake can link them.
OBJECTS = {"shrank._C": "build/extension", "shrank._host": "build/host"}
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
        made = ROOT / OBJECTS["shrank._C"] / f"{source.removesuffix('.cu')}.o"
        if made.exists() and made.stat().st_mtime < max(path.stat().st_mtime for path in included(ROOT / source)):
            made.unlink()


def list_sources() -> dict:
    return json.loads((ROOT / "csrc/sources.json").read_text())


def cuda_extension() -> tuple[Extension, str]:
    """The native extension, and the CUDA version that it is built with, such as cu130."""
    home = find_cuda_home()
    find_torch()
    from torch.utils import cpp_extension

    listed = list_sources()
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
    return extension, f"cu{release[1]}{release[2]}"


def host_extension() -> Extension:
    """The kernels for a CPU, which shrank loads only where the processor has what they are compiled for."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NotBuildable(f"they are for x86-64, this is {platform.machine()}")
    if not (compiler := shutil.which(os.environ.get("CXX") or "c++")):
        raise NotBuildable("no C++ compiler: neither CXX nor c++ is one")
    find_torch()
    from torch.utils import cpp_extension

    listed = list_sources()
    extension = cpp_extension.CppExtension(
        "shrank._host",
        listed["host"],
        py_limited_api=True,
        extra_compile_args=[
            *("-O3", "-g0", "-mavx2", "-mfma", "-Wall", "-Wno-psabi", "-fvisibility=hidden"),
            f"-DTORCH_TARGET_VERSION={listed['torch_target_version']}",
        ],
    )
    extension.libraries = ["torch_cpu"]
    print(f"shrank: with kernels for a CPU, by {compiler}", file=sys.stderr)
    return extension


def builder() -> type[Command]:
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extension(self, extension: Extension) -> None:
            self.build_temp = OBJECTS[extension.name]  # only now: an editable installation sets a temporary one
            if extension.name == "shrank._C":
                remove_old_kernels(list_sources()["cuda"])
            super().build_extension(extension)

    return BuildExtension


def arguments() -> dict:
    """Of setup(): what can be built, or was insisted on."""
    if WANTED not in ("auto", "0", "1", "cpu"):
        raise SystemExit(f"SHRANK_BUILD is {WANTED!r}, wanted 0, 1, cpu or nothing")
    version, extensions, left_out = VERSION, [], []
    try:
        if WANTED in ("0", "cpu"):
            raise NotBuildable(f"SHRANK_BUILD={WANTED}")
        extension, cuda = cuda_extension()
        extensions.append(extension)
        version += f"+{cuda}"
        print(f"shrank: with CUDA kernels, {version} for {os.environ['TORCH_CUDA_ARCH_LIST']}", file=sys.stderr)
    except NotBuildable as reason:
        left_out.append((WANTED == "1", f"its CUDA kernels: {reason}"))
    try:
        if WANTED == "0":
            raise NotBuildable("SHRANK_BUILD=0")
        extensions.append(host_extension())
    except NotBuildable as reason:
        left_out.append((WANTED == "cpu", f"its kernels for a CPU: {reason}"))
    for insisted, what in left_out:
        if insisted:
            raise SystemExit(f"shrank: SHRANK_BUILD={WANTED}, but without {what}")
        print(f"shrank: {'' if extensions else 'pure Python, '}without {what}", file=sys.stderr)
    made = {"ext_modules": extensions, "cmdclass": {"build_ext": builder()}} if extensions else {}
    return {"version": version, "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {}, **made}


setup(**arguments())
