"""Where and when figures were measured."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import shrank

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_CPUINFO = Path("/proc/cpuinfo")


def provenance(device: str) -> dict[str, object]:
    """Device, driver, versions, date and commit: what a figure needs beside it."""
    on_cuda = device != "cpu"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else f"{torch.get_num_threads()} threads of {_cpu()}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "shrank": shrank.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }


def commit() -> str:
    """Of this checkout, `-dirty` with changes; where there is no git, what SHRANK_COMMIT says."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10") or os.environ.get(
        "SHRANK_COMMIT", "unknown"
    )


def environment(device: str) -> dict[str, object]:
    """provenance, what `shrank info` says, and the state that the GPU was found in."""
    info = subprocess.run(
        [sys.executable, "-m", "shrank", "info", "--json"], capture_output=True, text=True, check=True
    )
    return {
        **provenance(device),
        "info": json.loads(info.stdout),
        "cores": os.cpu_count(),
        "nvidia_smi": _output(
            "nvidia-smi",
            "--query-gpu=name,memory.total,memory.used,clocks.sm,clocks.max.sm,"
            "clocks.mem,power.limit,temperature.gpu,mig.mode.current",
            "--format=csv",
        ),
    }


def _cpu() -> str:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = environment(arguments.device)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
