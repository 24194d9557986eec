"""The script that a GPU is given: its rehearsal on the CPU, and what it does when steps fail."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.run_gpu import FAILED, NOT_HERE, OK, PYTHON, ROOT, STEPS, TIMEOUT, Step, run
from shrank.ops.probes import names


def test_the_rehearsal_goes_through_every_step(tmp_path: Path) -> None:
    ran = subprocess.run(
        [ROOT / "benchmarks/run_gpu.sh", "--dry-run", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHON": PYTHON, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr + (tmp_path / "out/log.txt").read_text()[-4000:]
    steps = json.loads((tmp_path / "out/results.json").read_text())["steps"]
    assert list(steps) == [step.name for step in STEPS]
    assert {name: found["status"] for name, found in steps.items()} == {
        step.name: OK if step.rehearsal else NOT_HERE for step in STEPS
    }
    assert steps["grid"]["data"]["rows"] and steps["stacks"]["data"]["rows"] and steps["environment"]["data"]["torch"]
    tiles, table = steps["tiles"]["data"], json.loads((tmp_path / "out/tuned.json").read_text())
    assert (
        list(tiles["families"]) == names()
        and len(tiles["tiles"]) >= 60
        and not any((tiles["families"] | tiles["tiles"]).values())
    )
    assert {each["kernel"] for each in table["measured"]} <= {
        "shrink_expand",
        "fused",
        "gemm_expand",
        "two_gemms_epilogue",
        "two_gemms",
    }
    assert all(name in ran.stdout for name in steps)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "log.txt",
        "conformance.json",
        "tuned.json",
    }
    assert json.loads((tmp_path / "out/conformance.json").read_text())["results"]


def test_no_step_stops_another(tmp_path: Path, capsys) -> None:
    fails = Step("fails", (PYTHON, "-c", "print('half'); raise SystemExit(3)"), 20)
    hangs = Step("hangs", (PYTHON, "-c", "import time; print('waiting', flush=True); time.sleep(60)"), 1)
    lacks = Step("lacks", ("no-such-program",), 20)
    calls = Step("calls", (PYTHON, "-c", "raise SystemExit(1)"), 20, needs="no-such-program")
    writes = Step("writes", (PYTHON, "-c", "import sys; open(sys.argv[1], 'w').write('[1]')", "DATA"), 20)
    assert run([fails, hangs, lacks, calls, writes], tmp_path, dry=False) == 1
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name: found["status"] for name, found in steps.items()} == {
        "fails": FAILED,
        "hangs": TIMEOUT,
        "lacks": NOT_HERE,
        "calls": NOT_HERE,
        "writes": OK,
    }
    assert steps["fails"]["last_lines"] == ["half"] and steps["writes"]["data"] == [1]
    assert "waiting" in (tmp_path / "log.txt").read_text()
    assert run([lacks, calls, writes], tmp_path, dry=False) == 0


def test_all_limits_together_are_under_nine_minutes() -> None:
    assert sum(step.limit for step in STEPS) < 9 * 60
