"""The kernels are checked on a card before they are used there: what is noticed, kept, told, and believed.

In the process that loads the C++ library with its kernels emulated, the emulator is the card.
"""

from __future__ import annotations

import json
import random
import subprocess
import warnings

import pytest
import torch

import shrank
from shrank.ops import (
    apart,
    availability,
    check_apart,
    machine,
    multi,
    pivoted_reference,
    probes,
    reference,
    registration,
    self_check,
)
from shrank.ops.conv import CONV
from shrank.ops.gated import GATED
from shrank.ops.linear import LINEAR
from shrank.ops.pivoted import PIVOTED
from shrank.ops.probes import (
    PROBES,
    BackwardProbe,
    GatedBackwardProbe,
    MultiProbe,
    PivotedBackwardProbe,
    PivotedProbe,
    Truth,
    check,
)
from shrank.ops.reference import End, Forward, GatedEnd
from shrank.ops.self_check import check_and_keep, file_of, kept, why_not

HALVES = (torch.bfloat16, torch.float16)
NAMES = [probe.name(dtype) for probe in PROBES for dtype in probe.dtypes]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path) -> None:
    """Nothing is known, in this process or on disk."""
    monkeypatch.setenv("SHRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(self_check, "_not_made", {})
    monkeypatch.setattr(self_check, "_told", set())


@pytest.fixture
def named(monkeypatch):
    """Every kernel computes as PyTorch does; a change by name may be made of its answer."""
    changes = {}

    def run(op, given, kernel, grid=(), training=False):
        found = op.forward(*op.packed(given))
        return changes.get((op.name, kernel), lambda all_: all_)(found)

    def run_backward(given, kernel, grid=()):
        return changes.get(("backward", kernel), lambda all_: all_)(reference.expand_backward(*given))

    monkeypatch.setattr(registration.Op, "run_named", run)

    def run_gated_backward(given, kernel, grid=()):
        return changes.get(("gated backward", kernel), lambda all_: all_)(reference.gated_backward(*given))

    def run_pivoted_backward(given, kernel, grid=()):
        return changes.get(("pivoted backward", kernel), lambda all_: all_)(pivoted_reference.pivoted_backward(*given))

    monkeypatch.setattr(probes, "run_named", run_backward)
    monkeypatch.setattr(probes, "run_gated_named", run_gated_backward)
    monkeypatch.setattr(probes, "run_pivoted_named", run_pivoted_backward)

    def run_together(given, tokens, splits):
        found = [op.y_of(*op.packed(layer)) for op, layer in multi.alone(*given)]
        return changes.get((multi.NAME, "shrink_expand"), lambda all_: all_)(found)

    monkeypatch.setattr(probes, "run_together", run_together)
    return changes


def test_right_kernels_pass(named) -> None:
    found = dict(check("cpu"))
    assert list(found) == NAMES and not any(found.values())


def test_every_family_and_every_end_is_looked_at() -> None:
    others = BackwardProbe | GatedBackwardProbe | PivotedBackwardProbe | MultiProbe
    forward = [probe for probe in PROBES if not isinstance(probe, others)]
    kernels = {(probe.op.name, probe.kernel, bool(probe.grid)) for probe in forward}
    for name in (LINEAR.name, GATED.name, PIVOTED.name):
        assert {"shrink_expand", "fused", "gemm_expand", "two_gemms_epilogue"} == {
            k for op, k, _ in kernels if op == name
        }
        assert (name, "gemm_expand", True) in kernels, "h is streamed only where that is asked for"
    assert {"fused", "conv_expand", "two_convs_epilogue"} == {k for op, k, _ in kernels if op == CONV.name}
    for probe in forward:
        tensors, between, residual = probe.op.parts(probe.arguments(torch.float32, "cpu"))
        missing = {name for name, each in zip(probe.op.names, (*tensors, *residual), strict=True) if each is None}
        of_pivots = {"gate_pivot_bias", "gate_order", "pivot_bias", "order"}
        without = probe.op is GATED and not probe.pivoted
        assert between[-1] != "none" and missing == (of_pivots if without else set())
        downs = [each for name, each in zip(probe.op.names, tensors, strict=False) if name.endswith("down")]
        if probe.op is not PIVOTED:  # its whole panels are an end of their own
            assert all(down.size(0) % 64 for down in downs), "ranks are smaller than any tile's"
        assert torch.isfinite(Truth(probe.op.by_pytorch, probe.arguments(torch.float32, "cpu")).plain.y).all()


@pytest.mark.parametrize("what", Forward._fields)
@pytest.mark.parametrize("change", [lambda t: t * 1.05, lambda t: t.clone().fill_(float("nan")), lambda t: t[:1]])
def test_a_wrong_answer_is_named(named, what: str, change) -> None:
    named[LINEAR.name, "gemm_expand"] = lambda found: found._replace(**{what: change(getattr(found, what))})
    wrong = {name: reason for name, reason in check("cpu") if reason}
    assert {" ".join(name.split()[:2]) for name in wrong} == {f"{LINEAR.name} expand"}
    assert all(reason.startswith(f"{what} has ") for reason in wrong.values())


@pytest.mark.parametrize("what", End._fields)
def test_a_wrong_gradient_forbids_both_ops(named, what: str) -> None:
    named["backward", "fused"] = lambda found: found._replace(**{what: getattr(found, what) * 1.05})
    wrong = {name: reason for name, reason in check("cpu") if reason}
    assert {" ".join(name.split()[:2]) for name in wrong} == {f"{op.name} backward" for op in (LINEAR, CONV)}
    assert all(reason.startswith(f"{what} has ") for reason in wrong.values())


@pytest.mark.parametrize("what", GatedEnd._fields)
def test_a_wrong_gradient_of_a_gate_forbids_its_op(named, what: str) -> None:
    named["gated backward", "fused"] = lambda found: found._replace(**{what: getattr(found, what) * 1.05})
    wrong = {name: reason for name, reason in check("cpu") if reason}
    assert {" ".join(name.split()[:2]) for name in wrong} == {f"{GATED.name} backward"}
    assert all(reason.startswith(f"{what} has ") for reason in wrong.values())


def test_pivots_of_every_kind_are_looked_at_by_every_kernel() -> None:
    """Fewer than a panel, more than one, all outputs; anywhere, and the first."""
    forward = [probe for probe in PROBES if type(probe) is PivotedProbe]
    for kernel in ("shrink_expand", "fused", "gemm_expand"):
        of_kernel = [probe for probe in forward if probe.kernel == kernel]
        ranks = {(probe.sizes[1][0] > 64, probe.sizes[2][0] == 0) for probe in of_kernel if probe.sizes[1][0] % 64}
        assert {(False, False), (True, False), (True, True)} <= ranks
        assert {probe.first for probe in of_kernel} == {False, True}
    for probe in (each for each in PROBES if isinstance(each, PivotedProbe)):
        *_, order, _, _ = probe.arguments(torch.float32, "cpu")
        places = torch.arange(len(order))
        assert order.dtype == torch.int32 and torch.equal(order.long().sort().values, places)
        assert torch.equal(order, places) == probe.first


@pytest.mark.parametrize("what", End._fields)
def test_a_wrong_gradient_of_pivots_forbids_their_op(named, what: str) -> None:
    named["pivoted backward", "fused"] = lambda found: found._replace(**{what: getattr(found, what) * 1.05})
    wrong = {name: reason for name, reason in check("cpu") if reason}
    assert {" ".join(name.split()[:2]) for name in wrong} == {f"{PIVOTED.name} backward"}
    assert all(reason.startswith(f"{what} has ") for reason in wrong.values())


def test_two_outputs_in_each_others_places_are_noticed(named) -> None:
    def change(found: Forward) -> Forward:
        return found._replace(y=torch.cat((found.y[:, 1:2], found.y[:, :1], found.y[:, 2:]), 1))

    named[PIVOTED.name, "fused"] = change
    wrong = [name for name, reason in check("cpu") if reason]
    assert wrong == [name for name in NAMES if name.startswith(f"{PIVOTED.name} fused")]


def test_one_wrong_layer_of_several_forbids_their_op(named) -> None:
    named[multi.NAME, "shrink_expand"] = lambda found: [*found[:2], found[2] * 1.05]
    wrong = {name: reason for name, reason in check("cpu") if reason}
    assert {name.split()[0] for name in wrong} == {multi.NAME}
    assert all(reason.startswith("third has ") for reason in wrong.values())


def test_one_wrong_number_of_a_tail_is_noticed(named) -> None:
    def change(found: Forward) -> Forward:
        y = found.y.clone()
        y[-1, -1] += 1
        return found._replace(y=y)

    named[LINEAR.name, "fused"] = change
    assert len([name for name, reason in check("cpu") if reason]) == len(HALVES)


def test_a_kernel_that_does_not_run_is_named(named) -> None:
    def refuse(found: Forward) -> Forward:
        raise RuntimeError("no image")

    named[CONV.name, "conv_expand"] = refuse
    assert {reason for _, reason in check("cpu")} == {"", "it does not run: no image"}


def test_what_was_found_is_kept_and_believed_only_where_it_holds(named, monkeypatch) -> None:
    assert kept("cpu") is None
    assert check_and_keep("cpu") == kept("cpu")
    for other in ({"driver": "99"}, {"torch": "1.0"}, {"extension": "another"}):
        with monkeypatch.context() as patch:
            about = {**machine.facts("cpu"), **other}
            patch.setattr(machine, "facts", lambda device, about=about: about)
            assert kept("cpu") is None


def test_no_damaged_file_is_believed(named) -> None:
    check_and_keep("cpu")
    good, chance = file_of("cpu").read_bytes(), random.Random(0)
    whole = json.loads(good)
    changed = [
        {**whole, "facts": {}},
        {**whole, "facts": {**whole["facts"], NAMES[0]: None}},
        {**whole, "facts": {**whole["facts"], "another": ""}},
        {**whole, "about": {}},
        [],
        None,
    ]
    texts = [json.dumps(each).encode() for each in changed]
    texts += [good[: chance.randrange(len(good) - 1)] for _ in range(100)]
    for _ in range(100):
        at = chance.randrange(len(good))
        texts.append(good[:at] + bytes([good[at] ^ 1 << chance.randrange(8)]) + good[at + 1 :])
    for text in texts:
        file_of("cpu").write_bytes(text)
        assert kept("cpu") is None or json.loads(text) == whole, text


def test_a_reason_keeps_one_dtype_of_one_op_from_its_kernels(named, monkeypatch) -> None:
    named[LINEAR.name, "fused"] = lambda found: (
        found._replace(y=found.y + 1) if found.y.dtype == torch.float16 else found
    )
    check_and_keep("cpu")
    with pytest.warns(UserWarning, match="fused float16.*Please report it") as told:
        reasons = why_not(LINEAR.name, "cpu", torch.float16)
        again = why_not(LINEAR.name, "cpu", torch.float16)
    assert (
        len(told) == 1
        and reasons == again
        and reasons[0].startswith("found wrong on cpu: low_rank_linear fused float16: y has ")
    )
    with warnings.catch_warnings(action="error"):
        assert why_not(LINEAR.name, "cpu", torch.bfloat16) == why_not(CONV.name, "cpu", torch.float16) == ()
    monkeypatch.setenv("SHRANK_SELF_CHECK", "0")
    assert why_not(LINEAR.name, "cpu", torch.float16) == ()


def test_a_found_fault_means_pytorch_and_an_error_where_kernels_are_insisted_on(named, monkeypatch) -> None:
    named[LINEAR.name, "fused"] = lambda found: found._replace(y=found.y + 1)
    check_and_keep("cpu")
    monkeypatch.setattr(availability, "is_on_cuda", lambda _: True)
    monkeypatch.setattr(availability, "why_not_here", tuple)
    monkeypatch.setattr(availability, "why_not_these", lambda *_: [])
    monkeypatch.setattr(torch.ops.shrank, "low_rank_linear", None, raising=False)
    x, down, up = (torch.randn(8, 8, dtype=torch.bfloat16) for _ in range(3))
    with pytest.warns(UserWarning, match="PyTorch computes instead"):
        assert torch.equal(shrank.low_rank_linear(x, down, up), torch.nn.functional.linear(x @ down.T, up))
    with pytest.raises(
        RuntimeError, match=r"backend is native.*\n- found wrong on cpu: low_rank_linear fused bfloat16: y"
    ):
        shrank.low_rank_linear(x, down, up, backend="native")


def ends(code: int, said: list[object], error: str):
    """A process that prints these values and then ends; `asked` has its command lines."""

    def run(command, **_):
        run.asked.append(command)
        out = "".join(f"{json.dumps(value)}\n" for value in said)
        return subprocess.CompletedProcess(command, code, out.encode(), error.encode())

    run.asked = []
    return run


def test_the_first_check_happens_in_a_process_of_its_own_whose_end_is_an_answer(monkeypatch) -> None:
    """Of the kernel that ended it, and of those that it kept from running; the others have their own."""
    before = [[name, ""] for name in NAMES[:2]]
    dies = ends(-11, ["a library greets", apart.BEGINS, *before], "one\nillegal memory access\n")
    monkeypatch.setattr(subprocess, "run", dies)
    with pytest.warns(UserWarning, match="its check ended with code -11: illegal memory access"):
        reasons = why_not(LINEAR.name, "cpu", torch.bfloat16)
    assert reasons and dies.asked[0][-1] == "cpu" and "shrank.ops.check_apart" in dies.asked[0][2]
    found = kept("cpu")
    assert [found[name] for name in NAMES[:3]] == ["", "", "its check ended with code -11: illegal memory access"]
    assert all(
        found[name].startswith(f"not reached: the check of {NAMES[2]} ended with code -11") for name in NAMES[3:]
    )
    with pytest.warns(UserWarning, match="not reached"):
        assert why_not(CONV.name, "cpu", torch.bfloat16) and len(dies.asked) == 1


FAULT = "torch.AcceleratorError: CUDA error: misaligned address"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Traceback:\n" + FAULT + "\nCompile with DSA.\n", FAULT),
        ("greets\nFatal Python error: Segmentation fault", "Fatal Python error: Segmentation fault"),
        ("", "it said nothing"),
    ],
)
def test_of_all_that_a_process_wrote_its_error_is_told(monkeypatch, text: str, reason: str) -> None:
    monkeypatch.setattr(subprocess, "run", ends(1, [apart.BEGINS], text))
    assert check_apart.checked_apart("cpu")[NAMES[0]] == f"its check ended with code 1: {reason}"


