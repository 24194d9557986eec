"""Compression by two processes: the same as by one."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import shrank
from shrank import Budget, Calibrate, auto_fact
from shrank.cli.app import app
from shrank.saving.transformers_folder import load_model
from shrank.util.processes import PeerFailed, Processes, current
from tests.common.models import WIDTH, Mixed, draw, hf_model, mlp, seeded, tokens
from tests.common.processes import in_processes
from tests.common.tolerances import assert_close
from tests.common.units import image_model, images, inverted, normed

_BATCHES = 5  # an odd number: the shares differ


class Routed(nn.Module):
    """Two layers, of which every row of a batch sees one: some batches have rows for one only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, first: bool) -> Tensor:
        return self.head(torch.tanh((self.one if first else self.other)(x)))


def texts() -> list[dict[str, Tensor]]:
    ids, mask = tokens(_BATCHES * 2, 9), torch.ones(_BATCHES * 2, 9, dtype=torch.long)
    mask[1::2, 7:] = 0
    return [{"input_ids": ids[2 * i : 2 * i + 2], "attention_mask": mask[2 * i : 2 * i + 2]} for i in range(_BATCHES)]


def routed() -> list[tuple[Tensor, bool]]:
    return [(x, i in (0, 2)) for i, x in enumerate(draw(_BATCHES * 40, WIDTH).chunk(_BATCHES))]


CASES = {
    "plain": (partial(hf_model, "llama"), lambda: {"rank": 0.5}),
    "energy": (mlp, lambda: {"rank": shrank.Energy(0.5), "errors": True}),
    "budget": (
        partial(hf_model, "llama"),
        lambda: {
            "rank": Budget(keep_params=0.6, overrides={"*q_proj": shrank.Energy(0.8)}),
            "calibrate": Calibrate(texts(), loss="lm", max_memory=1 << 16),
        },
    ),
    "convolutions": (
        lambda: seeded(Mixed),
        lambda: {"rank": 0.5, "calibrate": list(draw(6, 16, 8, 8).split(2)), "allow_slower": True},
    ),
    "experts": (lambda: seeded(Routed), lambda: {"rank": 0.5, "calibrate": routed()}),
    "anchored": (partial(hf_model, "llama"), lambda: {"rank": 0.5, "calibrate": texts(), "anchored": True}),
    "narrowed": (
        partial(hf_model, "llama"),
        lambda: {"rank": 0.5, "calibrate": texts(), "narrow": "uniform", "pivot": False},
    ),
    "narrowed channels": (
        lambda: image_model(inverted, normed),
        lambda: {
            "rank": Budget(keep_params=0.4, overrides={"7": 2}),
            "calibrate": images(_BATCHES),
            "narrow": True,
            "min_features": 4,
        },
    ),
    "bisected": (mlp, lambda: {"rank": Budget(eval_fn=_quality, tolerated_drop=0.5), "calibrate": _rows()}),
}


def _rows() -> list[Tensor]:
    return list(draw(96, WIDTH).split(32))


def _quality(model: nn.Module) -> float:
    """Another in another process, which must not tear them apart."""
    x = draw(8, WIDTH)
    return -(model(x) - mlp()(x)).norm().item() / 8 - current().rank


def compressed(name: str) -> nn.Module:
    build, options = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens
        return auto_fact(build(), **options())


def _all_cases(rank: int) -> dict[str, tuple[dict, dict]]:
    with shrank.across_processes() as here:
        found = shrank.calibrate(hf_model("llama"), texts())
        folders = here.exchange(str(found.folder))
        links = {file.stat().st_nlink for file in found.folder.glob("*.safetensors")}
        assert links == {2} and len(set(folders)) == 2  # one file, which either may outlive the other's folder
        assert (here.rank, here.size) == (rank, 2) and current() is here
        made = {name: compressed(name) for name in CASES}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few tokens
            how = shrank.Anchored(steps=8, learning_rate=1e-3)
            made["trained"] = auto_fact(hf_model("llama"), 0.5, calibrate=texts(), anchored=how)
    assert current().size == 1
    return {name: (model.shrank_plan.to_dict(), model.state_dict()) for name, model in made.items()}


