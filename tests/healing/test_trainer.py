"""DistillationTrainer: the Trainer of transformers from the first step to the saved folder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

import shrank
from shrank import DistillationTrainer, auto_fact
from shrank.calibration.batches import as_batches, bound
from shrank.healing.distance import distance, masking_of_blocks
from tests.common.models import hf_model, mlp, tokens


def lines(count: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = tokens(count, 9)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def trainer(folder: Path, student: nn.Module, teacher: nn.Module, steps: int = 8, **given) -> DistillationTrainer:
    own = {name: given.pop(name) for name in ("task", "train", "hidden") if name in given}
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": steps,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return DistillationTrainer(
        student,
        TrainingArguments(str(folder), **(arguments | given)),
        train_dataset=lines(),
        eval_dataset=lines(4),
        teacher=teacher,
        **own,
    )


def test_from_the_first_step_to_the_saved_folder(tmp_path) -> None:
    teacher = hf_model("llama")
    student = auto_fact(copy.deepcopy(teacher), 4)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    outside = {n: p.clone() for n, p in student.named_parameters() if "_unit" not in n}
    made = trainer(tmp_path / "run", student, teacher)
    first = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < 0.9 * first
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(torch.equal(dict(student.named_parameters())[n], p) for n, p in outside.items())
    made.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert shrank.describe(again) == shrank.describe(student)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())
    # From the checkpoint in the middle on it ends at the same weights.
    resumed = auto_fact(copy.deepcopy(teacher), 4)
    trainer(tmp_path / "again", resumed, teacher).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_the_loss_is_the_one_of_heal_and_the_mean_of_what_is_accumulated(tmp_path) -> None:
    teacher = hf_model("llama")
    student = auto_fact(copy.deepcopy(teacher), 4)
    made = trainer(tmp_path, student, teacher, steps=1)
    inputs = {name: torch.stack([x[name] for x in lines(4)]) for name in lines(1)[0]}
    masking, (batch,) = masking_of_blocks(student, teacher, []), bound(as_batches([inputs]), student)
    expected = distance(student, teacher, batch, masking, 1.0).item()
    assert made.compute_loss(student, inputs).item() == pytest.approx(expected, rel=1e-5)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    made.task = 0.5
    loss, output = made.compute_loss(student, inputs, return_outputs=True)
    assert loss.item() == pytest.approx(expected + 0.5 * output.loss.item(), rel=1e-5)
    made.task = 0.0
    made.train()
    # Both batches of the step have one distance of the same size, so that their sum would be twice as large.
    assert made.state.log_history[0]["loss"] == pytest.approx(expected, rel=0.3)


def test_bf16_and_activation_checkpointing_are_the_trainers(tmp_path) -> None:
    teacher, losses = hf_model("llama"), []
    for how in ({}, {"gradient_checkpointing": True}, {"bf16": True}):
        student = auto_fact(copy.deepcopy(teacher), 4)
        made = trainer(tmp_path, student, copy.deepcopy(teacher), steps=2, **how)
        made.train()
        losses.append(made.state.log_history[1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] != losses[0]


def test_what_is_trained(tmp_path) -> None:
    teacher = hf_model("llama")
    student = auto_fact(copy.deepcopy(teacher), 4)
    trainer(tmp_path, student, teacher, train="all")
    assert all(p.requires_grad for p in student.parameters())
    trainer(tmp_path, student, teacher)
    assert {n for n, p in student.named_parameters() if p.requires_grad} == {
        n for n, _ in student.named_parameters() if "led_unit" in n
    }
    with pytest.raises(ValueError, match="the student has no low-rank or narrowed layers to train"):
        trainer(tmp_path, mlp(), mlp())