def test_a_kernel_that_hangs_is_wrong(monkeypatch) -> None:
    def hangs(command, **_):
        raise subprocess.TimeoutExpired(command, 1, output=f"{json.dumps(apart.BEGINS)}\n".encode())

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.warns(UserWarning, match="its check took longer than 300 s"):
        assert why_not(LINEAR.name, "cpu", torch.bfloat16)
    assert kept("cpu")[NAMES[0]] == "its check took longer than 300 s"


def fails(error: Exception):
    def run(command, **_):
        raise error

    return run


NO_FAULT_OF_THE_KERNELS = {
    "no interpreter": (fails(FileNotFoundError(2, "No such file")), "could not be started: .*No such file"),
    "never reached the card": (fails(subprocess.TimeoutExpired("python", 1)), "took longer than 300 s"),
    "card in use": (ends(1, [], "CUDA-capable device(s) is/are busy"), r"ended with code 1: CUDA-capable device\(s\)"),
    "memory": (ends(1, [apart.BEGINS], f"{apart.SHORT_OF_MEMORY}: 8 KiB"), "was short of memory: 8 KiB"),
    "results before it begins": (ends(1, [[NAMES[0], "wrong"]], "boom"), "ended with code 1: boom"),
}


@pytest.mark.parametrize("name", NO_FAULT_OF_THE_KERNELS)
def test_a_check_that_was_not_made_says_nothing_to_other_processes(named, monkeypatch, name: str) -> None:
    run, said = NO_FAULT_OF_THE_KERNELS[name]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        with pytest.warns(UserWarning, match=f"not checked on cpu: its check {said}") as told:
            reasons = why_not(LINEAR.name, "cpu", torch.bfloat16)
            assert reasons == why_not(CONV.name, "cpu", torch.float16) and len(told) == 1
        with pytest.raises(apart.NotMade, match=said):
            check_apart.checked_apart("cpu")
    assert kept("cpu") is None and not self_check._known
    monkeypatch.setattr(self_check, "_not_made", {})  # another process
    check_and_keep("cpu")
    assert why_not(LINEAR.name, "cpu", torch.bfloat16) == ()


