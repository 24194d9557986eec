"""How a case is measured: nobody wrong is timed, rows are complete, a run stops between cases."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.speed import bench_low_rank_linear, low_rank_linear, results_plot, shapes
from benchmarks.speed.bench_low_rank_linear import Results, run
from benchmarks.speed.low_rank_linear import LINEAR, check, choice, dense, draw, measure, two_calls
from benchmarks.speed.roofline import Roof
from shrank.ops import native

CASES = shapes.tiny()
ROOF = Roof(bandwidth=1e10, flops=1e11, launch=1e-5)


@pytest.fixture
def short(monkeypatch) -> None:
    """No compiler, short sequences, small caches."""
    monkeypatch.setattr(
        low_rank_linear.Family, "providers", lambda family, device: {"dense": family.dense, "torch": family.two_calls}
    )
    monkeypatch.setattr(low_rank_linear, "SEQUENCE_SECONDS", 1e-6)
    monkeypatch.setattr(low_rank_linear, "copies_beyond_cache", lambda size, device: 3)
    monkeypatch.setattr(bench_low_rank_linear, "roof_of", lambda device, dtype: ROOF)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_who_computes_something_else_is_found(case: shapes.Case) -> None:
    def without_bias(inputs, activation):
        return two_calls(inputs._replace(bias=None), activation)

    def unfinished(inputs, activation):
        return two_calls(inputs, activation).masked_fill_(torch.arange(case.layer.N) == 5, float("nan"))

    def broken(inputs, activation):
        raise RuntimeError("no such kernel")

    found = {
        "dense": dense,
        "torch": two_calls,
        "without bias": without_bias,
        "unfinished": unfinished,
        "broken": broken,
    }
    wrong = check(found, draw(case, "cpu"), case.layer.activation, LINEAR)
    assert wrong.keys() == {"without bias", "unfinished", "broken"}
    assert "relative error" in wrong["without bias"] and "no such kernel" in wrong["broken"]


def test_the_dense_layer_is_held_to_its_own_weight() -> None:
    wrong = check({"dense": two_calls, "torch": dense}, draw(CASES[0], "cpu"), CASES[0].layer.activation, LINEAR)
    assert wrong.keys() == {"dense", "torch"}


def test_a_case_gives_a_row_per_provider(short) -> None:
    case = CASES[0]
    rows = measure(case, "cpu", ROOF, rounds=2)
    assert [row["provider"] for row in rows] == ["dense", "torch"]
    for row in rows:
        assert (row["M"], row["K"], row["N"], row["R"], row["dtype"]) == (3, 48, 64, 8, "float32")
        assert row["over_floor"] == pytest.approx(row["median_us"] / row["floor_us"])
        assert row["floor_us"] == pytest.approx(10) and row["bound"] == "launch"
    assert rows[0]["flops"] == 2 * 3 * 48 * 64 and rows[1]["flops"] == 2 * 3 * 8 * (48 + 64)


@pytest.mark.parametrize(("wanted", "cold"), [(4, True), (5, False)])
def test_a_row_says_whether_its_tensors_outgrow_the_cache(short, monkeypatch, wanted: int, cold: bool) -> None:
    monkeypatch.setattr(low_rank_linear, "copies_beyond_cache", lambda size, device: wanted)
    monkeypatch.setattr(low_rank_linear, "MOST_SETS", 4)
    assert {row["cold"] for row in measure(CASES[0], "cpu", ROOF, rounds=1)} == {cold}


def test_who_is_wrong_is_not_timed(short, monkeypatch) -> None:
    def wrong(inputs, activation):
        wrong.calls += 1
        return two_calls(inputs, activation) + 1

    wrong.calls = 0
    monkeypatch.setattr(low_rank_linear.Family, "providers", lambda *_: {"torch": two_calls, "native": wrong})
    torch_row, native_row = measure(CASES[0], "cpu", ROOF, rounds=2)
    assert wrong.calls == 1 and "relative error" in native_row["error"] and "median_us" not in native_row
    assert torch_row["median_us"] > 0


def test_the_choice_is_that_of_select(monkeypatch) -> None:
    found = choice(CASES[0], "cpu")
    if native.problems():
        assert found["choice"] is None and "native extension" in found["why_no_choice"]
    else:
        assert found["choice"] == "two_gemms_epilogue" and found["predicted_us"] > 0
    monkeypatch.setattr(native, "problems", lambda: ("it was never built",))
    found = choice(CASES[0], "cpu")
    assert (
        found["choice"] is None
        and "native extension, which is not loaded: it was never built" in found["why_no_choice"]
    )


def test_a_run_stops_between_cases_and_its_file_can_be_shown(short, tmp_path, monkeypatch) -> None:
    clock = iter([0.0, 0.0, 40.0, 40.0, 40.0, 80.0, 80.0, 80.0])
    monkeypatch.setattr(bench_low_rank_linear.time, "monotonic", lambda: next(clock))
    results = Results(tmp_path / "results.json", "cpu", 5)
    run([CASES[0], CASES[1], CASES[0]], "cpu", 100, results)  # two took 40 s each: a third would end too late
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["cases_done"] == 2 and data["cases"] == 5 and len(data["rows"]) == 4
    assert results_plot.table(results_plot.load(tmp_path / "results.json")).row_count == 2
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_case_that_does_not_fit_is_left_out(short, tmp_path, monkeypatch, capsys) -> None:
    def measure_or_not(case, device, roof, family):
        if case is CASES[0]:
            raise torch.OutOfMemoryError("too large")
        return measure(case, device, roof, family=family)

    monkeypatch.setattr(bench_low_rank_linear, "measure", measure_or_not)
    results = Results(tmp_path / "results.json", "cpu", 2)
    run(CASES, "cpu", 100, results)
    assert results.data["cases_done"] == 1 and "too large" in capsys.readouterr().out