def test_two_processes_make_what_one_makes(tmp_path) -> None:
    first, second = in_processes(_all_cases, folder=tmp_path)
    assert isinstance(first, dict), first
    (plan, state), (other_plan, other_state) = first["trained"], second["trained"]  # on batches of its own each
    assert plan == other_plan and all(torch.equal(state[n], other_state[n]) for n in state)
    assert any("on held-out data" in x["reason"] for x in plan["layers"])
    for name in CASES:
        (plan, state), (other_plan, other_state) = first[name], second[name]
        assert plan == other_plan and state.keys() == other_state.keys()
        assert all(torch.equal(state[n], other_state[n]) for n in state), name
        alone = compressed(name)
        ranks = {x.fqn: x.rank for x in alone.shrank_plan}
        assert ranks == {x["fqn"]: x["rank"] for x in plan["layers"]} and any(ranks.values()), name
        together = compressed(name)
        together.load_state_dict(state)
        for layer in shrank.describe(alone):
            found = [model.get_submodule(layer.fqn) for model in (together, alone)]
            assert_close(*(m.weight.detach() if layer.rank is None else m.dense_weight().detach() for m in found))


def _failures(rank: int) -> list[str]:
    """What each process raises, case by case; together they go on afterwards."""
    poisoned = _rows()
    poisoned[1] = poisoned[1] * torch.nan  # of the share of process 1
    other_plan = shrank.make_plan(mlp(), 8 + rank)
    wrong = lambda output, batch: output.sum() if rank else output  # noqa: E731 (process 0 gives no scalar)
    return [
        _raised(lambda: auto_fact(mlp(), 8, calibrate=poisoned)),
        _raised(lambda: auto_fact(mlp(), 8, calibrate=_rows()[rank:])),
        _raised(lambda: auto_fact(mlp(), 8, calibrate=Calibrate(_rows(), loss=wrong))),
        _raised(lambda: shrank.apply(mlp(), other_plan)),
        _raised(lambda: auto_fact(seeded(lambda: nn.Linear(WIDTH, WIDTH + rank)), 8)),
        _raised(lambda: _without_memory(rank)),
        _raised(lambda: shrank.calibrate(mlp(), _rows(), layers=["0", "2"][: 1 + rank])),
    ]


def _without_memory(rank: int) -> None:
    """One process fails between two tensors that are sent."""
    here = current()
    here.summed(torch.ones(3))
    if rank:
        raise torch.OutOfMemoryError("no memory left")
    here.sent(1, torch.ones(3))


def _raised(call: Callable) -> str:
    try:
        with shrank.across_processes():
            call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _killed(rank: int) -> str:
    with pytest.raises(PeerFailed, match="lost another process, which may have been killed"), shrank.across_processes():
        auto_fact(mlp(), 8)
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
        auto_fact(mlp(), 8)
    return "was told"


def _unasked(rank: int) -> bool:
    """Outside of the block nothing is shared, whatever torch.distributed is for: other data, other layers."""
    torch.manual_seed(rank)
    model = auto_fact(mlp(1 + rank), 8, calibrate=[torch.randn(40, WIDTH)])
    return len(shrank.describe(model)) == 1 + rank


