"""Which positions of a model's inputs count: the masks among its arguments, and the activations that they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Arguments by what they are of, the first that fits; an activation that depends on several is the last one's.
STREAMS = ("image", "audio", "source", "main", "decoder")
_PREFIXES = {
    "decoder": ("decoder_", "tgt"),
    "source": ("encoder_", "memory"),
    "image": ("pixel", "image", "visual", "video"),
    "audio": ("input_features", "input_values", "feature", "audio"),
}
_COUNTING = {
    "attention_mask",
    "encoder_attention_mask",
    "decoder_attention_mask",
    "decoder_padding_mask",
    "pixel_mask",
    "pixel_attention_mask",
    "image_attention_mask",
    "visual_attention_mask",
    "input_features_mask",
    "input_values_mask",
    "feature_attention_mask",
    "audio_attention_mask",
    "entity_attention_mask",
    "qformer_attention_mask",
}
# True, or -inf, where there is padding.
_PADDING = {"key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "input_mask"}
# What a sequence to be predicted is padded with, whatever the model.
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Mask:
    """Where the positions of an argument count: `counts` (batch, *positions), boolean, on the CPU. stream: what it is
    of, None for everything that it fits; time_first: whether activations have their positions before the batch."""

    name: str
    counts: Tensor
    stream: str | None = None
    time_first: bool = False

    @property
    def has_padding(self) -> bool:
        return not bool(self.counts.all())

    def fit(self, leading: tuple[int, ...]) -> Tensor | None:
        """The mask, flat, of activations whose shape without the features is this; None if it is not of them."""
        counts, leading = self.counts, tuple(leading)
        if len(leading) == 1 and leading[0] == counts.numel():
            return (counts.mT if self.time_first and counts.dim() == 2 else counts).flatten()
        if counts.dim() == 1:
            return None
        if counts.dim() > 2:
            return counts.flatten() if leading in (tuple(counts.shape), tuple(counts.flatten(1).shape)) else None
        straight, turned = (leading[:2] == tuple(shape) for shape in (counts.shape, counts.mT.shape))
        if turned and (self.time_first or not straight):
            counts, straight = counts.mT, True
        if straight:  # one or more vectors for every position
            return counts.reshape(*counts.shape, *(1,) * (len(leading) - 2)).expand(leading).flatten()
        if len(leading) > 2 and (leading[0], leading[-1]) == tuple(counts.shape):  # heads in between
            return counts.reshape(len(counts), *(1,) * (len(leading) - 2), -1).expand(leading).flatten()
        return None

    def followed(self, before: tuple[int, ...], after: tuple[int, ...]) -> list[Mask]:
        """Of the output positions `after` of a convolution over the positions `before`, where these are the mask's or,
        as behind pooling, those of an image of another size."""
        positions = tuple(self.counts.shape[1:])
        if positions == before or len(positions) == len(before) > 1:
            return [replace(self, counts=resampled(self.counts, sizes)) for sizes in (after, before)]
        if len(positions) == 1 and len(before) > 1 and positions[0] in before:  # of frames, beside frequencies
            axis = before.index(positions[0])
            frames = resampled(self.counts, after[axis : axis + 1])
            shape = [len(frames), *(after[axis] if i == axis else 1 for i in range(len(after)))]
            return [replace(self, counts=frames), replace(self, counts=frames.view(shape).expand(len(frames), *after))]
        return []


# (positions, counts (batch, positions before)) -> counts (batch, positions), or None where it says nothing of them.
Rule = Callable[[int, Tensor], Tensor | None]


class Masks:
    """The masks of one batch, and what becomes of them behind convolutions."""

    def __init__(self, found: tuple[Mask, ...] = (), rules: tuple[Rule, ...] = (), given: bool = False) -> None:
        self.found, self.rules, self.given = found, rules, given
        self._derived: list[Mask] = []
        self.asked, self.fitting = False, set()  # whether any activation was, and names of the masks that one fitted

    def __iter__(self) -> Iterator[Mask]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def derived(self) -> tuple[Mask, ...]:
        """Those behind convolutions that ran so far."""
        return tuple(self._derived)

    def restore(self, derived: Iterable[Mask]) -> None:
        """Take masks for those behind convolutions that ran in another process."""
        self._derived += derived

    @property
    def have_padding(self) -> bool:
        return any(mask.has_padding for mask in self.found)

    def fit(self, leading: tuple[int, ...], streams: set[str] | None = None) -> Tensor | None:
        """The mask, flat, of activations of this shape without the features that depend on these streams; None if every
        position counts."""
        self.asked = True
        known = (*self.found, *(new for mask in self.found for new in self._by_rule(mask, leading)), *self._derived)
        masks = [m for m in known if m.stream is None or streams is None or m.stream in streams]
        for mask in sorted(masks, key=lambda m: -STREAMS.index(m.stream or STREAMS[-1])):
            if (flat := mask.fit(leading)) is not None:
                alike = (mask.stream, mask.counts.shape)
                self.fitting |= {m.name for m in known if (m.stream, m.counts.shape) == alike}
                return flat
        return None

    def follow(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Note that a convolution made these positions of those."""
        known = {(m.name, tuple(m.counts.shape)) for m in (*self.found, *self._derived)}
        for mask in [new for m in (*self.found, *self._derived) for new in m.followed(before, after)]:
            if (mask.name, tuple(mask.counts.shape)) not in known:
                known.add((mask.name, tuple(mask.counts.shape)))
                self._derived.append(mask)

    def _by_rule(self, mask: Mask, leading: tuple[int, ...]) -> list[Mask]:
        if mask.counts.dim() != 2 or len(leading) < 2:
            return []
        sequences, before = mask.counts.shape
        places = [n for n, other in (leading[1::-1], leading[:2]) if other == sequences and n != before]
        found = (rule(n, mask.counts) for n in places for rule in self.rules)
        return [replace(mask, counts=counts) for counts in found if counts is not None]


def resampled(counts: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The nearest of the entries (batch, *positions before) at as many positions as are wanted."""
    for dim, wanted in enumerate(positions, 1):
        counts = counts.index_select(dim, torch.arange(wanted) * counts.shape[dim] // max(wanted, 1))
    return counts


@dataclass(frozen=True)
class Traits:
    """What of a model decides how its masks are meant: ids that pad what its decoder gets, the one that starts it,
    whether it has one, and whether it is of transformers, where `padding_mask` is True for what counts."""

    pad: int | None = None
    start: int | None = None
    has_decoder: bool = False
    time_first: bool = False
    of_transformers: bool = True
    rules: tuple[Rule, ...] = ()


def find_masks(arguments: Mapping[str, object], traits: Traits = Traits()) -> Masks:
    """The masks among the arguments of a call, by name."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    streams = streams_of(tensors, traits)
    found = [
        Mask(name, counts, streams.get(name), traits.time_first)
        for name, value in tensors.items()
        if (counts := _counts(name, value, traits)) is not None
    ]
    if "decoder" in streams.values() and not any(mask.stream == "decoder" for mask in found):
        found += _decoder_mask(tensors, traits)
    return Masks(tuple(found), traits.rules)


def given_masks(
    answer: Tensor | Mapping[str, Tensor] | None, arguments: Mapping[str, object] = {}, traits: Traits = Traits()
) -> Masks:
    """What a user's function says: one mask for all that it fits, or those of the "encoder" and the "decoder"."""
    if answer is None:
        return Masks(given=True)
    if isinstance(answer, Tensor):
        answer = {"": answer}
    if not isinstance(answer, Mapping) or not answer.keys() <= {"", "encoder", "decoder"}:
        raise TypeError(
            'mask must return a tensor, None or a mapping of "encoder" and "decoder" to tensors, got '
            f"{sorted(answer) if isinstance(answer, Mapping) else type(answer).__name__}"
        )
    others = [s for s in streams_of(arguments, traits).values() if s != "decoder"] or ["main"]
    streams = {"": None, "encoder": max(others, key=STREAMS.index), "decoder": "decoder"}
    return Masks(
        tuple(
            Mask("mask=", m.detach().bool().cpu(), streams[side], traits.time_first)
            for side, m in answer.items()
            if m is not None
        ),
        traits.rules,
        given=True,
    )


def streams_of(arguments: Mapping[str, object], traits: Traits) -> dict[str, str]:
    """What each argument is of; a mask without data of its own is of the data that there is."""
    streams = {name: stream_of(name, traits) for name in arguments}
    if "decoder" in streams.values() and "main" in streams.values():  # its encoder is all the rest
        streams = {n: "main" if s == "source" and not n.startswith("encoder_") else s for n, s in streams.items()}
    data = {stream for name, stream in streams.items() if not is_mask(name) and name != "labels"}
    if "main" in streams.values() and "main" not in data and (others := data - {"decoder"}):
        other = max(others, key=STREAMS.index)
        streams = {name: other if stream == "main" else stream for name, stream in streams.items()}
    return streams


def stream_of(name: str, traits: Traits) -> str:
    if name == "labels" and traits.has_decoder:
        return "decoder"
    return next((s for s, prefixes in _PREFIXES.items() if name.startswith(prefixes)), "main")


def is_mask(name: str) -> bool:
    return name in _COUNTING | _PADDING or name.endswith("mask")


def _counts(name: str, value: Tensor, traits: Traits) -> Tensor | None:
    """Where the positions count by an argument; None if it is no such mask."""
    if value.dim() < 2 or not (name in _COUNTING | _PADDING or name == "padding_mask"):
        return None
    value = value.detach().cpu()
    inverse = name in _PADDING or (name == "padding_mask" and not traits.of_transformers)
    if value.is_floating_point() and bool((value < 0).any()):  # added to scores: 0 where they count
        value, inverse = value >= 0, False
    value = ~value.bool() if inverse else value.bool()
    # Of attention from every position to every position: what none attends to is padding.
    return value if value.dim() == 2 or "pixel" in name or "image" in name else value.flatten(1, -2).any(1)


def _decoder_mask(tensors: Mapping[str, Tensor], traits: Traits) -> list[Mask]:
    """Of what the decoder gets, where the call says nothing of it: all but padding, or labels that do not count."""
    labels = tensors.get("labels") if traits.has_decoder else None
    ids = next((t for n, t in tensors.items() if n == "decoder_input_ids"), None)
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        counts = (labels != _IGNORED_LABEL) & (labels != (_IGNORED_LABEL if traits.pad is None else traits.pad))
        return [Mask("labels", counts.cpu(), "decoder", traits.time_first)]
    if ids is not None and ids.dim() == 2:
        counts = ids != traits.pad if traits.pad is not None else torch.ones_like(ids, dtype=torch.bool)
        if traits.start == traits.pad:  # the padding right before the first token starts it
            counts = counts | (counts.roll(-1, 1) & (counts.cumsum(1) == 0))
            counts[:, 0] |= ~counts.any(1)
        return [Mask("decoder_input_ids", counts.cpu(), "decoder", traits.time_first)]
    data = [t for n, t in tensors.items() if stream_of(n, traits) == "decoder" and not is_mask(n) and t.dim() > 2]
    ones = [torch.ones(t.shape[:2], dtype=torch.bool) for t in data]
    # Those of tgt in (time, batch, features) are turned, as any mask of theirs is.
    return [Mask("", one.mT if traits.time_first else one, "decoder", traits.time_first) for one in ones[:1]]
