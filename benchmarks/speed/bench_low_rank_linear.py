"""The op against the dense layer, PyTorch and torch.compile.

make bench                                              a few cases on the CPU
python -m benchmarks.speed.bench_low_rank_linear --device cuda --dtype bfloat16 --budget 200 --out RESULTS.json
python -m benchmarks.speed.results_plot RESULTS.json                        the table and the picture
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from benchmarks.provenance import ROOT, provenance
from benchmarks.speed import shapes
from benchmarks.speed.low_rank_linear import LINEAR, MODEL_GPU, Family, draw, measure, two_calls, why_not_native
from benchmarks.speed.roofline import Roof, measure_roof

CASES = {"grid": shapes.grid, "cpu": lambda dtype: shapes.cpu_subset(), "tiny": lambda dtype: shapes.tiny()}
OUT = ROOT / "build" / "low_rank_linear.json"


class Results:
    """The JSON file: whole cases only, however the run ends."""

    def __init__(self, path: Path, device: str, cases: int) -> None:
        self.path, self.errors = path, 0
        on_gpu = torch.cuda.get_device_name(device) if device != "cpu" else f"{MODEL_GPU} (there is no GPU here)"
        self.data = {
            "about": provenance(device),
            "why_not_native": why_not_native(device),
            "choice_on": on_gpu,
            "roofs": {},
            "cases": cases,
            "cases_done": 0,
            "rows": [],
        }
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows: list[dict], roof: Roof) -> None:
        self.data["roofs"][rows[0]["dtype"]] = asdict(roof)
        self.data["rows"] += rows
        self.data["cases_done"] += 1
        self.errors += sum("error" in row for row in rows)
        partial_file = self.path.with_suffix(".part")
        partial_file.write_text(json.dumps(self.data, indent=1) + "\n")
        partial_file.replace(self.path)


@cache
def roof_of(device: str, dtype: str) -> Roof:
    return measure_roof(device, getattr(torch, dtype))


def run(cases: list, device: str, budget: float, results: Results, family: Family = LINEAR) -> None:
    """Measure the cases in order, as long as the next one, at the slowest pace of late, ends within the budget.

    budget: seconds. Raises RuntimeError if the device no longer works after an error.
    """
    started, lately = time.monotonic(), deque([0.0], maxlen=5)
    for case in cases:
        before = time.monotonic()
        if before - started + max(lately) > budget:
            break
        roof = roof_of(device, case.dtype)
        try:
            rows = measure(case, device, roof, family=family)
        except torch.OutOfMemoryError as error:
            print(f"{case}: {error}")
            continue
        results.add(rows, roof)
        print(f"{time.monotonic() - started:6.1f} s  {case}: ", *(_short(row) for row in rows), flush=True)
        if device != "cpu":
            torch.cuda.synchronize()
        lately.append(time.monotonic() - before)


def _short(row: dict) -> str:
    return (
        f"{row['provider']} {row['error']}"
        if "error" in row
        else (f"{row['provider']} {row['median_us']:.1f} us ({row['over_floor']:.2f} x floor)")
    )


def report_rows(rows: list[dict], report) -> None:
    """Fails if a provider is wrong; else PyTorch's two calls, over the floor and over the dense layer."""
    for row in rows:
        assert "error" not in row, f"{row['provider']}: {row['error']}"
    by_name = {row["provider"]: row for row in rows}
    report("torch, microseconds", by_name["torch"]["median_us"], "-")
    report("torch over floor", by_name["torch"]["over_floor"], "-")
    report("torch, times faster than dense", by_name["dense"]["median_us"] / by_name["torch"]["median_us"], "-")


@pytest.fixture(scope="module")
def results() -> Results:
    made = Results(OUT, "cpu", len(shapes.cpu_subset()))
    print("native is absent: " + "; ".join(made.data["why_not_native"]))
    return made


@pytest.mark.parametrize("case", shapes.cpu_subset(), ids=str)
def bench_low_rank_linear(case: shapes.Case, results: Results, benchmark, report) -> None:
    """Every provider that runs on a CPU, checked and timed in turns; also written to build/low_rank_linear.json."""
    roof = roof_of("cpu", case.dtype)
    rows = measure(case, "cpu", roof)
    results.add(rows, roof)
    report_rows(rows, report)
    benchmark(partial(two_calls, draw(case, "cpu"), case.layer.activation))


def main(about: str = __doc__, cases: dict = CASES, family: Family = LINEAR) -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cases", choices=cases, default="grid")
    parser.add_argument("--budget", type=float, default=200, help="seconds; whole cases only, most telling first")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    listed = cases[arguments.cases](arguments.dtype)
    results = Results(arguments.out, arguments.device, len(listed))
    for reason in results.data["why_not_native"]:
        print(f"native is absent: {reason}")
    run(listed, arguments.device, arguments.budget, results, family)
    print(f"{results.data['cases_done']} of {len(listed)} cases, {results.errors} errors: {arguments.out}")
    return 1 if results.errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
