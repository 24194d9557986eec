"""The command that measures language models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from torch import nn

from ..data.data_files import read_texts
from ..data.model_inputs import positions, require_causal_language_model
from ..measuring.language_model import Repetition, evaluate, repetition
from ..measuring.tasks import evaluate_tasks, known_tasks, lm_eval_model
from .options import USAGE, Json, Source, errors, fail, show

_PROMPT, _CONTINUATION = 16, 64  # tokens


def eval_command(
    source: Source,
    other: Annotated[str | None, typer.Argument(help="A compressed model to compare with it.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A file of texts; repeatable, one domain each.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read together.")] = 512,
    stride: Annotated[
        int | None, typer.Option(help="Tokens between the beginnings of windows; by default, no window overlaps.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between: hellaswag,arc_easy.")
    ] = None,
    task_files: Annotated[Path | None, typer.Option(help="A folder of tasks of your own, in its format.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before each question; by default, the task's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions of tasks that are read together.")] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Windows of each file, spread evenly; examples of each task.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a language model on texts, and its figures in tasks; of a compressed one, also beside the first."""
    if not text and not tasks:
        fail("give texts to measure on, --text FILE, or tasks, --tasks NAME,NAME", USAGE)
    results: dict[str, dict] = {}
    with errors():
        from ..data.processors import load_tokenizer
        from ..saving.folders import transformer_folder
        from ..saving.transformers_folder import load_model

        texts = {path: read_texts(path) for path in text or ()}
        names = tasks.split(",") if tasks else []
        known = known_tasks(names, task_files) if names else None
        dense = load_model(source).eval()
        require_causal_language_model(dense, window if texts else 1)
        tokenizer = load_tokenizer(transformer_folder(source))
        for name in [source, *([other] if other else [])]:
            model, found = dense if name == source else load_model(name).eval(), results.setdefault(name, {})
            require_causal_language_model(model, window if texts else 1)
            reference = None if model is dense else dense
            if texts:
                found["domains"] = {
                    path.name: evaluate(
                        model, tokenizer, texts[path], reference, window=window, limit=limit, stride=stride
                    ).to_dict()
                    for path in texts
                }
                found["repetition"] = _repetition(model, tokenizer, texts[text[0]]).to_dict()
            if names:
                harness = lm_eval_model(model, tokenizer, batch_size=batch_size)
                found["tasks"] = evaluate_tasks(harness, names, known, limit, shots)
    tables = [*([_table(results)] if texts else []), *([_of_tasks(results)] if tasks else [])]
    show(results, Group(*tables), as_json)


def _repetition(model: nn.Module, tokenizer: Callable, texts: list[str]) -> Repetition:
    """Of continuations that the model has positions for."""
    room = positions(model) or _PROMPT + _CONTINUATION
    prompt = min(_PROMPT, room // 2)
    return repetition(model, tokenizer, texts, prompt_tokens=prompt, new_tokens=min(_CONTINUATION, room - prompt))


def _table(results: dict[str, dict]) -> Table:
    table = Table()
    for column in ("model", "texts", "perplexity", "agreement", "divergence", "loops", "distinct 1 2 3"):
        table.add_column(column, justify="left" if column in ("model", "texts") else "right")
    for name, found in results.items():
        repeated = found["repetition"]
        for domain, figures in found["domains"].items():
            beside = ("" if figures[key] is None else f"{figures[key]:.3f}" for key in ("agreement", "divergence"))
            table.add_row(
                name,
                domain,
                f"{figures['perplexity']:.2f}",
                *beside,
                f"{repeated['loops']:.2f}",
                " ".join(f"{x:.2f}" for x in repeated["distinct"]),
            )
    return table


def _of_tasks(results: dict[str, dict]) -> Table:
    """A row for each figure of each task, a column for each model."""
    table = Table()
    for column in ("task", "figure", *results):
        table.add_column(column, justify="left" if column in ("task", "figure") else "right")
    first, *_ = (found["tasks"] for found in results.values())
    for task, figures in first.items():
        for figure in figures:
            values = (found["tasks"][task][figure] for found in results.values())
            table.add_row(task, figure, *(f"{x:.4f}" if isinstance(x, int | float) else str(x) for x in values))
    return table
