"""Tasks of lm-evaluation-harness on compressed models: its figures are those of the model's own logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import shrank
from shrank.cli.app import app
from shrank.cli.options import FAILED, USAGE
from shrank.measuring.tasks import evaluate_tasks, known_tasks
from tests.serving.served_models import WORDS, tokenizer_of, write

QUESTIONS = [
    {"question": f"w{10 + i} w{30 + i}", "choices": [f"w{60 + i}", f"w{90 + i}", f"w{120 + i}"], "gold": i % 3}
    for i in range(24)
]
TASK = """\
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of a compressed model with its tokenizer."""
    write("llama", tmp_path / "model")
    tokenizer_of(WORDS).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """That of a task of one's own."""
    made = tmp_path / "tasks"
    made.mkdir()
    (made / "mine.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (made / "mine.yaml").write_text(TASK.format(file=made / "mine.jsonl"))
    return made


@torch.inference_mode()
def accuracy(model: nn.Module) -> float:
    """The share of questions whose answer is the likeliest of the choices, each of which is one token."""
    tokenizer, right = tokenizer_of(WORDS), 0
    for each in QUESTIONS:
        logits = model(torch.tensor([tokenizer(each["question"]).input_ids])).logits[0, -1]
        choices = [tokenizer(choice).input_ids[0] for choice in each["choices"]]
        right += int(logits[choices].argmax()) == each["gold"]
    return right / len(QUESTIONS)


def run(*arguments: object):
    return CliRunner().invoke(app, ["eval", *(str(a) for a in arguments)])


@pytest.mark.serve
def test_figures_are_those_of_the_model(folder: Path, tasks: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    for harness in (shrank.lm_eval_model(folder, batch_size=5), shrank.lm_eval_model(model, tokenizer_of(WORDS))):
        found = evaluate_tasks(harness, ["mine"], known_tasks(["mine"], tasks))
        assert found["mine"]["acc,none"] == accuracy(model) and set(found) == {"mine"}
    assert accuracy(model) not in (0, 1)


@pytest.mark.serve
def test_the_command_compares_models(folder: Path, tasks: Path) -> None:
    dense = shrank.merge(shrank.lm_eval_model(folder).model)
    with torch.no_grad():
        dense.lm_head.weight.neg_()
    other = folder.with_name("other")
    dense.save_pretrained(other)
    asked = (folder, other, "--tasks", "mine", "--task-files", tasks, "--batch-size", 4)
    done = run(*asked, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    small = shrank.lm_eval_model(folder).model
    assert [x["tasks"]["mine"]["acc,none"] for x in found.values()] == [accuracy(small), accuracy(dense)]
    assert "domains" not in found[str(folder)]
    assert "acc,none" in run(*asked, "--limit", 4).stdout


@pytest.mark.serve
def test_a_task_that_does_not_exist_is_named(folder: Path, tasks: Path) -> None:
    failed = run(folder, "--tasks", "mine,nobodys", "--task-files", tasks)
    assert failed.exit_code == FAILED and "has no task nobodys" in failed.stderr


def test_without_the_harness_an_error_says_what_to_install(model_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'shrank\[eval\]'"):
        shrank.lm_eval_model(model_folder("llama"))
    failed = run(model_folder("llama"), "--tasks", "hellaswag")
    assert failed.exit_code == FAILED and "pip install 'shrank[eval]'" in failed.stderr
    assert "Traceback" not in failed.output


def test_texts_or_tasks_are_asked_for(model_folder) -> None:
    failed = run(model_folder("llama"))
    assert failed.exit_code == USAGE and "--text FILE, or tasks, --tasks" in failed.stderr
