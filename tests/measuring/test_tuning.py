"""What is measured is checked first, kept, told to the native code and believed only where it holds.

The clock follows a script, and the ways are PyTorch's own: tests/csrc/emulated/named_ops.py has the kernels.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import shrank
from shrank.measuring import tuning
from shrank.measuring.timing import Timing
from shrank.measuring.tuning import Problem, measure
from shrank.ops import machine, registration, tuned
from shrank.ops.apart import NotMade
from shrank.ops.conv import CONV
from shrank.ops.gated import GATED
from shrank.ops.linear import LINEAR
from shrank.ops.pivoted import PIVOTED
from shrank.ops.tuned import Measured
from shrank.util.cache import name_of, write_facts

LINEAR_PROBLEM = {
    "M": 37,
    "K": 200,
    "N": 136,
    "R": 40,
    "dtype": "bfloat16",
    "activation": "gelu",
    "bias": True,
    "residual": True,
    "training": False,
    "captured": True,
    "aligned": True,
}
CONV_PROBLEM = {
    "batch": 2,
    "C": 16,
    "N": 40,
    "R": 24,
    "input": [1, 9, 7],
    "output": [1, 5, 5],
    "kernel": [1, 3, 3],
    "stride": [1, 2, 1],
    "begin": [0, 1, 0],
    "end": [0, 1, 0],
    "dilation": [1, 1, 1],
    "groups": 1,
    "up_groups": 1,
    "dtype": "float16",
    "activation": "none",
    "bias": True,
    "residual": True,
    "training": False,
    "captured": False,
    "channels_last": True,
}
GATED_PROBLEM = LINEAR_PROBLEM | {"activation": "silu", "residual": False, "gate_R": 72}
PROBLEMS = {
    "linear": Problem("a linear key", LINEAR_PROBLEM),
    "gated": Problem("a gated key", GATED_PROBLEM),
    "gated pivoted": Problem("a gated pivoted key", GATED_PROBLEM | {"pivoted": True}),
    "pivoted": Problem("a pivoted key", LINEAR_PROBLEM | {"pivoted": True}),
    "conv": Problem("a conv key", CONV_PROBLEM),
}
WAYS = {
    LINEAR.name: [
        ("fused", [64, 64, 1]),
        ("fused", [32, 64, 2]),
        ("gemm_expand", [64, 0, 1]),
        ("two_gemms_epilogue", None),
    ],
    GATED.name: [
        ("fused", [64, 128, 1]),
        ("gemm_expand", [64, 0, 1]),
        ("two_gemms_epilogue", None),
    ],
    PIVOTED.name: [
        ("fused", [64, 128, 1]),
        ("gemm_expand", [64, 0, 1]),
        ("two_gemms_epilogue", None),
    ],
    CONV.name: [("fused", [64, 32, 1]), ("conv_expand", [64, 0, 1]), ("two_convs_epilogue", None)],
}
LIBRARY = {op.name: "two_gemms_epilogue" for op in (LINEAR, GATED, PIVOTED)} | {CONV.name: "two_convs_epilogue"}


class Native:
    """Ops of the native code: each way computes as PyTorch does, unless it is broken."""

    def __init__(self) -> None:
        self.broken: dict[tuple[str, tuple], object] = {}
        self.breaks = {"y": (True, False)}  # which outputs, in training or inference
        self.told: dict[str, tuple] = {}
        self.asked: dict[str, dict] = {}
        self.noting = False

    def choices(self, op) -> str:
        def grid(numbers):
            return numbers and dict(zip(("block_m", "max_rank", "blocks_n"), numbers, strict=True))

        return json.dumps([{"kernel": kernel, "grid": grid(numbers)} for kernel, numbers in WAYS[op.name]])

    def run(self, op, given, kernel, grid=(), training=False):
        change = self.broken.get((kernel, tuple(grid)), lambda y: y)
        found = op.forward(*op.packed(given))
        return found._replace(
            **{name: change(getattr(found, name)) for name, when in self.breaks.items() if training in when}
        )

    def remember_measured(self, key, kernel, grid, microseconds, library_us, source) -> None:
        self.told[key] = (kernel, tuple(grid), microseconds, library_us, source)

    def forget_measured(self) -> None:
        self.told.clear()

    def note_problems(self, on: bool) -> None:
        self.noting = on

    def noted_problems(self) -> str:
        return json.dumps(self.asked)


@pytest.fixture
def native(monkeypatch, tmp_path) -> Native:
    made = Native()
    monkeypatch.setenv("SHRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_loaded", set())
    monkeypatch.setattr(registration.Op, "run_named", lambda op, *given: Native.run(made, op, *given))
    for name in ("remember_measured", "forget_measured", "note_problems", "noted_problems"):
        monkeypatch.setattr(torch.ops.shrank, name, getattr(made, name), raising=False)
    for op in (LINEAR, GATED, PIVOTED, CONV):
        monkeypatch.setattr(torch.ops.shrank, f"{op.name}_choices", lambda *_, op=op: made.choices(op), raising=False)
    return made


def scripted(seconds: dict[str, float], spread: float = 0.01):
    """A clock that reads these times, by the names of ways, and notes what it was asked."""

    def clock(candidates, device, rounds, graphs, held):
        clock.asked.append((set(candidates), graphs, held))
        for calls in candidates.values():
            calls[0]()
        return {name: Timing(seconds.get(name, 1.0), spread) for name in candidates}

    clock.asked = []
    return clock


@pytest.mark.parametrize("name", PROBLEMS)
def test_arguments_are_those_of_the_problem(name: str) -> None:
    problem = PROBLEMS[name]
    given = problem.arguments("cpu")
    problem.op.check(*problem.op.packed(given))
    found = problem.op.forward(*problem.op.packed(given)).y
    n = problem.numbers
    assert found.dtype == getattr(torch, n["dtype"]) and bool(torch.isfinite(found).all())
    if name == "conv":
        assert list(found.shape) == [2, 40, 5, 5] and found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_fastest_right_way_wins(native, name: str) -> None:
    problem = PROBLEMS[name]
    clock = scripted({"fused 64x64x1": 0.5, "fused 64x32x1": 0.5, "fused 64x128x1": 0.5})
    found = measure(problem, "cpu", clock)
    assert found.kernel == "fused" and found.grid in ((64, 64, 1), (64, 32, 1), (64, 128, 1))
    assert (found.microseconds, found.library_us) == (0.5e6, 1e6)
    assert [graphs for _, graphs, _ in clock.asked] == [problem.numbers["captured"]] * 2
    assert all(held >= 2 for *_, held in clock.asked), "no cache holds the tensors"
    assert len(found.times) == len(WAYS[problem.op.name])


@pytest.mark.parametrize("change", [lambda y: y + 1, lambda y: y[:1], lambda y: y * float("nan")])
def test_a_way_that_is_wrong_is_not_timed_however_fast(native, change) -> None:
    native.broken["fused", (64, 64, 1)] = change
    clock = scripted({"fused 64x64x1": 0.01, "gemm_expand 64x0x1": 0.8})
    found = measure(PROBLEMS["linear"], "cpu", clock)
    assert (found.kernel, found.grid) == ("gemm_expand", (64, 0, 1))
    assert all("fused 64x64x1" not in timed for timed, *_ in clock.asked)
    assert isinstance(found.times["fused 64x64x1"], str)


def one_number_off(t):
    t = t.clone()
    t.view(-1)[-1] += 1
    return t


@pytest.mark.parametrize("change", [one_number_off, lambda t: t * 1.05])
@pytest.mark.parametrize("what", ["h", "y in training", "y in inference"])
def test_what_training_keeps_and_single_numbers_are_looked_at_too(native, what: str, change) -> None:
    native.broken["fused", (64, 64, 1)] = change
    native.breaks = {what[0]: (True, False) if " " not in what else (what.endswith("training"),)}
    found = measure(PROBLEMS["linear"], "cpu", scripted({"fused 64x64x1": 0.01}))
    assert found.kernel == LIBRARY[LINEAR.name] and found.times["fused 64x64x1"].startswith(f"{what[0]} has ")


def test_a_problem_for_which_memory_is_short_is_left_out_alone(native, monkeypatch) -> None:
    native.asked = {problem.key: problem.numbers for problem in PROBLEMS.values()}
    run = registration.Op.run_named

    def short(op, *given):
        if op is LINEAR:
            raise torch.OutOfMemoryError("tried to allocate 8 GiB")
        return run(op, *given)

    monkeypatch.setattr(registration.Op, "run_named", short)
    with (
        pytest.warns(UserWarning, match="a linear key is not measured on cpu: tried to allocate 8 GiB"),
        shrank.tune("cpu", clock=scripted({})) as done,
    ):
        pass
    others = {"a conv key", "a gated key", "a gated pivoted key", "a pivoted key"}
    assert {each.key for each in done} == others == {each.key for each in tuned.load("cpu")}


def test_a_way_that_does_not_run_is_left_out(native) -> None:
    def refuse(y):
        raise RuntimeError("out of resources")

    native.broken["fused", (64, 64, 1)] = refuse
    found = measure(PROBLEMS["linear"], "cpu", scripted({"fused 64x64x1": 0.01}))
    assert found.kernel == LIBRARY[LINEAR.name] and found.times["fused 64x64x1"] == "out of resources"


def test_a_way_that_ended_another_process_does_not_run_in_this_one(native) -> None:
    native.broken["fused", (64, 64, 1)] = lambda y: pytest.fail("it ran")
    ended = {("a linear key", "fused 64x64x1"): "its check ended with code -11", ("a conv key", "fused 32x64x2"): "no"}
    found = measure(PROBLEMS["linear"], "cpu", scripted({"fused 64x64x1": 0.01, "fused 32x64x2": 0.5}), ended)
    assert found.grid == (32, 64, 2) and found.times["fused 64x64x1"] == "its check ended with code -11"


@pytest.mark.parametrize("reached", [True, False])
def test_on_a_card_all_is_tried_in_another_process_first(native, monkeypatch, reached: bool) -> None:
    given, ended = [], {("a linear key", "fused 64x64x1"): "it ended"}

    def faults(problems, device):
        if not reached:
            raise NotMade("the card is busy")
        return ended

    monkeypatch.setattr(tuning, "faults", faults)
    monkeypatch.setattr(machine, "facts", lambda device: {"device": "a GPU", "torch": "any"})
    monkeypatch.setattr(
        tuning, "measure", lambda *each: given.append(each) or Measured("k", "two_gemms", (), 1, 1, "s")
    )
    with (
        pytest.warns(UserWarning, match="no other process reaches cuda:0 .the card is busy")
        if not reached
        else nullcontext()
    ):
        tuning._measure_new({"a linear key": LINEAR_PROBLEM}, "cuda:0", None, [])
    assert [each[3] for each in given] == [ended if reached else {}]


def test_where_pytorch_itself_is_wrong_nothing_is_chosen(native) -> None:
    native.broken["two_gemms_epilogue", ()] = lambda y: y + 1
    with pytest.raises(RuntimeError, match="nothing computes a linear key right on cpu: two_gemms_epilogue: "):
        measure(PROBLEMS["linear"], "cpu", scripted({}))


@pytest.mark.parametrize(
    ("ours", "spread", "wins"),
    [(0.9, 0.0, True), (0.97, 0.0, False), (0.9, 0.08, False), (0.7, 0.08, True), (1.2, 0.0, False)],
)
def test_ours_must_win_by_more_than_noise(native, ours: float, spread: float, wins: bool) -> None:
    found = measure(PROBLEMS["linear"], "cpu", scripted({"fused 64x64x1": ours}, spread))
    assert (found.kernel == "fused") == wins
    assert found.microseconds <= found.library_us


@pytest.fixture
def entry(native) -> Measured:
    return measure(PROBLEMS["linear"], "cpu", scripted({"fused 64x64x1": 0.5}))


def test_what_was_measured_is_kept_and_told(native, entry) -> None:
    tuned.keep("cpu", entry)
    assert tuned.load("cpu") == [entry]
    tuned.use("cpu")
    assert native.told == {entry.key: ("fused", (64, 64, 1), entry.microseconds, entry.library_us, entry.source)}


@pytest.mark.parametrize("other", [{"driver": "99"}, {"torch": "1.0"}, {"extension": "another"}, {"device": "a GPU"}])
def test_it_holds_for_one_build_torch_driver_and_device(entry, monkeypatch, other: dict) -> None:
    tuned.keep("cpu", entry)
    (path,) = (machine.folder("cpu") / "tuned").iterdir()
    text, about = path.read_text(), {**machine.facts("cpu"), **other}
    monkeypatch.setattr(machine, "facts", lambda device: about)
    moved = machine.folder("cpu") / "tuned" / path.name
    moved.parent.mkdir(parents=True)
    moved.write_text(text)
    assert tuned.load("cpu") == []


def test_no_damaged_file_is_believed(native, entry) -> None:
    """200 files: cut short, a bit turned, values of other kinds. None gives something that was not measured."""
    tuned.keep("cpu", entry)
    (path,) = (machine.folder("cpu") / "tuned").iterdir()
    good, chance = path.read_bytes(), random.Random(0)
    whole = json.loads(good)
    wrong = [None, -1, [], {}, True, "x", [1, 2], [1, 2, -3]]
    damaged = [{**whole, "facts": {**whole["facts"], name: value}} for name in whole["facts"] for value in wrong]
    damaged += [{**whole, name: value} for name in whole for value in wrong]
    damaged += [{key: value for key, value in whole.items() if key != name} for name in whole]
    texts = [json.dumps(each).encode() for each in (*damaged, *wrong) if each != whole]
    texts += [good[: chance.randrange(len(good) - 1)] for _ in range(60)]
    for _ in range(60):
        at = chance.randrange(len(good))
        texts.append(good[:at] + bytes([good[at] ^ 1 << chance.randrange(8)]) + good[at + 1 :])
    assert len(texts) >= 200
    for text in texts:
        path.write_bytes(text)
        assert tuned.load("cpu") in ([], [entry]), text
        assert tuned.load("cpu") == [] or json.loads(text) == whole, text


def test_whole_files_that_are_no_measurement_are_not_believed(entry) -> None:
    """As another version of shrank with the same kernels may have written them."""
    path, about, facts = (
        machine.folder("cpu") / "tuned" / "x.json",
        machine.facts("cpu"),
        json.loads(json.dumps(vars(entry))),
    )
    write_facts(path, about, facts)
    assert tuned.load("cpu") == [entry]
    wrong = {"key": [None, 1], "kernel": [None, []], "source": [3], "grid": [None, "64", [64.0], [True], [-1]]}
    wrong["microseconds"] = [None, "1", 0, -1.0, float("nan"), float("inf"), True, 2 * entry.library_us]
    wrong["library_us"] = [None, float("nan"), entry.microseconds / 2]
    wrong["times"] = [None, 3]
    changed = [{**facts, name: value} for name, values in wrong.items() for value in values]
    changed += [
        {name: value for name, value in facts.items() if name not in (lost, "times")}
        for lost in wrong
        if lost != "times"
    ]
    for each in [*changed, {**facts, "more": 1}, {}, [], None, "x", 1]:
        write_text_of(path, about, each)
        assert tuned.load("cpu") == [], each
    path.write_text("[" * 100_000)
    assert tuned.load("cpu") == []


def write_text_of(path, about: dict, facts: object) -> None:
    """As write_facts, whatever the facts are: with a digest that is right."""
    content = {"about": about, "facts": facts}
    path.write_text(json.dumps({**content, "digest": name_of(content)}))


def _keep(entry: Measured, times: int) -> None:
    for _ in range(times):
        tuned.keep("cpu", entry)


def test_writers_at_a_time_leave_whole_files(entry) -> None:
    others = [replace(entry, microseconds=float(i)) for i in range(1, 4)]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        done = pool.starmap_async(_keep, [(other, 40) for other in others])
        while not done.ready():
            for found in tuned.load("cpu"):
                assert found in others
        done.get()
    (found,) = tuned.load("cpu")
    assert found in others


def test_a_block_measures_what_was_asked_and_only_once(native) -> None:
    native.asked = {problem.key: problem.numbers for problem in PROBLEMS.values()}
    native.asked["unaligned"] = {**LINEAR_PROBLEM, "aligned": False}
    clock = scripted({"fused 64x64x1": 0.5, "fused 64x32x1": 0.5, "fused 64x128x1": 0.5})
    with shrank.tune("cpu", clock=clock) as done:
        assert native.noting and not done
    assert (
        not native.noting
        and {each.key for each in done} == {each.key for each in PROBLEMS.values()} == native.told.keys()
    )
    with shrank.tune("cpu", clock=clock) as again:
        pass
    assert again == [] and len(tuned.load("cpu")) == len(PROBLEMS)


def test_under_deterministic_algorithms_nothing_is_measured(native, monkeypatch) -> None:
    native.asked = {"a linear key": LINEAR_PROBLEM}
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.warns(UserWarning, match="deterministic algorithms are on"), shrank.tune("cpu", clock=None) as done:
        pass
    assert done == [] and not native.noting


@pytest.mark.parametrize("initialized", [False, True])
def test_a_whole_process_can_be_tuned_at_its_end(native, monkeypatch, initialized: bool) -> None:
    """SHRANK_TUNE=1; a process that never used CUDA asks it nothing at its end."""
    at_exit, measured = [], []
    native.asked = {"a linear key": LINEAR_PROBLEM}
    monkeypatch.setattr(tuning.atexit, "register", at_exit.append)
    monkeypatch.setattr(tuning, "_measure_new", lambda *given: measured.append(given[:2]))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    tuning.tune_this_process()
    assert native.noting and not measured
    (run,) = at_exit
    run()
    assert not native.noting and measured == [(native.asked, "cuda:1")] * initialized


def test_an_error_in_the_block_measures_nothing(native) -> None:
    native.asked = {"a linear key": LINEAR_PROBLEM}
    with pytest.raises(KeyError), shrank.tune("cpu", clock=None):
        raise KeyError("the model's own")
    assert not native.noting and tuned.load("cpu") == []


def test_at_the_end_of_processes_the_first_of_a_machine_measures(native, monkeypatch) -> None:
    measured = []
    native.asked = {"a linear key": LINEAR_PROBLEM}
    monkeypatch.setattr(tuning, "_measure_new", lambda *given: measured.append(given))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for rank in "10":
        monkeypatch.setenv("LOCAL_RANK", rank)
        tuning._measure_at_exit()
        assert len(measured) == (rank == "0")


def _one_of_two(native: Native, rank: int, folder, fails: bool, said) -> None:
    """A process of a group, on a machine of its own: with another cache, and another choice in it."""
    os.environ["SHRANK_CACHE"] = str(folder / str(rank))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    if rank:
        tuned.keep("cpu", Measured("another key", "two_gemms", (), 1.0, 1.0, "another day"))
    if fails:
        native.broken["two_gemms_epilogue", ()] = lambda y: y + 1
    native.asked = {"a linear key": LINEAR_PROBLEM} if rank == 0 else {}
    error, done = "", []
    try:
        with shrank.tune("cpu", clock=scripted({"fused 64x64x1": 0.5})) as done:
            pass
    except RuntimeError as raised:
        error = str(raised)
    said.put((rank, error, len(done), sorted(native.told), sorted(each.key for each in tuned.load("cpu"))))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fails", [False, True])
def test_of_several_processes_one_measures_and_all_choose_alike(native, tmp_path, fails: bool) -> None:
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    group = [context.Process(target=_one_of_two, args=(native, rank, tmp_path, fails, said)) for rank in range(2)]
    for process in group:
        process.start()
    first, second = sorted(said.get(timeout=60) for _ in group)
    for process in group:
        process.join(60)
    key = "a linear key"
    if fails:
        assert first[1].startswith(f"nothing computes {key}") and second[1].startswith("the first process of the group")
    else:
        assert first == (0, "", 1, [key], [key])
        assert second == (1, "", 0, [key], sorted([key, "another key"])), "it chooses by what the first knows"


def test_without_a_gpu_and_without_the_extension_it_says_so(monkeypatch) -> None:
    with pytest.raises(RuntimeError, match="there is none here"), shrank.tune():
        pass


def test_tables_that_come_with_shrank_are_whole() -> None:
    for path in tuned.SHIPPED.glob("*.json"):
        listed = json.loads(path.read_text())["measured"]
        assert listed and len(tuned.shipped(path.stem.replace("_", " "))) == len(listed), path


def test_a_table_of_the_card_comes_before_what_was_measured_here(native, entry, monkeypatch, tmp_path) -> None:
    shipped = replace(entry, kernel="gemm_expand", grid=(64, 0, 1))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "tables")
    tuned.SHIPPED.mkdir()
    table = {"about": {"driver": "any"}, "measured": [{**vars(shipped), "grid": list(shipped.grid)}]}
    (tuned.SHIPPED / "cpu.json").write_text(json.dumps(table))
    assert tuned.load("cpu") == [shipped]
    tuned.keep("cpu", entry)
    tuned.use("cpu")
    assert native.told[entry.key][0] == "fused"
