"""The commands that read models from folders and write them: plan, compress, heal, inspect, merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from ..calibration.batches import Batch
from ..calibration.calibration import calibrate as run_calibration
from ..calibration.request import Calibrate
from ..compression.apply import merge
from ..compression.auto_fact import auto_fact
from ..compression.describe import describe
from ..data.file_batches import batches_from_file
from ..data.model_inputs import require_next_token
from ..healing.heal import heal as heal_model
from ..healing.options import LEARNING_RATE, HealOptions
from ..healing.recorded import record_logits
from ..measuring.layer_errors import measure_errors
from ..model.notes import HEALING, noted
from ..planning.make_plan import eligible, make_plan
from ..planning.plan import RankPlan
from ..planning.tables import table
from ..reporting.page import report as write_page
from ..saving.checkpoint import inspect_file
from ..saving.folders import transformer_folder
from ..streaming.checkpoint import Checkpoint
from ..util.files import size_on_disk
from . import launched
from .options import (
    DAMAGED,
    USAGE,
    AllowSlower,
    Bits,
    EnergyOption,
    Exclude,
    Force,
    GroupSize,
    Include,
    Json,
    Keep,
    KeepBytes,
    Narrow,
    Out,
    Pivot,
    Rank,
    RoundTo,
    Source,
    TreatAsBase,
    errors,
    fail,
    one_of,
    plan_options,
    require_compressed,
    require_free,
    require_layers,
    show,
    trust,
)

Data = Annotated[
    Path | None,
    typer.Option(
        help=(
            "Data to calibrate on: the paragraphs of a .txt file; a .jsonl file, whose lines have any of text, target, "
            "image and audio (paths relative to it); or a folder of images or sounds, with what they say in NAME.txt "
            "beside NAME.jpg. The decoder of an encoder-decoder is to say the target, else the text itself, or what "
            "the dense model makes of an image or a sound that has neither."
        )
    ),
]
Loss = Annotated[str, typer.Option(help="What errors are weighted by: output, lm (next token) or none.")]
Anchored = Annotated[float, typer.Option(help="Fit block by block, to this share of the dense outputs, such as 0.25.")]
MaxLength = Annotated[
    int, typer.Option(min=1, help="Tokens of a text that are used, at most as many as the model has positions for.")
]
Stream = Annotated[
    bool,
    typer.Option(
        help=(
            "Work from the files, a block at a time, for a model that does not fit in memory. After whatever stopped "
            "it, the same command goes on where it was, by what it keeps in OUT.streaming."
        )
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts, images or sounds that are run together.")]


def plan(
    source: Source,
    rank: Rank = None,
    keep: Keep = None,
    keep_bytes: KeepBytes = None,
    energy: EnergyOption = None,
    calibrate: Data = None,
    loss: Loss = "output",
    max_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    include: Include = None,
    exclude: Exclude = None,
    round_to: RoundTo = None,
    allow_slower: AllowSlower = False,
    pivot: Pivot = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    narrow: Narrow = None,
    treat_as_base: TreatAsBase = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this JSON file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page about the plan.")] = None,
    as_json: Json = False,
) -> None:
    """Show what would happen to every layer and why; changes nothing. Runs under torchrun too."""
    with errors(across=True) as here:
        from ..saving.transformers_folder import load_model

        rule = one_of(bits, rank=rank, keep=keep, keep_bytes=keep_bytes, energy=energy)
        options = plan_options(
            pivot,
            narrow,
            include=include,
            exclude=exclude,
            round_to=round_to,
            allow_slower=allow_slower,
            bits=bits,
            group_size=group_size,
        )
        model, found = load_model(source), None
        trust(model, treat_as_base)
        if calibrate and (layers := eligible(model, **options)):
            batches = _batches(calibrate, model, source, loss, max_length, batch_size)
            found = run_calibration(
                model, batches, loss=loss, layers=layers, inputs=bool(bits or keep_bytes), narrow=bool(narrow)
            )
        made = make_plan(model, rule, calibration=found, **options)
        if save and here.is_first:
            made.save(save)
        if report and here.is_first:
            write_page(made, report)
    show(made.to_dict(), table(made), as_json, made.summary)
    require_layers(made)


def compress(
    source: Source,
    out: Out,
    rank: Rank = None,
    keep: Keep = None,
    keep_bytes: KeepBytes = None,
    energy: EnergyOption = None,
    plan: Annotated[Path | None, typer.Option(help="A plan as JSON, from `shrank plan --save`.")] = None,
    calibrate: Data = None,
    loss: Loss = "output",
    max_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    anchored: Anchored = 0.0,
    heal: Annotated[int, typer.Option(help="Steps of training against the dense model.")] = 0,
    include: Include = None,
    exclude: Exclude = None,
    round_to: RoundTo = None,
    allow_slower: AllowSlower = False,
    pivot: Pivot = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    narrow: Narrow = None,
    treat_as_base: TreatAsBase = None,
    stream: Stream = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page about what was done.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a low-rank copy of a model that from_pretrained loads after `import shrank`.

    With --calibrate, --keep is the share of all replaced layers together, spent where the data says it matters.

    Several processes share the work: torchrun --nproc-per-node 4 -m shrank compress ...
    """
    require_free(out, force)
    if (heal or anchored) and calibrate is None:
        fail(f"--{'heal' if heal else 'anchored'} needs data: --calibrate", USAGE)
    if heal and stream:
        fail("--heal trains the whole model in memory: compress with --stream, then use shrank heal", USAGE)
    with errors(across=True) as here:
        from ..saving.transformers_folder import load_model, save_model

        rule = one_of(bits, rank=rank, keep=keep, keep_bytes=keep_bytes, energy=energy, plan=plan)
        options = plan_options(
            pivot,
            narrow,
            include=include,
            exclude=exclude,
            round_to=round_to,
            allow_slower=allow_slower,
            bits=bits,
            group_size=group_size,
        )
        checkpoint = Checkpoint(source) if stream else None
        model, dense = checkpoint.model() if checkpoint else load_model(source), None
        trust(model, treat_as_base)
        if calibrate and (plan or eligible(model, **options)):
            batches = _batches(calibrate, model, source, loss, max_length, batch_size)
            options |= {"calibrate": Calibrate(batches, loss=loss), "anchored": anchored}
            dense = copy.deepcopy(model) if heal or (report and not stream) else None
        rule = RankPlan.load(plan) if plan else rule
        model = auto_fact(checkpoint, rule, stream=out, **options) if checkpoint else auto_fact(model, rule, **options)
        require_layers(model.shrank_plan)
        if heal:
            model = heal_model(model, dense, batches, steps=heal, loss="lm" if loss == "lm" else "none")
        done = model.shrank_plan
        if not here.is_first:
            return
        if report:
            done = measure_errors(done, dense, model, batches[:8]) if dense is not None else done
            write_page(done, report)
        if not stream:
            save_model(model, source, out)
    healing = f"\n{_told(model)}" if heal else ""
    show(
        {**done.to_dict(), "bytes": size_on_disk(out)},
        table(done),
        as_json,
        f"{done.summary}{healing}\nwrote {out}: {size_on_disk(out):,} bytes",
    )


