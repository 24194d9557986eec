"""Everything that a GPU can tell, in under nine minutes: one JSON and one short table.

    benchmarks/run_gpu.sh OUT              # on a machine with a GPU; needs no network and installs nothing
    benchmarks/run_gpu.sh --dry-run OUT    # the same code paths in miniature, on a CPU

Each step is a process with a time limit of its own, and none depends on another. OUT gets results.json (the status,
seconds and data of every step), log.txt (all that the steps printed), and conformance.json, which belongs into
benchmarks/results/conformance-<gpu>.json: the emulator's tests hold it to that. tuned.json belongs into
shrank/ops/tables, named for the card. The conformance program is built beforehand, where nvcc is, and travels in
build/cmake.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cmake"
PYTHON = sys.executable
DATA = "DATA"  # stands for the file to which a step writes its JSON
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
NCU = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
OK, FAILED, TIMEOUT, NOT_HERE = "ok", "failed", "timeout", "not here"


@dataclass(frozen=True)
class Step:
    """A command, its limit in seconds, and what it is without a GPU (nothing: it needs one)."""

    name: str
    command: Sequence[str]
    limit: int
    rehearsal: Sequence[str] = ()
    needs: str = ""  # a program that it calls
    file: str = ""  # its data become a file of this name in OUT, and not a part of results.json


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", name, *arguments)


def sanitized(tool: str) -> tuple[str, ...]:
    """Four calls: a kernel takes a hundred times its time there, and torch its half minute to load."""
    cases = module("benchmarks.speed.sanitize_cases", "--device", "cuda", "--few")
    return (SANITIZER, "--tool", tool, "--error-exitcode", "9", *cases)


MEASURED = ("--device", "cuda", "--out", DATA)
REHEARSED = ("--cases", "tiny", "--dtype", "float32", "--budget", "10", "--out", DATA)
STAND_IN = ("--device", "cpu", "--library", str(BUILD / "libshrank_rehearsal.so"), "--out", DATA)  # csrc/rehearsal
STEPS = (
    Step(
        "conformance",
        (str(BUILD / "conformance"), DATA),
        20,
        (str(BUILD / "conformance_emulated"), DATA),
        file="conformance.json",
    ),
    Step("environment", module("benchmarks.provenance", *MEASURED), 30, module("benchmarks.provenance", "--out", DATA)),
    Step(
        "tiles",
        module("benchmarks.speed.forced_tiles", "--device", "cuda:0", "--out", DATA),
        60,
        module("benchmarks.speed.forced_tiles", "--few", *STAND_IN),
    ),
    Step(
        "tests",
        module("pytest", "-m", "gpu", "tests/ops", "-p", "no:cacheprovider"),
        100,
        module("pytest", "-m", "gpu", "tests/ops", "-p", "no:cacheprovider", "--collect-only", "-q"),
    ),
    Step("memcheck", sanitized("memcheck"), 50),
    Step("racecheck", sanitized("racecheck"), 50),
    Step(
        "tuning",
        module("benchmarks.speed.tune_shapes", "--device", "cuda:0", "--budget", "50", "--out", DATA),
        75,
        module("benchmarks.speed.tune_shapes", "--tiny", *STAND_IN),
        file="tuned.json",
    ),
    Step(
        "grid",
        module("benchmarks.speed.bench_low_rank_linear", *MEASURED, "--budget", "28"),
        42,
        module("benchmarks.speed.bench_low_rank_linear", *REHEARSED),
    ),
    Step(
        "gated",
        module("benchmarks.speed.bench_low_rank_gated", *MEASURED, "--budget", "8"),
        18,
        module("benchmarks.speed.bench_low_rank_gated", *REHEARSED),
    ),
    Step(
        "convolutions",
        module("benchmarks.speed.bench_low_rank_conv", *MEASURED, "--budget", "12"),
        26,
        module("benchmarks.speed.bench_low_rank_conv", *REHEARSED),
    ),
    Step(
        "stacks",
        module("benchmarks.speed.stacks", *MEASURED),
        38,
        module("benchmarks.speed.stacks", "--tiny", "--out", DATA),
    ),
    Step(
        "profile",
        module("benchmarks.speed.profile_kernels", "--out", DATA),
        30,
        module("benchmarks.speed.profile_kernels", "--launch", "--tiny", *STAND_IN[:-2]),
        needs=NCU,
    ),
)


def carry_out(step: Step, out: Path, dry: bool, log) -> dict[str, object]:
    """Run a step: its status, seconds, exit code, last lines and data."""
    command = step.rehearsal if dry else step.command
    if not command or not shutil.which(command[0]) or not (dry or shutil.which(step.needs or PYTHON)):
        return {"status": NOT_HERE, "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.json")
        command = [str(data) if part == DATA else part for part in command]
        log.write(f"\n===== {step.name}: {' '.join(command)}\n")
        started = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=step.limit,
                # In miniature, threads cost more by waiting for one another than they save.
                env={**os.environ, "OMP_NUM_THREADS": "1", "SHRANK_CACHE": folder} if dry else None,
                check=False,
            )
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as expired:
            output, code = (expired.stdout or b"").decode(errors="replace"), None
        log.write(output)
        log.flush()
        status = TIMEOUT if code is None else FAILED if code else OK
        # What a step wrote before it failed or ran out of time counts too.
        kept = data.exists() and not step.file
        if data.exists() and step.file:
            shutil.copy(data, out / step.file)
        return {
            "status": status,
            "seconds": round(time.monotonic() - started, 1),
            "exit_code": code,
            "last_lines": output.splitlines()[-3:],
            "data": json.loads(data.read_text()) if kept else None,
        }


def run(steps: Sequence[Step], out: Path, dry: bool) -> int:
    """Carry out the steps; 0 if all that could run went well, else 1."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    with open(out / "log.txt", "w") as log:
        for step in steps:
            results[step.name] = carry_out(step, out, dry, log)
            # Written after every step: a machine that is taken away leaves what it had shown.
            (out / "results.json").write_text(json.dumps({"dry_run": dry, "steps": results}, indent=1) + "\n")
    for name, result in results.items():
        last = (result.get("last_lines") or [""])[-1]
        print(f"{name:16} {result['status']:9} {result['seconds']:6.1f} s  {last[:90]}")
    for row in _grid_rows(results)[:60]:
        print(
            f"{row['model']:14} {row['layer']:6} M {row['M']:6} R {row['R']:5} {row['provider']:9} "
            f"{row.get('median_us', float('nan')):10.1f} us  {row.get('over_floor', float('nan')):6.2f} x floor"
        )
    return int(any(result["status"] in (FAILED, TIMEOUT) for result in results.values()))


def _grid_rows(results: dict[str, dict]) -> list[dict]:
    data = results.get("grid", {}).get("data")
    return data["rows"] if data else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", action="append", choices=[step.name for step in STEPS], help="repeatable")
    given = parser.parse_args()
    steps = [step for step in STEPS if not given.only or step.name in given.only]
    return run(steps, given.out, given.dry_run)


if __name__ == "__main__":
    raise SystemExit(main())
