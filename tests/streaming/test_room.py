"""A disk that is too small is named before anything is written, and no more is kept than what goes on needs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from shrank import Checkpoint, auto_fact
from shrank.streaming import cut, run
from shrank.util import tensor_file
from shrank.util.files import size_on_disk
from tests.streaming.runs import bits, data, write_source

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 10 tokens")
_BLOCKS = 6
_NOTES = 100_000  # bytes of JSON, and of the heads of files, which count at this size alone


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "dense", _BLOCKS)


class Disk:
    """Of which so much is free, from the look at it with this number on."""

    def __init__(self, free: int, after: int) -> None:
        self._free, self.after, self.looks, self._usage = free, after, 0, shutil.disk_usage

    def __call__(self, path: Path):
        self.looks += 1
        found = self._usage(path)
        return found._replace(free=self._free) if self.looks > self.after else found


def test_a_small_disk_is_named_before_anything_is_written(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", Disk(200_000, 0))
    told = r"small\.streaming needs about .* GB more, its disk has 0\.0002 GB free \(.* for what blocks return, .* for "
    with pytest.raises(OSError, match=told + r"gradients, .* for moments, .* for the result\)$"):
        auto_fact(Checkpoint(source), 0.6, calibrate=data(), anchored=True, stream=tmp_path / "small")
    with pytest.raises(OSError, match=r"GB free \(0.000\d+ GB for the result\)$"):
        auto_fact(Checkpoint(source), 8, stream=tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_is_named_between_blocks_and_the_run_goes_on(source, tmp_path, monkeypatch) -> None:
    how = {"calibrate": data(), "anchored": True}
    disk = Disk(0, math.inf)
    monkeypatch.setattr(shutil, "disk_usage", disk)
    auto_fact(Checkpoint(source), 0.6, stream=tmp_path / "whole" / "small", **how)
    looks, told = disk.looks, r"needs about .* GB more, its disk has 0 GB free .*; what was done is kept in "
    for after in (looks // 3, looks // 3, looks // 3):  # in each of the sweeps
        disk.looks, disk.after = 0, after
        with pytest.raises(OSError, match=told):
            auto_fact(Checkpoint(source), 0.6, stream=tmp_path / "full" / "small", **how)
    disk.after = math.inf
    auto_fact(Checkpoint(source), 0.6, stream=tmp_path / "full" / "small", **how)
    assert bits(tmp_path / "full") == bits(tmp_path / "whole")


@pytest.mark.parametrize("anchored", [False, True])
def test_what_is_kept_is_little_and_what_was_expected(anchored: bool, source, tmp_path, monkeypatch) -> None:
    kept, sizes, wanted, write = [], [], [], tensor_file.write
    work = tmp_path / "small.streaming"

    def noted(*args: object) -> None:
        write(*args)
        sizes.append(size_on_disk(work))
        kept.append(sum(cut.is_whole(file) for file in work.glob("outputs/*/000000.safetensors")))

    monkeypatch.setattr(tensor_file, "write", noted)
    monkeypatch.setattr(run, "require_room", lambda folder, needs, there: wanted.append(sum(needs.values())))
    auto_fact(Checkpoint(source), 0.6, calibrate=data(), anchored=anchored, stream=tmp_path / "small")
    apart = math.isqrt(_BLOCKS + 1)  # with the head
    assert max(kept) <= _BLOCKS // apart + apart < _BLOCKS
    assert max(sizes) <= wanted[0] + _NOTES
