"""The benchmark of the host's cost runs: its process loads the library before anything imports shrank."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.speed.bench_host_cost import LIBRARY, MODES, ROOT


@pytest.mark.skipif(not LIBRARY.exists(), reason="the C++ ops for the CPU are not built")
def test_every_mode_is_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.speed.bench_host_cost", "--library", str(LIBRARY), "--rounds", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    costs = json.loads(ran.stdout)
    assert costs.keys() == MODES.keys()
    assert all(each["two_linears_us"] > 0 for each in costs.values())
