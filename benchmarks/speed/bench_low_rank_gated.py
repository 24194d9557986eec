"""The op of gated layers against the dense layers, PyTorch and torch.compile.

make bench                                              a few cases on the CPU
python -m benchmarks.speed.bench_low_rank_gated --device cuda --dtype bfloat16 --budget 20 --out RESULTS.json
"""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.speed import bench_low_rank_linear
from benchmarks.speed.bench_low_rank_linear import report_rows, roof_of
from benchmarks.speed.low_rank_gated import GATED, cpu_subset, draw, four_calls, grid, tiny
from benchmarks.speed.low_rank_linear import measure
from benchmarks.speed.shapes import Case

CASES = {"grid": grid, "cpu": cpu_subset, "tiny": tiny}


@pytest.mark.parametrize("case", cpu_subset(), ids=str)
def bench_low_rank_gated(case: Case, benchmark, report) -> None:
    """Every provider that runs on a CPU, checked and timed in turns."""
    rows = measure(case, "cpu", roof_of("cpu", case.dtype), family=GATED)
    report_rows(rows, report)
    benchmark(partial(four_calls, draw(case, "cpu"), case.layer.activation))


if __name__ == "__main__":
    raise SystemExit(bench_low_rank_linear.main(__doc__, CASES, GATED))
