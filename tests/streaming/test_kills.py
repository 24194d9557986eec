"""A run that was killed, wherever that was, goes on and ends with the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.streaming.runs import bits, finished, in_process, killed_after, moments, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> tuple[dict[str, bytes], int, float]:
    """What a run that nobody stops writes, its moments, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    seconds = finished(source, folder / "small", True, None, folder / "count")
    assert {path.name for path in folder.iterdir()} == {"small", "count"}
    return bits(folder / "small"), int((folder / "count").read_text()), seconds


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_file_and_run_again(seed: int, source, whole, tmp_path) -> None:
    expected, count, _ = whole
    for moment in sorted(map(int, moments(2, count, seed))):
        process = in_process(source, tmp_path / "small", True, moment)
        process.join()
        # The second run has less to do, and may end before it is to die.
        assert process.exitcode == -signal.SIGKILL or (tmp_path / "small").exists()
        assert (tmp_path / "small.streaming").exists() != (tmp_path / "small").exists()
        if process.exitcode == 0:
            break
    else:
        finished(source, tmp_path / "small", True)
    assert bits(tmp_path / "small") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_time_and_run_again(seed: int, source, whole, tmp_path) -> None:
    expected, _, seconds = whole
    killed_after(moments(1, seconds, seed)[0], source, tmp_path / "small", True)
    finished(source, tmp_path / "small", True)
    assert bits(tmp_path / "small") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
