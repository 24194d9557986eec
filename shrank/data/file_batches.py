"""From a file of data to the calls of a transformers model: its own processors make the inputs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch, as_batches
from ..util.progress import track
from .data_files import Example, read_examples
from .media import read_image, read_sound
from .model_inputs import ELSEWHERE, ModelInputs, inputs_of
from .processors import load_feature_extractor, load_image_processor, load_processor, load_tokenizer
from .token_batches import generated, tokenized


def batches_from_file(
    path: str | os.PathLike, model: nn.Module, source: str, *, max_length: int = 512, batch_size: int = 8
) -> list[Batch]:
    """What a file or folder holds (`read_examples`), as calls of a transformers model.

    source: the folder or repository with the model's processors. max_length: tokens of a text, at most as many as the
    model has positions for. An encoder-decoder is to say the `target`, else the text itself, or what it generates where
    there is only an image or a sound. Raises ValueError or ImportError that says what is missing.
    """
    takes = inputs_of(model)
    examples = read_examples(path)
    joined = _check(examples, takes)
    says = _decoder_texts(examples, takes) if takes.decoder else None
    tokenizer = load_tokenizer(source) if ("text" in takes.needs and not joined) or says else None
    if joined or (tokenizer is not None and tokenizer.pad_token is None):
        batch_size = 1  # nothing to fill shorter texts up with
    if joined:
        calls = list(_joined_by_processor(examples, takes, load_processor(source)))
    else:
        rows = _media_rows(examples, takes, model, source)
        if len({tuple((name, value.shape) for name, value in row.items()) for row in rows}) > 1:
            batch_size = 1  # nor shorter sounds, so that the model does not see it
        calls = [_stacked(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        if "text" in takes.needs:
            texts = [x.text for x in examples]
            calls = _beside(calls, tokenized(texts, tokenizer, takes, model, max_length, batch_size))
    calls = [_in_precision(call, model) for call in calls]
    if says:
        calls = _beside(calls, tokenized(says, tokenizer, takes, model, max_length, batch_size, decoder=True))
    elif takes.decoder:
        calls = [call | generated(call, takes, model, max_length) for call in track(calls, "generating")]
    if missing := sorted(takes.required - calls[0].keys()):
        raise ValueError(f"{takes.model} needs {', '.join(missing)}, which none of its processors makes: {ELSEWHERE}")
    return as_batches(calls)


def _check(examples: list[Example], takes: ModelInputs) -> bool:
    """Whether a processor has to join images to texts. ValueError names the first example that lacks what the model
    needs, or has what cannot be given to it; warns of what the model does not take."""
    for kind in ("text", "image", "audio"):
        having = [x.origin for x in examples if getattr(x, kind) is not None]
        lacking = [x.origin for x in examples if getattr(x, kind) is None]
        if kind in takes.needs and lacking:
            raise ValueError(
                f"{lacking[0]}: has no {kind}, which {takes.model} needs; a line of a .jsonl file for it: {takes.line}"
            )
        if kind == "audio" and having and kind in takes.takes - takes.needs:
            raise ValueError(
                f"{having[0]}: {takes.model} takes sounds within texts or instead of them, which is not "
                f"done from files: {ELSEWHERE}"
            )
    for kind in {"image", "audio"} - takes.takes:
        if any(getattr(x, kind) for x in examples):
            warnings.warn(f"{takes.model} takes no {kind}: it is left out", stacklevel=3)
    if not takes.decoder and any(x.target for x in examples):
        warnings.warn(f"{takes.model} has no decoder of its own: the target is left out", stacklevel=3)
    return takes.joins_images and any(x.image for x in examples)


def _decoder_texts(examples: list[Example], takes: ModelInputs) -> list[str] | None:
    """What the decoder is to say; None if it is to be generated."""
    says = [x.target or x.text for x in examples]
    lacking = [x.origin for x, text in zip(examples, says, strict=True) if text is None]
    if not lacking:
        return says
    if len(lacking) < len(says):
        raise ValueError(f"{lacking[0]}: has no text, which others have: give one to all of them or to none")
    if not takes.labels:
        raise ValueError(f"{lacking[0]}: has no text for the decoder, and {takes.model} has no head to generate one")
    return None


def _joined_by_processor(examples: list[Example], takes: ModelInputs, processor: Callable) -> Iterator[dict]:
    """Calls of one example each; its image stands where the text has the processor's image token, else before it."""
    token = getattr(processor, "image_token", None)
    for x in track(examples, "reading"):
        text, images = x.text, [read_image(x.image)] if x.image else None
        if images and isinstance(token, str) and token not in text:
            text = f"{token}\n{text}"
        found = processor(images=images, text=[text], return_tensors="pt")
        yield {name: value for name, value in found.items() if name in takes.arguments}


def _media_rows(examples: list[Example], takes: ModelInputs, model: nn.Module, source: str) -> list[dict[str, Tensor]]:
    """What the model's processors make of the image and the sound of every example, (1, ...) each; empty if it needs
    neither."""
    rows: list[dict[str, Tensor]] = []
    makers = {"image": _image_maker, "audio": _sound_maker}
    for kind, maker in makers.items():
        if kind in takes.needs:
            make = maker(model, source)
            found = [_taken(make(getattr(x, kind)), kind, takes) for x in track(examples, "reading")]
            rows = [a | b for a, b in zip(rows, found, strict=True)] if rows else found
    return rows


def _image_maker(model: nn.Module, source: str) -> Callable[[Path], dict]:
    process = load_image_processor(source)
    return lambda path: process(images=read_image(path), return_tensors="pt")


def _sound_maker(model: nn.Module, source: str) -> Callable[[Path], dict]:
    process = load_feature_extractor(source)
    lengths = getattr(model, "_get_feat_extract_output_lengths", None)

    def make(path: Path) -> dict:
        sound = read_sound(path, process.sampling_rate)
        if model.main_input_name == "input_values" and lengths and int(lengths(torch.tensor(len(sound)))) < 1:
            raise ValueError(f"{path}: its {len(sound)} samples are too few for {type(model).__name__}")
        return process(sound, sampling_rate=process.sampling_rate, return_tensors="pt")

    return make


def _taken(made: dict, kind: str, takes: ModelInputs) -> dict[str, Tensor]:
    """Of what a processor made, what the model takes; ValueError if its main input is not among it."""
    found = {name: value for name, value in made.items() if name in takes.arguments and isinstance(value, Tensor)}
    if not found.keys() & takes.arguments_of(kind):
        raise ValueError(
            f"the processor makes {', '.join(made)} of {kind}, and {takes.model} takes "
            f"{', '.join(sorted(takes.arguments_of(kind)))}: is it the processor of another model?"
        )
    return found


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _beside(calls: list[dict], others: list[dict]) -> list[dict]:
    """Calls with the arguments of both, for the same examples."""
    return [a | b for a, b in zip(calls, others, strict=True)] if calls else others


def _in_precision(call: dict, model: nn.Module) -> dict:
    """The call with its numbers in the model's precision, of which processors know nothing."""
    return {
        name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }
