"""The convolution op against the dense convolution, PyTorch's two and torch.compile's, all channels last.

make bench                                              a few cases on the CPU
python -m benchmarks.speed.bench_low_rank_conv --device cuda --dtype bfloat16 --budget 90 --out RESULTS.json
"""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.speed import bench_low_rank_linear
from benchmarks.speed.bench_low_rank_linear import report_rows, roof_of
from benchmarks.speed.low_rank_conv import CONV, Case, cpu_subset, draw, grid, tiny, two_calls
from benchmarks.speed.low_rank_linear import measure

CASES = {"grid": grid, "cpu": cpu_subset, "tiny": tiny}


@pytest.mark.parametrize("case", cpu_subset(), ids=str)
def bench_low_rank_conv(case: Case, benchmark, report) -> None:
    """Every provider that runs on a CPU, checked and timed in turns."""
    rows = measure(case, "cpu", roof_of("cpu", case.dtype), family=CONV)
    report_rows(rows, report)
    benchmark(partial(two_calls, draw(case, "cpu"), case.layer.activation))


if __name__ == "__main__":
    raise SystemExit(bench_low_rank_linear.main(__doc__, CASES, CONV))
