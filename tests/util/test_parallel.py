"""in_parallel: ordered, bounded, on one core each, and it stops when it is told to."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from shrank.util.parallel import in_parallel, workers_for


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_order_is_kept_and_threads_are_single() -> None:
    def work(i: int) -> tuple[int, int]:
        time.sleep(0.01 * (i % 3))
        return i, torch.get_num_threads()

    assert list(in_parallel(work, range(20), 3)) == [(i, 1) for i in range(20)]
    assert torch.get_num_threads() == 3


def test_several_run_at_once() -> None:
    barrier = threading.Barrier(3, timeout=10)
    assert list(in_parallel(lambda i: barrier.wait() >= 0, range(6), 3)) == [True] * 6


def test_it_runs_only_a_few_ahead_and_cancels_what_nobody_awaits() -> None:
    started = []
    results = in_parallel(started.append, range(1000), 3)
    next(results)
    results.close()
    assert len(started) <= 5


def test_errors_reach_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_parallel(lambda i: 1 // i, [1, 0, 1], 3))


def test_one_thread_needs_no_pool() -> None:
    assert list(in_parallel(lambda i: threading.current_thread(), [1], 1)) == [threading.main_thread()]


def test_workers_are_torchs_threads_on_a_cpu_and_one_elsewhere() -> None:
    cpu, elsewhere = torch.empty(1), torch.empty(1, device="meta")
    assert workers_for([cpu, cpu]) == 3 and workers_for([cpu, elsewhere]) == 1
