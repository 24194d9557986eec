"""The commands that read models from folders and write them: plan, compress, heal, eval, inspect, merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from torch import nn

from .apply import describe, merge
from .auto_fact import auto_fact
from .batches import Batch, as_batches, read_texts
from .calibration import calibrate as run_calibration
from .checkpoint import inspect_file
from .cli_common import (
    DAMAGED,
    USAGE,
    AllowSlower,
    EnergyOption,
    Exclude,
    Force,
    Include,
    Json,
    Keep,
    Out,
    Rank,
    RoundTo,
    Source,
    errors,
    fail,
    one_of,
    require_free,
    require_layers,
    show,
)
from .evaluate import evaluate, repetition
from .files import size_on_disk
from .fitting import PlanOptions
from .heal import HEALING_ATTRIBUTE, LEARNING_RATE
from .heal import heal as heal_model
from .measure import measured
from .plan import RankPlan
from .planning import eligible, make_plan

Texts = Annotated[Path | None, typer.Option(help="Texts to calibrate on: paragraphs of a .txt file, or the `text` of "
                                                 "every line of a .jsonl file.")]
LossOption = Annotated[str, typer.Option(help="What errors are weighed by: output, lm (next token) or none.")]
Anchored = Annotated[float, typer.Option(help="Fit block by block, to this share of the dense outputs, such as 0.25.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of a text that are used.")]


def plan(source: Source, rank: Rank = None, keep: Keep = None, energy: EnergyOption = None, calibrate: Texts = None,
         loss: LossOption = "output", max_length: MaxLength = 512, include: Include = None, exclude: Exclude = None,
         round_to: RoundTo = None, allow_slower: AllowSlower = False,
         save: Annotated[Path | None, typer.Option(help="Write the plan to this JSON file.")] = None,
         report: Annotated[Path | None, typer.Option(help="Write an HTML page about the plan.")] = None,
         as_json: Json = False) -> None:
    """Show what would happen to every layer and why; changes nothing."""
    with errors():
        from .hf import load_model

        rule = one_of(rank=rank, keep=keep, energy=energy)
        options = {"include": include, "exclude": exclude, "round_to": round_to, "allow_slower": allow_slower}
        model = load_model(source)
        batches, layers = _batches(source, calibrate, max_length), eligible(model, PlanOptions(**options))
        found = batches and run_calibration(model, batches, loss=_loss(loss), layers=layers)
        made = make_plan(model, rule, calibration=found, **options)
        if save:
            made.save(save)
        if report:
            made.report(report)
    show(made.to_dict(), made.table(), as_json, made.summary)
    require_layers(made)


def compress(source: Source, out: Out, rank: Rank = None, keep: Keep = None, energy: EnergyOption = None,
             plan: Annotated[Path | None, typer.Option(help="A plan as JSON, from `shrank plan --save`.")] = None,
             calibrate: Texts = None, loss: LossOption = "output", max_length: MaxLength = 512,
             anchored: Anchored = 0.0,
             heal: Annotated[int, typer.Option(help="Steps of training against the dense model.")] = 0,
             include: Include = None, exclude: Exclude = None, round_to: RoundTo = None,
             allow_slower: AllowSlower = False,
             report: Annotated[Path | None, typer.Option(help="Write an HTML page about what was done.")] = None,
             force: Force = False, as_json: Json = False) -> None:
    """Write a low-rank copy of a model that from_pretrained loads after `import shrank`.

    With --calibrate, --keep is the share of all replaced layers together, spent where the texts say it matters.
    """
    require_free(out, force)
    if (heal or anchored) and calibrate is None:
        fail(f"--{'heal' if heal else 'anchored'} needs texts: --calibrate", USAGE)
    with errors():
        from .hf import load_model, save_model

        rule = one_of(rank=rank, keep=keep, energy=energy, plan=plan)
        options = {"include": include, "exclude": exclude, "round_to": round_to, "allow_slower": allow_slower}
        options = {name: value for name, value in options.items() if value}  # a plan is taken without any
        model = load_model(source)
        dense = copy.deepcopy(model) if heal or (report and calibrate) else None
        batches = _batches(source, calibrate, max_length)
        if batches:
            options |= {"calibrate": batches, "loss": _loss(loss), "anchored": anchored}
        model = auto_fact(model, RankPlan.load(plan) if plan else rule, **options)
    require_layers(model.shrank_plan)
    with errors():
        if heal:
            model = heal_model(model, dense, batches, steps=heal, loss="lm" if loss == "lm" else None)
        done = model.shrank_plan
        if report:
            done = measured(done, dense, model, batches[:8]) if dense is not None else done
            done.report(report)
        save_model(model, source, out)
    healing = f"\n{_told(model)}" if heal else ""
    show({**done.to_dict(), "bytes": size_on_disk(out)}, done.table(), as_json,
         f"{done.summary}{healing}\nwrote {out}: {size_on_disk(out):,} bytes")


def heal_command(student: Annotated[str, typer.Argument(help="Folder of a compressed model.")],
                 teacher: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
                 text: Annotated[Path, typer.Option(help="Texts to train on, as for --calibrate.")], out: Out,
                 steps: int = 300, learning_rate: float = LEARNING_RATE, max_length: MaxLength = 512,
                 loss: Annotated[str | None, typer.Option(help="Train on this as well: lm (next token).")] = None,
                 checkpoint: Annotated[Path | None, typer.Option(help="A file to go on from.")] = None,
                 force: Force = False, as_json: Json = False) -> None:
    """Train the factors of a compressed model to do as the dense one does, and write the best that was reached."""
    require_free(out, force)
    with errors():
        from .hf import load_model, save_model

        model = load_model(student)
        require_layers(describe(model))
        model = heal_model(model, load_model(teacher), _batches(teacher, text, max_length), steps=steps,
                           learning_rate=learning_rate, loss=loss, checkpoint=checkpoint)
        save_model(model, student, out)
    done = getattr(model, HEALING_ATTRIBUTE)
    show({"before": done.before, "after": done.after, "best_step": done.best_step, "curve": done.curve}, None, as_json,
         f"{_told(model)}\nwrote {out}: {size_on_disk(out):,} bytes")


def eval_command(source: Source,
                 other: Annotated[str | None, typer.Argument(help="A compressed model to compare with it.")] = None,
                 text: Annotated[list[Path] | None, typer.Option(help="A file of texts; repeatable, one domain each.")
                                 ] = None,
                 window: int = 512, limit: Annotated[int | None, typer.Option(help="Windows of each file.")] = None,
                 as_json: Json = False) -> None:
    """Perplexity of a language model on texts, and of a compressed one also its agreement with the first."""
    if not text:
        fail("give texts to measure on: --text FILE", USAGE)
    with errors():
        from .hf import load_model

        tokenizer, dense = _tokenizer(source), load_model(source).eval()
        results = {}
        for name in [source, *([other] if other else [])]:
            model = dense if name == source else load_model(name).eval()
            reference = None if model is dense else dense
            domains = {path.name: evaluate(model, tokenizer, read_texts(path), reference, window=window,
                                           limit=limit).to_dict() for path in text}
            results[name] = {"domains": domains,
                             "repetition": repetition(model, tokenizer, read_texts(text[0])).to_dict()}
    show(results, _table(results), as_json)


def inspect(path: Annotated[Path, typer.Argument(help="Folder or .safetensors file that shrank wrote.")],
            as_json: Json = False) -> None:
    """Show the low-rank layers of a saved model and verify its weights."""
    with errors(code=DAMAGED):
        if path.is_dir():
            from .hf import inspect_folder

            found, problems = inspect_folder(path)
        else:
            found, problems = inspect_file(path)
    facts = {"path": str(path), "bytes": size_on_disk(path), "problems": problems, **found.to_dict()}
    show(facts, found.table(), as_json, f"{found.summary}\n{path}: {facts['bytes']:,} bytes")
    if problems:
        fail("; ".join(problems), DAMAGED)


def merge_command(source: Source, out: Out, force: Force = False, as_json: Json = False) -> None:
    """Write a dense model: every low-rank layer multiplied out."""
    require_free(out, force)
    with errors():
        from .hf import load_model, save_model

        model = load_model(source)
        before = describe(model)
        require_layers(before)
        save_model(merge(model), source, out)
    show({"path": str(out), "merged": len(before.low_rank), "bytes": size_on_disk(out)}, None, as_json,
          f"wrote {out}: {len(before.low_rank)} layers merged, {size_on_disk(out):,} bytes")


COMMANDS = {"plan": plan, "compress": compress, "heal": heal_command, "eval": eval_command, "inspect": inspect,
            "merge": merge_command}


def _loss(name: str) -> str | bool:
    return False if name == "none" else name


def _batches(source: str, texts: Path | None, max_length: int) -> list[Batch] | None:
    return texts and as_batches(read_texts(texts), _tokenizer(source), max_length=max_length)


def _tokenizer(source: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def _told(model: nn.Module) -> str:
    done = getattr(model, HEALING_ATTRIBUTE)
    return f"healed: loss on held-out texts {done.before:.4f} -> {done.after:.4f}, best at step {done.best_step}"


def _table(results: dict[str, dict]) -> Table:
    table = Table()
    for column in ("model", "texts", "perplexity", "agreement", "divergence", "loops", "distinct 1 2 3"):
        table.add_column(column, justify="left" if column in ("model", "texts") else "right")
    for name, found in results.items():
        repeated = found["repetition"]
        for domain, figures in found["domains"].items():
            beside = ("" if figures[key] is None else f"{figures[key]:.3f}" for key in ("agreement", "divergence"))
            table.add_row(name, domain, f"{figures['perplexity']:.2f}", *beside, f"{repeated['loops']:.2f}",
                          " ".join(f"{x:.2f}" for x in repeated["distinct"]))
    return table
