"""The table and the picture of measured rows: what they are made from, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

from benchmarks.speed import results_plot


def row(provider: str, microseconds: float, M: int = 512, R: int = 304, **more: object) -> dict:
    return {
        "model": "BERT-base",
        "layer": "fc1",
        "M": M,
        "R": R,
        "dtype": "bfloat16",
        "provider": provider,
        "flops": 10**9,
        "bytes": 10**7,
        "median_us": microseconds,
        "floor_us": 4.0,
        "bound": "memory",
        "over_floor": microseconds / 4.0,
        "choice": "two_gemms",
        **more,
    }


FAILED_ROW = {
    key: value
    for key, value in row("native", 1.0, M=1, error="AssertionError: wrong").items()
    if key not in ("median_us", "floor_us", "bound", "over_floor")
}
DATA = {
    "about": {"device": "some GPU", "torch": "2.13.0", "date": "2026-11-24T12:00+00:00", "commit": "abc"},
    "roofs": {"bfloat16": {"bandwidth": 4e12, "flops": 8e14, "launch": 1e-6}},
    "choice_on": "some GPU",
    "rows": [
        row("dense", 30.0),
        row("torch", 20.0),
        row("native", 6.0),
        row("dense", 7.0, M=1),
        row("torch", 5.0, M=1),
        FAILED_ROW,
    ],
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(DATA))
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def refusal(arguments: list[str], capsys) -> tuple[int, str]:
    """The exit status, and what is said on standard error, in one line."""
    with pytest.raises(SystemExit) as left:
        results_plot.main(arguments)
    return left.value.code, " ".join(capsys.readouterr().err.split())


def test_the_table_has_a_line_per_case(file: Path, capsys) -> None:
    results_plot.main([str(file)])
    shown = capsys.readouterr().out
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert "BERT-base fc1 512 304 bfloat16 30 20 6 4 memory 1.50 5.00x two_gemms" in lines
    assert "BERT-base fc1 1 304 bfloat16 7 5 error 4 memory 1.25 1.40x two_gemms" in lines
    assert "some GPU, torch 2.13.0, 2026-11-24, abc" in shown


def test_the_picture_lies_beside_the_results(file: Path) -> None:
    results_plot.main([str(file)])
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("layers", [1, 4, 20])
def test_any_number_of_layers_dtypes_and_ranks_is_drawn(layers: int, tmp_path) -> None:
    rows = [
        {**each, "layer": f"fc{number}", "dtype": "float32" if number % 2 else "bfloat16", "R": rank}
        for number in range(layers)
        for rank in (8, 16)
        for each in DATA["rows"]
    ]
    roofs = {**DATA["roofs"], "float32": {"bandwidth": 4e12, "flops": 5e13, "launch": 1e-6}}
    results = results_plot.Results(DATA["about"], roofs, "some GPU", rows)
    results_plot.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert results_plot.table(results).row_count == 4 * layers


def test_the_rows_are_those_of_the_file(file: Path) -> None:
    assert results_plot.load(file).rows == DATA["rows"]


def test_the_results_of_a_whole_run_hold_the_grid(tmp_path) -> None:
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({"steps": {"grid": {"status": "ok", "data": DATA}}}))
    assert results_plot.load(whole).rows == DATA["rows"]


def without(*path: object) -> dict:
    changed = copy.deepcopy(DATA)
    where = changed
    for step in path[:-1]:
        where = where[step]
    del where[path[-1]]
    return changed


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([1], "holds no results of"),
        ({"steps": {}}, "holds no results of"),
        (without("roofs"), "holds no results of"),
        (without("rows", 1, "median_us"), "row 1 lacks median_us"),
        (without("rows", 0, "R"), "row 0 lacks R"),
        ({**DATA, "rows": []}, "holds no measured row"),
        ({**DATA, "rows": DATA["rows"][-1:]}, "holds no measured row"),
        ("{", "is not JSON"),
    ],
)
def test_other_files_are_refused(data: object, says: str, file: Path, capsys) -> None:
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    status, said = refusal([str(file)], capsys)
    assert status == 1 and says in said
    assert not file.with_suffix(".png").exists()


def test_without_matplotlib_it_says_what_to_install(file: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, said = refusal([str(file)], capsys)
    assert status == 1 and "shrank[plot]" in said


@pytest.mark.parametrize("arguments", [[], ["one.json", "another.json"]])
def test_it_takes_one_file(arguments: list[str], capsys) -> None:
    status, said = refusal(arguments, capsys)
    assert status == 2 and said.startswith("usage:")


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5 "), (45e9, "45 G"), (4.3e12, "4.3 T"), (7.9e14, "790 T"), (1e19, "1e+04 P")]
)
def test_units(value: float, text: str) -> None:
    assert results_plot._si(value) == text
