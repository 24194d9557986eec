"""Which arguments the calls inside a model depend on, and so which mask is theirs.

Where the inputs of an encoder and those of a decoder have one length, no shape tells them apart, and one layer may run
on both. The first batch of every form is run again with the arguments of one side changed, and with gradients asked of
them alone: calls whose outputs change, or have a gradient, depend on that side.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..layers.ced import CONVOLUTIONS
from ..model.hooks import Hook, frozen, hooked, in_eval_mode, input_of
from ..util import nested
from .batches import Batch
from .masks import STREAMS, is_mask, streams_of
from .traits import traits_of

# Times what differs between two runs that are alike: nothing, but on some devices.
_BEYOND_NOISE = 10
_ENOUGH = 1 << 20  # numbers of an output to look at
Call = tuple[str, int]  # a module's name, and which of its calls
# Of a call: from a shape without features to the mask of what has it.
MaskOfCall = Callable[[tuple[int, ...]], "Tensor | None"]


class Masking:
    """The masks of the calls of some modules, by name, while a model runs batches that are bound to it.

    `prepare` before anything hooks the model; `begin` before every run; `hooks` during runs of the model itself, before
    those that ask.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.model, self.modules = model, modules
        self._traits = traits_of(model)
        self._known: dict[tuple, dict[str, list[set[str]]]] = {}  # streams of calls by the form of the batch

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Find out what the calls depend on where masks need it; runs the model for every new form of a batch."""
        for batch in batches:
            data = self._data(batch)
            if len(data) > 1 and (form := self._form(batch)) not in self._known:
                self._known[form] = self._probed(batch, data)

    def begin(self, batch: Batch) -> None:
        self._batch, self._calls = batch, Counter()
        self._streams = self._known.get(self._form(batch), {}) if batch.masks.have_padding else {}

    def call(self, name: str) -> MaskOfCall:
        """Of the next call of this module in the run."""
        number, self._calls[name] = self._calls[name], self._calls[name] + 1
        known = self._streams
        if known and name not in known:  # an expert, say, that was not called: as its neighbours
            name = max(known, key=lambda other: _common(name, other))
        calls = known.get(name)
        streams = calls[number % len(calls)] if calls else None
        return partial(self._batch.mask_for, streams=streams)

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        """What follows the masks through convolutions."""
        kinds = tuple(CONVOLUTIONS.values())
        return ((module, self._follow) for module in self.model.modules() if isinstance(module, kinds))

    def _follow(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x, dims = input_of(args, kwargs), len(module.kernel_size)
        if self._batch.masks.have_padding and x.dim() == dims + 2:
            self._batch.masks.follow(tuple(x.shape[2:]), tuple(output.shape[2:]))

    def _form(self, batch: Batch) -> tuple:
        return tuple(
            sorted(
                (name, str(value.dtype), value.dim())
                for name, value in batch.arguments(self.model).items()
                if isinstance(value, Tensor)
            )
        )

    def _data(self, batch: Batch) -> dict[str, list[str]]:
        """The arguments with data of every stream, where padding makes a difference: numbers, or else ids."""
        if not batch.masks.have_padding:
            return {}
        data: dict[str, dict[str, bool]] = {}
        arguments = batch.arguments(self.model)
        for name, stream in streams_of(arguments, self._traits).items():
            if not is_mask(name) and (found := list(nested.tensors(arguments[name]))):
                data.setdefault(stream, {})[name] = any(t.is_floating_point() for t in found)
        return {
            stream: [name for name, numbers in names.items() if numbers or not any(names.values())]
            for stream, names in data.items()
        }

    def _probed(self, batch: Batch, data: dict[str, list[str]]) -> dict[str, list[set[str]]]:
        """The streams that every call depends on: all may depend on the first, which the others come after."""
        first, *others = sorted(data, key=STREAMS.index)
        tables = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        watched, change = {**tables, **self.modules}, _Change(self.model)
        plain, again = (_outputs(self.model, watched, batch) for _ in range(2))
        noise = _BEYOND_NOISE * max((abs(plain[c] - again[c]) for c in plain.keys() & again.keys()), default=0.0)
        found = {call: {first} for call in plain}
        for stream in others:
            changed = _outputs(
                self.model, watched, batch.with_arguments(self.model, partial(change.of_arguments, data[stream]))
            )
            depend = {c for c in plain.keys() & changed.keys() if not abs(plain[c] - changed[c]) <= noise}
            with torch.enable_grad(), frozen(self.model), _nothing_saved():
                asked = batch.with_arguments(self.model, partial(_asked, data[stream]))
                depend |= _with_gradients(self.model, watched, asked, {c for c in depend if c[0] in tables})
            for call in depend & found.keys():
                found[call].add(stream)
        calls = Counter(name for name, _ in found if name in self.modules)
        return {name: [found[name, i] for i in range(count)] for name, count in calls.items()}


def warn_of_masks_that_fit_nothing(batches: Iterable[Batch]) -> None:
    """After runs of these batches: name every mask with padding that no activation had the shape of."""
    told = set()
    for batch in batches:
        for mask in batch.masks if batch.masks.asked else ():
            if mask.name and mask.has_padding and mask.name not in batch.masks.fitting | told:
                told.add(mask.name)
                warnings.warn(
                    f"{mask.name} {tuple(mask.counts.shape)} masks padding, but no layer that was looked at "
                    "has activations of that shape: all their rows count; mask= can say which do",
                    stacklevel=5,
                )


def number_of(y: Tensor) -> float:
    """A number that is another for another tensor, about 1 for all."""
    flat = y.detach().flatten()
    flat = flat[:: len(flat) // _ENOUGH + 1].double()
    mixed = (flat * torch.arange(len(flat), device=flat.device, dtype=flat.dtype).sin()).sum()
    return (mixed / flat.norm().clamp_min(torch.finfo(flat.dtype).tiny)).item()


@torch.no_grad()
def _outputs(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch) -> dict[Call, float]:
    """Of every call of these modules the number that stands for its output."""
    found: dict[Call, float] = {}

    def note(call: Call, y: Tensor) -> None:
        found[call] = number_of(y)

    _watch(model, modules, batch, note)
    return found


def _with_gradients(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch, sources: set[Call]) -> set[Call]:
    """The calls whose outputs have a gradient where those of `sources`, or arguments, ask for one."""
    found: set[Call] = set()

    def note(call: Call, y: Tensor) -> Tensor | None:
        if y.requires_grad or call in sources:
            found.add(call)
        return _asking(y) if call in sources else None

    _watch(model, modules, batch, note)
    return found


def _watch(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch, note: Callable[[Call, Tensor], object]
) -> None:
    """Run a batch, always with the same random numbers, with `note` of every call of these modules and its output."""
    calls: Counter[str] = Counter()

    def hook(name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        y = next((t for t in nested.tensors(output) if t.is_floating_point()), None)
        if y is None:
            return None
        number, calls[name] = calls[name], calls[name] + 1
        new = note((name, number), y)
        return new if output is y else None

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices),
        in_eval_mode(model),
        hooked((module, partial(hook, name)) for name, module in modules.items()),
    ):
        torch.manual_seed(0)
        batch.call(model)


def _nothing_saved() -> torch.autograd.graph.saved_tensors_hooks:
    """For runs without a backward pass: that an output has a gradient is all that is asked."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


def _asked(names: list[str], name: str, value: object) -> object:
    return nested.mapped(lambda t: _asking(t) if t.is_floating_point() else t, value) if name in names else value


def _asking(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_().clone()  # no leaf, which could not be changed in place


class _Change:
    """Other values of the same kind: of numbers, and of ids but for those that mean more than a word, such as the
    places of an image, by the names of the model's settings."""

    def __init__(self, model: nn.Module) -> None:
        self._special = {
            value
            for _, config in nested.walk(getattr(model, "config", None))
            for name, value in nested.attributes(config).items()
            if isinstance(value, int) and name.endswith(("token_id", "token_index"))
        }

    def of_arguments(self, names: list[str], name: str, value: object) -> object:
        return nested.mapped(self._of, value) if name in names else value

    def _of(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return 1 - tensor
        if tensor.dtype not in (torch.int64, torch.int32):
            return tensor
        ordinary = tensor >= 0
        for token in self._special:
            ordinary &= tensor != token
        chosen = tensor[ordinary]
        ids = chosen.unique()
        if len(ids) < 2:  # where exchanging them would change nothing
            return tensor.masked_scatter(ordinary, torch.where(chosen > 0, chosen - 1, chosen + 1))
        return tensor.masked_scatter(ordinary, ids[(torch.searchsorted(ids, chosen) + 1) % len(ids)])


def _common(one: str, other: str) -> int:
    """How many parts of their names agree, from the first on."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