def test_a_check_made_again_replaces_one_that_was_not_made(named, monkeypatch) -> None:
    monkeypatch.setattr(availability, "why_not_here", tuple)
    monkeypatch.setattr(subprocess, "run", fails(FileNotFoundError(2, "No such file")))
    with pytest.warns(UserWarning, match="tries again"):
        assert why_not(LINEAR.name, "cpu", torch.bfloat16)
    results = [[name, ""] for name in NAMES]
    monkeypatch.setattr(subprocess, "run", ends(0, [apart.BEGINS, *results], ""))
    assert not any(self_check.check_again("cpu").values())
    assert why_not(LINEAR.name, "cpu", torch.bfloat16) == ()


def test_a_check_made_again_replaces_one_that_found_all_right(named, monkeypatch) -> None:
    check_and_keep("cpu")
    assert why_not(LINEAR.name, "cpu", torch.bfloat16) == () == why_not(LINEAR.name, "cpu", torch.bfloat16)
    monkeypatch.setattr(availability, "why_not_here", tuple)
    monkeypatch.setattr(subprocess, "run", ends(0, [apart.BEGINS, *([name, "y has NaN"] for name in NAMES)], ""))
    self_check.check_again("cpu")
    with pytest.warns(UserWarning, match="y has NaN"):
        assert why_not(LINEAR.name, "cpu", torch.bfloat16)


