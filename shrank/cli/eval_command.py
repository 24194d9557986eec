"""The command that measures language models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from torch import nn

from ..data.data_files import read_texts
from ..data.model_inputs import positions, require_causal_language_model
from ..measuring.language_model import Repetition, evaluate, repetition
from .options import USAGE, Json, Source, errors, fail, show

_PROMPT, _CONTINUATION = 16, 64  # tokens


def eval_command(
    source: Source,
    other: Annotated[str | None, typer.Argument(help="A compressed model to compare with it.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A file of texts; repeatable, one domain each.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read together.")] = 512,
    limit: Annotated[int | None, typer.Option(help="Windows of each file.")] = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a language model on texts, and of a compressed one also its agreement with the first."""
    if not text:
        fail("give texts to measure on: --text FILE", USAGE)
    with errors():
        from ..data.processors import load_tokenizer
        from ..saving.folders import transformer_folder
        from ..saving.transformers_folder import load_model

        texts = {path: read_texts(path) for path in text}
        dense = load_model(source).eval()
        require_causal_language_model(dense, window)
        tokenizer, results = load_tokenizer(transformer_folder(source)), {}
        for name in [source, *([other] if other else [])]:
            model = dense if name == source else load_model(name).eval()
            require_causal_language_model(model, window)
            reference = None if model is dense else dense
            domains = {
                path.name: evaluate(model, tokenizer, texts[path], reference, window=window, limit=limit).to_dict()
                for path in text
            }
            results[name] = {"domains": domains, "repetition": _repetition(model, tokenizer, texts[text[0]]).to_dict()}
    show(results, _table(results), as_json)


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