def heal_command(
    student: Annotated[str, typer.Argument(help="Folder of a compressed model.")],
    teacher: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    text: Annotated[Path, typer.Option(help="Data to train on, as compress takes it.")],
    out: Out,
    steps: int = 300,
    learning_rate: float = LEARNING_RATE,
    max_length: MaxLength = 512,
    batch_size: BatchSize = 8,
    loss: Annotated[str, typer.Option(help="Train on this as well: lm (next token) or none.")] = "none",
    checkpoint: Annotated[Path | None, typer.Option(help="A file to resume from.")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step, in each process.")] = 1,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16, and train in float32.")] = False,
    recompute: Annotated[bool, typer.Option(help="Run blocks again in the backward pass, for less memory.")] = False,
    logits: Annotated[
        Path | None,
        typer.Option(help="Keep the dense model's largest logits in this folder first, and train without that model."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Logits of every token in --logits.")] = 64,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train the factors of a compressed model to do as the dense one does, and write the best that was reached.

    Several processes share the work: torchrun --nproc-per-node 4 -m shrank heal ...
    """
    require_free(out, force)
    with errors(across=True) as here:
        from ..saving.transformers_folder import load_model, save_model

        model = load_model(student)
        require_compressed(describe(model), student)
        dense = load_model(teacher)
        batches = _batches(text, dense, teacher, loss, max_length, batch_size)
        if logits:
            dense = record_logits(dense, batches, logits, top=top)
        model = heal_model(
            model,
            dense,
            batches,
            steps=steps,
            learning_rate=learning_rate,
            loss=loss,
            checkpoint=checkpoint,
            options=HealOptions(hidden=0.0 if logits else 1.0, recompute=recompute),
            accelerator=launched.accelerator(accumulate, bf16),
        )
        if not here.is_first:
            return
        save_model(model, student, out)
    done = noted(model, HEALING)
    show(
        {"before": done.before, "after": done.after, "best_step": done.best_step, "curve": done.curve},
        None,
        as_json,
        f"{_told(model)}\nwrote {out}: {size_on_disk(out):,} bytes",
    )


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder or .safetensors file that shrank wrote.")], as_json: Json = False
) -> None:
    """Show the low-rank layers of a saved model and verify its weights."""
    with errors(code=DAMAGED):
        if path.is_dir():
            from ..saving.transformers_folder import inspect_folder

            found, problems = inspect_folder(path)
        else:
            found, problems = inspect_file(path)
    facts = {"path": str(path), "bytes": size_on_disk(path), "problems": problems, **found.to_dict()}
    show(facts, table(found), as_json, f"{found.summary}\n{path}: {facts['bytes']:,} bytes")
    if problems:
        fail("; ".join(problems), DAMAGED)


def merge_command(source: Source, out: Out, force: Force = False, as_json: Json = False) -> None:
    """Write a dense model: every low-rank layer multiplied out, and weights of few bits as plain numbers."""
    require_free(out, force)
    with errors():
        from ..saving.transformers_folder import load_model, save_model

        model = load_model(source)
        before = describe(model)
        require_compressed(before, source)
        save_model(merge(model), source, out)
    show(
        {"path": str(out), "merged": len(before.changed), "bytes": size_on_disk(out)},
        None,
        as_json,
        f"wrote {out}: {len(before.changed)} layers merged, {size_on_disk(out):,} bytes",
    )


COMMANDS = {"plan": plan, "compress": compress, "heal": heal_command, "inspect": inspect, "merge": merge_command}


def _batches(path: Path, model: nn.Module, source: str, loss: str, max_length: int, batch_size: int) -> list[Batch]:
    """The data of a file for this model; ValueError if the model does not have the loss."""
    if loss == "lm":
        require_next_token(model)
    return batches_from_file(path, model, transformer_folder(source), max_length=max_length, batch_size=batch_size)


def _told(model: nn.Module) -> str:
    done = noted(model, HEALING)
    return f"healed: loss on held-out texts {done.before:.4f} -> {done.after:.4f}, best at step {done.best_step}"