def test_a_folder_that_cannot_be_written_stops_no_model(monkeypatch, tmp_path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("SHRANK_CACHE", str(in_the_way / "below"))
    monkeypatch.setattr(subprocess, "run", ends(0, [apart.BEGINS, *([name, ""] for name in NAMES)], ""))
    with pytest.warns(UserWarning, match="cannot be kept .*SHRANK_CACHE names another folder") as told:
        assert why_not(LINEAR.name, "cpu", torch.bfloat16) == why_not(CONV.name, "cpu", torch.float16) == ()
    assert len(told) == 1


def test_short_of_memory_is_no_fault_of_a_kernel(named, monkeypatch, capsys) -> None:
    def short(found: Forward) -> Forward:
        raise torch.OutOfMemoryError("tried to allocate 8 KiB")

    named[LINEAR.name, "gemm_expand"] = short
    with pytest.raises(SystemExit, match="short of memory: tried to allocate"):
        check_apart.answer("cpu")
    first = next(i for i, name in enumerate(NAMES) if name.startswith(f"{LINEAR.name} expand "))
    assert list(check_apart.results_of(apart.heard(capsys.readouterr().out))) == NAMES[:first]


def test_a_process_of_its_own_answers_for_every_probe(named, capsys) -> None:
    named[LINEAR.name, "fused"] = lambda found: found._replace(y=found.y + 1)
    check_apart.answer("cpu")
    results = check_apart.results_of(apart.heard("a line\n" + capsys.readouterr().out + '["low_rank'))
    assert list(results) == NAMES and [name for name in NAMES if results[name]] == [
        name for name in NAMES if name.startswith(f"{LINEAR.name} fused ")
    ]


def test_without_native_code_that_process_says_so() -> None:
    results = check_apart.checked_apart("cpu")
    if hasattr(torch.ops.shrank, "low_rank_linear_as") and availability.native.LIBRARY.exists():
        assert results.keys() == set(NAMES)  # the extension has no kernels for a CPU
    assert all("does not run" in reason for reason in results.values())


def test_a_graph_that_is_being_recorded_is_not_disturbed(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(machine, "facts", lambda device: {"device": device})
    monkeypatch.setattr(check_apart, "checked_apart", None)
    assert why_not(LINEAR.name, "cuda:0", torch.bfloat16) == (
        "the kernels were not checked on this card yet, and a CUDA graph is being recorded",
    )
    assert not self_check._known


def test_it_is_a_constant_of_compiled_code(named, monkeypatch) -> None:
    check_and_keep("cpu")
    monkeypatch.setattr(availability, "is_on_cuda", lambda _: True)
    monkeypatch.setattr(availability, "why_not_here", tuple)
    monkeypatch.setattr(availability, "why_not_these", lambda *_: [])
    x, down, up = (torch.randn(8, 8) for _ in range(3))
    whole = torch.compile(lambda x: shrank.low_rank_linear(x, down, up), fullgraph=True, backend="eager")
    assert torch.equal(whole(x), torch.nn.functional.linear(x @ down.T, up))


@pytest.mark.parametrize("answer", ["", "no kernel image is available for execution on the device"])
def test_a_card_for_which_there_is_no_code_is_a_reason(monkeypatch, answer: str) -> None:
    """As of compute capability 11.0, where the extension was built for others alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Thor")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (11, 0))
    monkeypatch.setattr(torch.ops.shrank, "why_no_image", lambda device: answer, raising=False)
    monkeypatch.setattr(availability.native, "build_info", lambda: {"archs": "8.0, 9.0a"})
    found = availability._find_no_image.__wrapped__(0)
    assert bool(found) == bool(answer)
    if answer:
        assert found.startswith("NVIDIA Thor of compute capability 11.0, for which the native extension has no code")
        assert answer in found and found.endswith("it was built for 8.0, 9.0a")
