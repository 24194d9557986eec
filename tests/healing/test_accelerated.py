"""Healing with an Accelerator, by two processes, and with teachers that are put away, sharded or recorded."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

import shrank
from shrank import HealOptions, RecordedLogits, auto_fact, heal, record_logits
from shrank.calibration.batches import as_batches, bound
from shrank.healing import recorded as recording
from shrank.healing.distance import distance, masking_of_blocks
from shrank.healing.run import Run
from shrank.util.processes import PeerFailed
from tests.common.models import VOCAB, hf_model, mlp, tokens
from tests.common.processes import in_processes
from tests.common.tolerances import assert_close

LLAMA = partial(hf_model, "llama")
OPTIONS = HealOptions(evaluate_every=4)


def texts(count: int = 9) -> list[dict[str, torch.Tensor]]:
    ids, mask = tokens(count * 2, 9), torch.ones(count * 2, 9, dtype=torch.long)
    mask[1::2, 6:] = 0
    return [{"input_ids": ids[2 * i : 2 * i + 2], "attention_mask": mask[2 * i : 2 * i + 2]} for i in range(count)]


def student_of(teacher: nn.Module) -> nn.Module:
    return auto_fact(copy.deepcopy(teacher), 4)


def healed(teacher: nn.Module | RecordedLogits | None = None, student: nn.Module | None = None, **given) -> nn.Module:
    teacher = LLAMA() if teacher is None else teacher
    student = student_of(LLAMA()) if student is None else student
    arguments = {"steps": 8, "learning_rate": 1e-2, "options": OPTIONS} | given
    return heal(student, teacher, texts(), **arguments)


def told(model: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    return [loss for _, loss in model.shrank_healing.curve], model.state_dict()


def assert_alike(one: tuple, other: tuple) -> None:
    """Of two healings, in arithmetic of another order."""
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    for name, value in one[1].items():
        assert_close(value, other[1][name])


@pytest.fixture
def accelerator() -> Callable[..., Accelerator]:
    return partial(Accelerator, cpu=True)


def test_an_accelerator_that_asks_for_nothing_changes_nothing(accelerator) -> None:
    (curve, state), (same, plain) = told(healed(accelerator=accelerator())), told(healed())
    assert curve == same and all(torch.equal(value, plain[name]) for name, value in state.items())


def test_accumulated_batches_are_one_of_their_size(accelerator) -> None:
    options = HealOptions(hidden=0.0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(options.seed)).tolist()
    data = [x | {"attention_mask": torch.ones(2, 9, dtype=torch.long)} for x in texts(8)]  # all tokens count alike
    joined = {name: torch.cat([data[i][name] for i in order[:2]]) for name in data[0]}
    results = []
    for batches, how in ((data, {"accelerator": accelerator(gradient_accumulation_steps=2)}), ([joined], {})):
        given = {"steps": 1, "learning_rate": 1e-3, "held_out": data[:2], "options": options}
        results.append(told(heal(student_of(LLAMA()), LLAMA(), batches, **given, **how)))
    assert_alike(*results)


def test_bf16_computes_in_bf16_and_trains_in_float32(accelerator) -> None:
    seen, student = set(), student_of(LLAMA())
    student.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, args, output: seen.add(output.dtype))
    done = healed(student=student, accelerator=accelerator(mixed_precision="bf16"))
    assert seen == {torch.bfloat16} and {p.dtype for p in done.parameters()} == {torch.float32}
    assert done.shrank_healing.after == pytest.approx(healed().shrank_healing.after, rel=0.05)


def test_recomputed_blocks_change_nothing_but_what_is_kept() -> None:
    kept, runs, results = [], [], []
    for recompute in (False, True):
        student, count = student_of(LLAMA()), []
        student.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].append(t.numel()) or t, lambda t: t):
            kept.append([])
            done = healed(student=student, options=replace(OPTIONS, recompute=recompute))
        runs.append(len(count))
        results.append(told(done))
        assert all("forward" not in vars(m) for m in done.model.layers)
    assert runs[1] == runs[0] + 8  # once more in each step
    assert sum(kept[1]) < 0.5 * sum(kept[0])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())
    with pytest.raises(ValueError, match="recompute: the student has no blocks"):
        heal(auto_fact(mlp(), 4), mlp(), [torch.randn(8, 32)] * 4, options=HealOptions(recompute=True))


def test_a_teacher_may_be_put_away() -> None:
    teacher = accelerate.cpu_offload(LLAMA(), execution_device=torch.device("cpu"))
    assert {p.device.type for p in teacher.parameters()} == {"meta"}
    (curve, state), (same, plain) = told(healed(teacher)), told(healed())
    assert curve == same and all(torch.equal(value, plain[name]) for name, value in state.items())


def test_what_an_accelerator_may_not_ask_for(accelerator) -> None:
    other = accelerator()
    other.state._mixed_precision = "fp16"
    with pytest.raises(ValueError, match="mixed_precision='fp16', and heal takes 'no' or 'bf16'"):
        healed(accelerator=other)
    other.state._mixed_precision = "no"
    other.state.device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"the student is on cpu and the accelerator on cuda: move the models there"):
        healed(accelerator=other)
    other.state.device = torch.device("cpu")


def test_all_logits_recorded_are_as_good_as_the_teacher(tmp_path) -> None:
    only_logits = replace(OPTIONS, hidden=0.0)
    recorded = record_logits(LLAMA(), texts(), tmp_path, top=VOCAB)
    assert_alike(told(healed(recorded, options=only_logits)), told(healed(options=only_logits)))


def test_the_largest_logits_are_a_bound_and_a_good_teacher(tmp_path) -> None:
    teacher, student = LLAMA(), student_of(LLAMA())
    with torch.no_grad():
        teacher.lm_head.weight.mul_(4)  # surer of itself
    batch = bound(as_batches(texts(1)), teacher)[0]
    whole = distance(student, teacher, batch, masking_of_blocks(student, teacher, []), 0.0).item()
    parts = [record_logits(teacher, texts(1), tmp_path / str(top), top=top) for top in (1, 8, 32)]
    found = [part.distance(student, batch).item() for part in parts]
    assert 0 < found[0] < found[1] < found[2] < whole
    recorded = record_logits(LLAMA(), texts(), tmp_path / "all", top=16)
    done = healed(recorded, options=replace(OPTIONS, hidden=0.0)).shrank_healing
    assert done.after < 0.9 * done.before


def test_logits_are_recorded_once_and_known_again(tmp_path, monkeypatch) -> None:
    runs, teacher, largest = [], LLAMA(), recording._largest
    monkeypatch.setattr(recording, "_largest", lambda *seen: runs.append(1) or largest(*seen))
    recorded = record_logits(teacher, texts(3), tmp_path / "a")
    assert record_logits(teacher, texts(5), tmp_path / "a") == recorded and len(runs) == 5
    others = LLAMA()
    with torch.no_grad():
        others.lm_head.weight.add_(1)
    with pytest.raises(ValueError, match="a has logits of another model, or another number of them"):
        record_logits(others, texts(3), tmp_path / "a")
    with pytest.raises(ValueError, match="options=HealOptions\\(hidden=0\\)"):
        healed(recorded)
    with pytest.raises(ValueError, match=r"batch \d+: .* has no logits of it; record_logits with this data"):
        healed(recorded, options=replace(OPTIONS, hidden=0.0), held_out=texts(3))
    with pytest.raises(ValueError, match="batch 0: the model gives no logits, but Tensor"):
        record_logits(mlp(), [torch.randn(8, 32)], tmp_path / "b")
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        record_logits(teacher, texts(3), tmp_path / "c", top=0)


def _interrupted(run: Run, after: int, error: type[Exception]) -> Callable[[Run], None]:
    """What takes steps, until it fails."""
    take_step = Run._take_step

    def step() -> None:
        if run.step == after:
            raise error("interrupted")
        take_step(run)

    return step


def _together(rank: int, folder: str) -> dict[str, object]:
    """What two processes make of it."""
    found: dict[str, object] = {}
    accelerator = Accelerator(cpu=True)
    found["accelerator"] = told(healed(accelerator=accelerator))
    with shrank.across_processes():
        found["block"] = told(healed())
    accelerator.gradient_accumulation_steps = 2
    found["accumulated"] = told(healed(accelerator=accelerator, steps=4))
    accelerator.gradient_accumulation_steps = 1
    sharded = LLAMA()
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    found["sharded"] = told(healed(sharded, accelerator=accelerator))
    only_logits = replace(OPTIONS, hidden=0.0)
    with shrank.across_processes():
        recorded = record_logits(LLAMA(), texts(), Path(folder, "logits"), top=VOCAB)
        found["recorded"] = told(healed(recorded, options=only_logits))
    found["refused"] = _refused(rank, accelerator)
    checkpoint, train = Path(folder, "checkpoint"), Run.train

    def failing(run: Run, path: Path | None) -> None:
        run._take_step = _interrupted(run, 6, ValueError if rank else RuntimeError)
        train(run, path)

    Run.train = failing if rank else train
    with pytest.raises(ValueError if rank else PeerFailed, match="interrupted"):
        healed(accelerator=accelerator, checkpoint=checkpoint)
    Run.train = train
    shutil.copy(checkpoint, Path(folder, f"of process {rank}"))
    found["resumed"] = told(healed(accelerator=accelerator, checkpoint=checkpoint))
    found["trainer"] = _trained_by_the_trainer(folder)
    return found


def _trained_by_the_trainer(folder: str) -> dict[str, torch.Tensor]:
    arguments = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": []}
    student, data = student_of(LLAMA()), [{"input_ids": x["input_ids"][0]} for x in texts(8)]
    how = TrainingArguments(f"{folder}/run", use_cpu=True, disable_tqdm=True, save_strategy="no", **arguments)
    trainer = shrank.DistillationTrainer(student, how, train_dataset=data, teacher=LLAMA())
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return {name: value.clone() for name, value in student.state_dict().items()}


def _refused(rank: int, accelerator: Accelerator) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    split = parallelize_module(LLAMA(), mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    other = student_of(LLAMA())
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.down.add_(rank)
    cases = (
        {"teacher": split},
        {"student": split},
        {"student": DistributedDataParallel(student_of(LLAMA()))},
        {"student": other},
        {"options": replace(OPTIONS, seed=rank)},
    )
    found = []
    for case in cases:
        with pytest.raises(ValueError) as refused:
            healed(accelerator=accelerator, **case)
        found.append(str(refused.value))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("healing")


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, object]]:
    found = in_processes(_together, str(folder), folder=folder)
    assert all(isinstance(x, dict) for x in found), found
    return found


def test_two_processes_heal_as_one_that_accumulates(found, accelerator) -> None:
    twice = told(healed(accelerator=accelerator(gradient_accumulation_steps=2)))
    for here in found:
        assert_alike(here["accelerator"], twice)
        for other in ("block", "sharded"):
            assert_alike(here[other], here["accelerator"])
    for name in ("accelerator", "accumulated", "recorded"):
        assert found[0][name][0] == found[1][name][0]
        assert all(torch.equal(value, found[1][name][1][n]) for n, value in found[0][name][1].items())


def test_two_processes_that_accumulate(found, accelerator) -> None:
    assert_alike(found[0]["accumulated"], told(healed(accelerator=accelerator(gradient_accumulation_steps=4), steps=4)))


def test_two_processes_with_recorded_logits(found, accelerator) -> None:
    only_logits = replace(OPTIONS, hidden=0.0)
    alone = healed(options=only_logits, accelerator=accelerator(gradient_accumulation_steps=2))
    assert_alike(found[0]["recorded"], told(alone))


def test_the_trainer_keeps_two_processes_together(found) -> None:
    before = student_of(LLAMA()).state_dict()
    moved = {name for name, value in found[0]["trainer"].items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "led_unit" in name}
    assert all(torch.equal(value, found[1]["trainer"][name]) for name, value in found[0]["trainer"].items())


def test_one_process_resumes_what_two_began(found, folder, accelerator) -> None:
    one = accelerator(gradient_accumulation_steps=2)
    resumed = healed(accelerator=one, checkpoint=folder / "of process 0")
    assert [step for step, _ in resumed.shrank_healing.curve] == [0, 4, 8]
    assert resumed.shrank_healing.curve[1][1] == found[0]["resumed"][0][1]  # which was not computed again
    assert_alike(told(resumed), found[0]["resumed"])


def test_two_processes_resume_to_the_same(found) -> None:
    for here in found:
        assert here["resumed"][0] == here["accelerator"][0]
        assert all(torch.equal(value, here["accelerator"][1][name]) for name, value in here["resumed"][1].items())


def test_what_two_processes_may_not_be_given(found) -> None:
    wanted = (
        "the teacher is split by tensor parallelism",
        "the student is split between processes, model.layers.0.mlp.up_proj.weight for one",
        "the student is wrapped in DistributedDataParallel: give student.module",
        "was not given the model that process 0 was",
        "was not given the options of healing that process 0 was",
    )
    for here in found:
        assert all(text in said for text, said in zip(wanted, here["refused"], strict=True)), here["refused"]