def test_what_goes_wrong_in_one_process_ends_all(tmp_path) -> None:
    first, second = in_processes(_failures, folder=tmp_path)
    assert isinstance(first, list) and isinstance(second, list), (first, second)
    told = "was not given the {} that process 0 was: all must be given the same"
    assert second[0] == "ValueError: batch 1: 0 has NaN or infinity in its inputs"
    assert first[0] == f"PeerFailed: process 1 of 2 failed: {second[0].removeprefix('ValueError: ')}"
    assert told.format("data") in first[1] and first[1] == second[1]
    assert first[2].startswith("TypeError: loss must return a scalar tensor")
    assert second[2] == f"PeerFailed: process 0 of 2 failed: {first[2].removeprefix('TypeError: ')}"
    assert second[5] == "OutOfMemoryError: no memory left"
    assert first[5] == "PeerFailed: process 1 of 2 failed: no memory left"
    for number, what in ((3, "plan"), (4, "model"), (6, "layers and the loss to calibrate")):
        assert told.format(what) in first[number] and first[number] == second[number]
    first, second = in_processes(_killed, folder=tmp_path)
    assert first == "was told" and "exit code -9" in second
    assert in_processes(_unasked, folder=tmp_path) == [True, True]


def test_the_block_needs_processes() -> None:
    with pytest.raises(RuntimeError, match=r"is not initialised: call torch\.distributed\.init_process_group\(\)"):
        shrank.across_processes()


def test_work_is_dealt_by_its_cost() -> None:
    here = Processes()
    here.size = 3
    costs = [1.0, 7.0, 2.0, 2.0, 3.0, 6.0, 0.0, 0.0]
    owners = here.owners(costs)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
    assert sorted(loads) == [7.0, 7.0, 7.0]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("localhost", 0))
        return [probe.getsockname()[1] for probe in probes]


def _commands(rank: int, ports: list[int], commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit codes and what was printed, as under torchrun, which takes a port for every command: at the port of the last
    one, a process that is quicker finds the store that the other still has, with addresses that no longer answer."""
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}
    found = []
    for port, arguments in zip(ports, commands, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            app(arguments)
        found.append((ended.value.code, out.getvalue(), err.getvalue()))
    return found


def test_torchrun_of_the_command_line(model_folder, data_folder, tmp_path) -> None:
    source, texts = str(model_folder("gpt2")), str(data_folder / "texts.txt")
    options = ["--keep", "0.6", "--calibrate", texts, "--max-length", "10", "--batch-size", "2"]
    small = str(tmp_path / "two")
    how = ["--steps", "4", "--accumulate", "2", "--bf16", "--recompute", "--logits", str(tmp_path / "logits")]
    commands = [
        ["compress", source, *options, "--out", small, "--report", str(tmp_path / "page.html")],
        ["plan", source, *options, "--save", str(tmp_path / "plan.json")],
        ["compress", source, "--keep", "0.6", "--calibrate", "absent.txt", "--out", str(tmp_path / "none")],
        ["merge", small, "--out", str(tmp_path / "none")],
        ["heal", small, source, "--text", texts, *options[4:], *how, "--out", str(tmp_path / "healed"), "--json"],
    ]
    first, second = in_processes(_commands, _free_ports(len(commands)), commands, folder=tmp_path, joined=False)
    assert isinstance(first, list), first
    assert [code for code, *_ in first] == [code for code, *_ in second] == [0, 0, 1, 2, 0]
    assert all(not out + err for _, out, err in second)
    assert "wrote" in first[0][1] and "absent.txt" in first[2][2]
    assert "this command runs in one process, and torchrun started 2" in first[3][2]
    assert not (tmp_path / "none").exists()
    figures = json.loads(first[4][1])
    assert [step for step, _ in figures["curve"]] == [0, 4]
    assert len(list((tmp_path / "logits").glob("*.safetensors"))) == 10
    assert (tmp_path / "healed" / "config.json").exists() and (tmp_path / "page.html").exists()
    alone = CliRunner().invoke(app, ["compress", source, *options, "--out", str(tmp_path / "one")])
    assert alone.exit_code == 0
    plans = [shrank.describe(load_model(str(tmp_path / name))) for name in ("one", "two")]
    assert plans[0] == plans[1] and plans[0].low_rank
    assert [x.rank for x in shrank.RankPlan.load(tmp_path / "plan.json").low_rank] == [x.rank for x in plans[0]]
