"""Whatever a model takes, as a list of calls to it: dicts, tensors, tuples, a DataLoader, or texts with a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

MaskFunction = Callable[[object], Tensor | None]
_MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Batch:
    """The arguments of one call, and the masks (True where a token counts) that its activations may be matched with."""

    args: tuple
    kwargs: Mapping[str, object]
    masks: tuple[Tensor, ...] = ()

    def call(self, model: nn.Module) -> object:
        """The model's output, computed where its first parameter is."""
        device = device_of(model)
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (self.args, dict(self.kwargs)))
        return model(*args, **kwargs)

    def mask_for(self, leading: tuple[int, ...]) -> Tensor | None:
        """The mask, flat, of activations whose shape without the features is this; None if every token counts."""
        flat = leading[0] if len(leading) == 1 else None
        for mask in self.masks:
            if tuple(mask.shape) == tuple(leading) or mask.numel() == flat:
                return mask.flatten()
        return None

    def update(self, digest: hashlib._Hash) -> None:
        """Feed everything that distinguishes this batch into a hash."""
        for leaf in tree_leaves((self.args, dict(sorted(self.kwargs.items())), self.masks)):
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            else:
                digest.update(repr(leaf).encode())


def as_batches(data: Iterable[object], tokenizer: Callable | None = None, mask: MaskFunction | None = None,
               batch_size: int = 8, max_length: int = 512) -> list[Batch]:
    """The calls that `data` stands for, in order, kept in memory.

    data: an iterable of dicts (keyword arguments), tuples or lists (positional ones) or tensors (the only one), a
    DataLoader of such, of what this function returned, or of texts, which `tokenizer` turns into batches of
    `batch_size` texts of at most `max_length` tokens. mask: from a batch to a boolean (batch, positions) tensor, True
    where a token counts; without it attention masks are used where there are any. Raises TypeError on anything else
    and ValueError where there is nothing.
    """
    if isinstance(data, str | Mapping | Tensor):
        data = [data]
    items = list(data)
    if not items:
        raise ValueError("no batches were given")
    if texts := [item for item in items if isinstance(item, str)]:
        if len(texts) < len(items):
            raise TypeError("texts and other batches cannot be mixed")
        if tokenizer is None:
            raise TypeError("texts were given without a tokenizer: give tokenizer=")
        items = list(_tokenized(texts, tokenizer, batch_size, max_length))
    return [item if isinstance(item, Batch) else _batch(item, mask) for item in items]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter that has data lives; the CPU if none has."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def read_texts(path: str | os.PathLike) -> list[str]:
    """The texts of a file: the `text` of every line of a .jsonl file, else its paragraphs."""
    path = Path(path)
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        texts = []
        for number, line in enumerate(filter(str.strip, content.splitlines()), 1):
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: line {number} is no JSON object with a 'text'") from error
    else:
        texts = [" ".join(paragraph.split()) for paragraph in content.split("\n\n")]
    if not (texts := [text for text in texts if text]):
        raise ValueError(f"{path}: holds no text")
    return texts


def _batch(item: object, mask: MaskFunction | None) -> Batch:
    if isinstance(item, Mapping):
        args, kwargs = (), dict(item)
    elif isinstance(item, tuple | list):
        args, kwargs = tuple(item), {}
    elif isinstance(item, Tensor):
        args, kwargs = (item,), {}
    else:
        raise TypeError(f"a batch must be a dict, a tuple, a list, a tensor or a text, got {type(item).__name__}")
    if mask is None:
        found = [kwargs[name] for name in _MASKS if isinstance(kwargs.get(name), Tensor) and kwargs[name].dim() == 2]
    else:
        found = [m for m in [mask(item)] if m is not None]
    return Batch(args, kwargs, tuple(m.detach().bool().cpu() for m in found))


def _tokenized(texts: list[str], tokenizer: Callable, batch_size: int, max_length: int) -> Iterable[Mapping]:
    if getattr(tokenizer, "pad_token", "") is None:
        batch_size = 1  # without a padding token texts of different lengths cannot share a batch
    texts = iter(texts)
    while chunk := list(islice(texts, batch_size)):
        yield dict(tokenizer(chunk, padding=len(chunk) > 1, truncation=True, max_length=max_length,
                             return_tensors="pt"))
