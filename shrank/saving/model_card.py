"""The model card (README.md) of a compressed copy: what it was made from, what was done, and how to load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from ..compression.describe import describe
from ..layers.quantized import packed_state
from ..planning.plan import RankPlan
from .folders import CARD

TAG = "shrank"
_ABOUT_DENSE = "## The card of the dense model"
_NOTE = "What follows describes the dense model. Its figures, sizes and examples are not those of this copy."
# What a card says of one set of weights, and the copy has others.
_NOT_KEPT = {"model-index", "model_name", "base_model", "base_model_relation", "new_version"}
_CACHED = re.compile(r"models--(.+?)/snapshots/")


def write_card(model: nn.Module, source: str, folder: Path, load: str) -> None:
    """Write the card of a model, compressed or merged again, into a folder; load: the code that loads it."""
    metadata, dense_text, was_compressed = _card_of(Path(source) / CARD)
    name, plan = _name_of(source), describe(model)
    base = metadata.get("base_model") if was_compressed else name
    tags = [tag for tag in metadata.get("tags") or [] if tag not in (TAG, "low-rank", "narrowed")]
    kept = {key: value for key, value in metadata.items() if key not in _NOT_KEPT}
    data = ModelCardData(
        **({"library_name": "transformers"} | kept | {"base_model": base, "tags": [*tags, *_tags(plan)]})
    )
    text = _merged(name, load) if plan.does_nothing else _compressed(model, plan, name, load)
    about_dense = [_ABOUT_DENSE, _NOTE, dense_text] if dense_text else []
    content = "\n\n".join(("---\n" + data.to_yaml() + "\n---", *text, *about_dense))
    (folder / CARD).write_text(content + "\n", encoding="utf-8")


def _compressed(model: nn.Module, plan: RankPlan, name: str, load: str) -> Iterator[str]:
    layers = [layer for layer in plan.outermost if layer.changes or layer.narrowed]
    tensors = {*model.parameters(), *model.buffers()}
    after = sum(part.nbytes for x in tensors for part in packed_state({"": x}).values())
    sizes = {x.fqn: next(model.get_submodule(x.fqn).parameters()).itemsize for x in layers}
    saved = sum(x.size * sizes[x.fqn] - x.bytes(sizes[x.fqn]) for x in layers)
    rows = (("parameters", plan.params_before, plan.params_after), ("bytes", after + saved, after))
    yield f"# {_what(plan)} of {name}"
    if told := " ".join((*_of_ranks(plan, name), *_of_widths(plan, name))):
        yield told
    if grids := Counter(str(layer.storage) for layer in plan.changed if layer.storage.grid):
        told = ", ".join(f"{grid} in {number}" for grid, number in grids.items())
        yield f"Weights have few bits: {told} of these layers (bits / weights with one scale, else a row)."
    yield "\n".join(
        (
            "| | dense | this copy |",
            "|---|---|---|",
            *(f"| {what} | {before:,} | {now:,} ({now / before:.1%}) |" for what, before, now in rows),
        )
    )
    yield f"Import shrank first: without it these weights do not load.\n\n```python\nimport shrank\n\n{load}\n```"


def _tags(plan: RankPlan) -> tuple[str, ...]:
    if plan.does_nothing:
        return ()
    return (TAG, *(("low-rank",) if plan.low_rank else ()), *(("narrowed",) if plan.narrower else ()))


def _what(plan: RankPlan) -> str:
    """What kind of copy this is."""
    if plan.low_rank:
        return "Low-rank copy"
    return "Narrowed copy" if plan.narrower else "Copy in few bits"


def _of_ranks(plan: RankPlan, name: str) -> Iterator[str]:
    if layers := plan.outermost.low_rank:
        ranks = sorted(layer.rank for layer in plan.low_rank)
        touched, kept = sum(x.size for x in layers), sum(x.params_after for x in layers)
        yield (
            f"shrank replaced {len(layers)} layers of `{name}` by products of two thin ones, of ranks {ranks[0]} to "
            f"{ranks[-1]} (median {ranks[len(ranks) // 2]}), which keep {kept / touched:.1%} of these layers' weights. "
            "config.json holds the rank of every layer."
        )


def _of_widths(plan: RankPlan, name: str) -> Iterator[str]:
    if blocks := plan.narrower:
        units, kept = sum(block.units for block in blocks), sum(block.width for block in blocks)
        yield (
            f"shrank took units (hidden units, channels or heads) out of {len(blocks)} blocks of `{name}`, which keep "
            f"{kept / units:.1%} of them, and fitted the layers behind them again."
        )


def _merged(name: str, load: str) -> Iterator[str]:
    yield f"# {name}, dense again"
    yield "Every low-rank layer was multiplied out: the outputs are the low-rank copy's, and shrank is not needed."
    yield f"```python\n{load}\n```"


def _card_of(path: Path) -> tuple[dict, str, bool]:
    """The metadata of a card, what it says of the dense model, and whether it is one that this module wrote."""
    if not path.is_file():
        return {}, "", False
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
        metadata, text = card.data.to_dict(), card.text
    except (yaml.YAMLError, ValueError):
        metadata = {}  # a card that the hub could not read either: its text is kept, whole
    _, ours, below = text.partition(_ABOUT_DENSE)
    written = TAG in (metadata.get("tags") or ())
    if written or ours:
        return metadata, below.replace(_NOTE, "").strip(), True
    return metadata, "\n".join(_demoted(text.strip().splitlines())), False


def _demoted(lines: list[str]) -> Iterator[str]:
    """Headings two levels down, below the one that they are under; not in code, where # begins a comment."""
    in_code = False
    for line in lines:
        in_code ^= line.lstrip().startswith(("```", "~~~"))
        yield f"##{line}" if line.startswith("#") and not in_code else line


def _name_of(source: str) -> str:
    """The hub's name of a source, or the last part of a folder's."""
    cached = _CACHED.search(Path(source).as_posix() + "/")
    if cached:
        return cached[1].replace("--", "/")
    return Path(source).resolve().name if Path(source).is_dir() else source
