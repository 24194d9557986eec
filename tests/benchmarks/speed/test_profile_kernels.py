"""What becomes of a profiler's output, and that a profile is of the launches it names."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from benchmarks.speed import profile_kernels
from benchmarks.speed.profile_kernels import NAMES, parsed, profiled

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"'
)


def row(number: int, metric: str, unit: str, value: str, advice: str = "") -> str:
    kernel = f"void shrank::entry<Kernel{number}>(Params)"
    cells = [number, 7, "python", "host", kernel, 1, 7, "(128, 1, 1)", "(9, 1, 1)", 0, "9.0", "A section", metric, unit]
    return ",".join(f'"{cell}"' for cell in [*cells, value, "", "", advice])


def test_metrics_are_told_by_launch_with_their_units() -> None:
    printed = [
        "==PROF== Connected to process 7",
        'a line of "ours", with commas',
        HEADER,
        row(0, "Duration", "us", "12.3"),
        row(0, "", "", "", "Use more blocks, or fewer"),
        row(1, "Duration", "us", "1,012.5"),
        row(1, "Registers Per Thread", "register/thread", "255"),
    ]
    first, second = parsed("\n".join(printed))
    assert first == {"kernel": "void shrank::entry<Kernel0>(Params)", "Duration": "12.3 us"}
    assert second["Duration"] == "1,012.5 us" and second["Registers Per Thread"] == "255 register/thread"


def test_no_table_is_no_launch() -> None:
    assert parsed("==PROF== Connected\n==ERROR== The user does not have permission\n") == []


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A program in the place of ncu."""
    program = folder / "ncu"
    program.write_text(f"#!{sys.executable}\n{body}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(profile_kernels, "NCU", str(program))


def test_every_case_has_its_second_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [HEADER, *(row(number, "Duration", "us", str(number)) for number in range(2 * len(NAMES)))]
    stand_in(tmp_path, monkeypatch, f"print({chr(10).join(rows)!r})")
    assert {name: found["Duration"] for name, found in profiled().items()} == {
        name: f"{2 * i + 1} us" for i, name in enumerate(NAMES)
    }


def test_a_launch_too_few_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, f"print({(HEADER + chr(10) + row(0, 'Duration', 'us', '1'))!r})")
    with pytest.raises(RuntimeError, match="ncu saw 1 launches, wanted 8"):
        profiled()


def test_the_words_of_an_ncu_that_failed_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "print('==ERROR== ERR_NVGPUCTRPERM'); raise SystemExit(1)")
    with pytest.raises(RuntimeError, match=r"ncu ended with 1: ==ERROR== ERR_NVGPUCTRPERM"):
        profiled()
