"""Whatever a model takes, as a list of calls to it: dicts, tensors, tuples, a DataLoader, or texts with a tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor, nn

from ..util import nested
from ..util.names import checks_keywords
from .masks import Masks, find_masks, given_masks
from .traits import parameters_of, traits_of

# From an item of the data to where its positions count; for an encoder-decoder perhaps by "encoder" and "decoder".
MaskFunction = Callable[[object], "Tensor | Mapping[str, Tensor] | None"]
# (model, batch) -> the model's output, for models that are not run by calling them with the batch.
Forward = Callable[[nn.Module, "Batch"], object]


@dataclass(frozen=True)
class Batch:
    """One call of a model: its arguments, and which of their positions count. `shrank.batches` makes them.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        masks: True where a token counts, for activations to be matched with.
        forward: (model, batch) -> output, where the model is not run by calling it with the arguments.
        answer: What the caller's mask function gave.
        number: The place of the call in the data.
    """

    args: tuple
    kwargs: Mapping[str, object]
    masks: Masks = field(default_factory=Masks)
    forward: Forward | None = None
    answer: object = None
    number: int = 0

    def call(self, model: nn.Module) -> object:
        """The model's output, computed where its first parameter is."""
        device = device_of(model)
        args, kwargs = nested.mapped(lambda t: t.to(device), self._call_of(model))
        if self.forward is not None:
            return self.forward(model, replace(self, args=args, kwargs=kwargs))
        return model(*args, **kwargs)

    def arguments(self, model: nn.Module | None = None) -> dict[str, object]:
        """What the model gets, by the names of its parameters, with the entries of mappings among them."""
        found: dict[str, object] = {}
        self.with_arguments(model, found.setdefault)
        return found

    def with_arguments(self, model: nn.Module | None, change: Callable[[str, object], object]) -> Batch:
        """With `change(name, value)` in the place of every argument and of the entries of mappings among them."""
        args, kwargs = (self.args, dict(self.kwargs)) if model is None else self._call_of(model)
        names = [
            p.name
            for p in ([] if model is None or self.forward else parameters_of(model))
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        names += [f"argument {i}" for i in range(len(names), len(args))]

        def changed(name: str, value: object) -> object:
            if not isinstance(value, Mapping):
                return change(name, value)
            made = nested.mapped(lambda t: t, value)
            for key, entry in value.items():
                if (new := change(str(key), entry)) is not entry:
                    made[key] = new
            return made

        args = tuple(changed(name, value) for name, value in zip(names, args, strict=False))
        return replace(self, args=args, kwargs={name: changed(name, value) for name, value in kwargs.items()})

    def mask_for(self, leading: tuple[int, ...], streams: set[str] | None = None) -> Tensor | None:
        """The mask, flat, of activations whose shape without the features is this; None if every token counts.
        streams: of `shrank.masks`, which the activations depend on, if that is known."""
        return self.masks.fit(leading, streams)

    def content(self) -> tuple:
        """Everything that distinguishes this batch."""
        masks = [(mask.name, mask.stream, mask.time_first, mask.counts) for mask in self.masks]
        return self.args, dict(sorted(self.kwargs.items())), masks, self.forward

    def _call_of(self, model: nn.Module) -> tuple[tuple, dict[str, object]]:
        """The arguments; a dict that does not name them is itself the only one that the model wants."""
        if self.forward is not None:
            return self.args, dict(self.kwargs)
        parameters = parameters_of(model)
        required = [
            p.name
            for p in parameters
            if p.default is inspect.Parameter.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        unfilled = [name for name in required[len(self.args) :] if name not in self.kwargs]
        if len(required) == len(unfilled) == 1 and not self.kwargs.keys() <= named:
            return (dict(self.kwargs),), {}
        return self.args, dict(self.kwargs)


@checks_keywords
def batches(
    data: Iterable[object],
    tokenizer: Callable | None = None,
    *,
    mask: MaskFunction | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    forward: Forward | None = None,
) -> list[Batch]:
    """Make the calls of a model that data stands for, in order, kept in memory.

    Args:
        data: Mappings (keyword arguments, or the only argument of a model that takes one mapping), tuples or lists
            (positional arguments), tensors (the only argument), a DataLoader of such, or texts; or one mapping, tensor
            or text.
        tokenizer: Turns texts into batches; needed for texts only.
        mask: From an item of the data to a boolean tensor (batch, positions), True where a token counts, or to a
            mapping of "encoder" and "decoder" to such. Without it the masks among the arguments are used.
        batch_size: Texts in a batch; 1 without a padding token.
        max_length: Tokens of a text that are used.
        forward: (model, batch) -> output, where the model is not run by calling it with the batch. An item may then be
            any other object too, which is `batch.args[0]`.

    Returns:
        A Batch for each call: what `calibrate`, `auto_fact`, `heal` and `measure_errors` take.

    Raises:
        TypeError: An item is none of these, texts come without a tokenizer or are mixed with other items.
        ValueError: There is no item.
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
            raise TypeError("texts were given without a tokenizer: give shrank.batches(texts, tokenizer)")
        items = list(_tokenized(texts, tokenizer, batch_size, max_length))
    return [
        item if isinstance(item, Batch) else replace(_batch(item, mask, forward), number=number)
        for number, item in enumerate(items)
    ]


def as_batches(data: Iterable[object]) -> list[Batch]:
    """What a caller gave as data: calls that `batches` made, or what it makes of anything else untold."""
    return batches(data)


def bound(calls: Iterable[Batch], model: nn.Module) -> list[Batch]:
    """The batches with their masks as this model means them."""
    traits, made = traits_of(model), []
    for batch in calls:
        arguments = batch.arguments(model)
        masks = given_masks(batch.answer, arguments, traits) if batch.masks.given else find_masks(arguments, traits)
        made.append(replace(batch, masks=masks))
    return made


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter that has data lives; the CPU if none has."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _batch(item: object, mask: MaskFunction | None, forward: Forward | None) -> Batch:
    if isinstance(item, Mapping):
        args, kwargs = (), dict(item)
    elif isinstance(item, tuple | list):
        args, kwargs = tuple(item), {}
    elif isinstance(item, Tensor) or forward is not None:
        args, kwargs = (item,), {}
    else:
        raise TypeError(
            f"a batch must be a mapping, a tuple, a list, a tensor or a text, got {type(item).__name__}: "
            "give an object that is the only argument as (object,), or say how to run it with "
            "shrank.batches(data, forward=)"
        )
    batch = Batch(args, kwargs, forward=forward)
    if mask is None:
        return replace(batch, masks=find_masks(batch.arguments()))
    answer = mask(item)
    return replace(batch, masks=given_masks(answer), answer=answer)


def _tokenized(texts: list[str], tokenizer: Callable, batch_size: int, max_length: int) -> Iterable[Mapping]:
    if getattr(tokenizer, "pad_token", "") is None:
        batch_size = 1  # without a padding token texts of different lengths cannot share a batch
    texts = iter(texts)
    while chunk := list(islice(texts, batch_size)):
        yield dict(
            tokenizer(chunk, padding=len(chunk) > 1, truncation=True, max_length=max_length, return_tensors="pt")
        )
