"""Benchmarks of language models by lm-evaluation-harness: its tasks, or those of a folder, on a compressed model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data.processors import load_tokenizer
from ..saving.folders import transformer_folder

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

HOW = "lm-evaluation-harness is not installed, which has the tasks: pip install 'shrank[eval]'"


def lm_eval_model(
    source: str | os.PathLike | nn.Module,
    tokenizer: object | None = None,
    *,
    device: torch.device | str | None = None,
    **options: object,
) -> LM:
    """Make a model of transformers, compressed or not, one that lm-evaluation-harness takes.

    Args:
        source: A folder, as `save_pretrained` writes it, the hub name of a model, or a model itself.
        tokenizer: That of the model; by default that of the folder or hub name.
        device: Where the model shall be; by default where it is.
        options: Of `lm_eval.models.huggingface.HFLM`, such as `batch_size` or `max_length`.

    Returns:
        What `lm_eval.simple_evaluate` takes as `model`.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: There is no such model or tokenizer.

    Example:
        found = lm_eval.simple_evaluate(shrank.lm_eval_model("my-small-model"), tasks=["hellaswag"])
    """
    models = _harness("lm_eval.models.huggingface")
    if isinstance(source, nn.Module):
        model = source
        if tokenizer is None:
            raise ValueError("give the tokenizer of a model that is given itself: lm_eval_model(model, tokenizer)")
    else:
        from ..saving.transformers_folder import load_model

        model = load_model(os.fspath(source))
        tokenizer = load_tokenizer(transformer_folder(os.fspath(source))) if tokenizer is None else tokenizer
    model = model.eval() if device is None else model.eval().to(device)
    return models.HFLM(pretrained=model, tokenizer=tokenizer, **options)


def known_tasks(names: Sequence[str], folder: str | os.PathLike | None = None) -> TaskManager:
    """What knows these tasks, and those of the folder, in files of lm-evaluation-harness.

    Raises ImportError if that is not installed, and ValueError if it has no such task.
    """
    manager = _harness("lm_eval.tasks").TaskManager(include_path=None if folder is None else os.fspath(folder))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ValueError(f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    return manager


def evaluate_tasks(
    model: LM, names: Sequence[str], known: TaskManager, limit: int | None = None, shots: int | None = None
) -> dict[str, dict[str, float]]:
    """The figures of each task, such as {"hellaswag": {"acc,none": 0.4}}.

    limit: examples of each task. shots: examples with their answers before each question; by default as the task says.
    """
    found = _harness("lm_eval").simple_evaluate(
        model, tasks=list(names), num_fewshot=shots, limit=limit, task_manager=known, log_samples=False
    )
    return {
        name: {key: value for key, value in figures.items() if "," in key}  # metric,filter; the rest is about the task
        for name, figures in found["results"].items()
    }


def _harness(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ImportError(HOW) from error
