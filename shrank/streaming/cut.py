"""A model that runs through one unit at a time: a block, or a layer outside of all blocks.

Units that a batch has been through return what they returned then, from files; the model's own code between the units
runs each time, so that nothing needs to be known of it. Where that code takes a tensor from is read off the graph that
automatic differentiation makes of it: only what a unit depends on is read, and gradients go back along the same graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..model.hooks import Hook, hooked
from ..util import nested
from .course import END, Course, Leaf, behind
from .values import Unstreamable, is_whole, read_value, thin, write_value

_PLAIN = (Tensor, type(None), bool, int, float, str, tuple, list, dict, torch.dtype, torch.device)


class _Lacking(Exception):
    """A unit depends on leaves that were not read."""

    def __init__(self, leaves: set[Leaf]) -> None:
        self.leaves = leaves


class _Reached(Exception):
    """A unit is called that the batch has not been through."""

    def __init__(self, unit: str) -> None:
        self.unit = unit


class _Left(Exception):
    """The unit has returned."""

    def __init__(self, output: object) -> None:
        self.output = output


class Cut:
    """One model and the files of what its units returned. Those that were thinned out are made again when something
    depends on them.

    Args:
        model: With parameters that ask for no gradient.
        units: The names of its units, and of the layers in each.
        folder: Of the files.
        course: What batches went through so far.
        lasting: Whether its units can run again.
    """

    def __init__(
        self, model: nn.Module, units: Mapping[str, Iterable[str]], folder: Path, course: Course, lasting: bool = True
    ) -> None:
        self.model, self.folder, self.course, self._lasting = model, folder, course, lasting
        self.units = units
        self._places = {unit: f"{number:05d}" for number, unit in enumerate(units)}
        self._whole = set(units)  # all that may have files which are not thinned out
        self.leaves: dict[Leaf, Tensor] = {}  # of the last run

    def modules(self) -> dict[str, nn.Module]:
        """The units as they are now."""
        return {unit: self.model.get_submodule(unit) for unit in self.units}

    def place(self, unit: str) -> str:
        """The name of this unit in files."""
        return self._places[unit]

    def file(self, unit: str, number: int) -> Path:
        """Where what this unit returned of this batch is."""
        return self.folder / self.place(unit) / f"{number:06d}.safetensors"

    def keep(self, unit: str, number: int, output: object) -> None:
        write_value(self.file(unit, number), output, unit)
        self._whole.add(unit)

    def is_kept(self, unit: str, number: int) -> bool:
        return is_whole(self.file(unit, number))

    def thin_out(self, wanted: set[str]) -> None:
        """Leave only what these units returned."""
        for unit in self._whole - wanted:
            for file in (self.folder / self.place(unit)).glob("*.safetensors"):
                thin(file)
        self._whole &= wanted

    def forget(self, unit: str, number: int) -> None:
        self.file(unit, number).unlink(missing_ok=True)

    def through(self, batch: Batch, unit: str, graph: bool = False, to_end: bool = False) -> object:
        """Run a batch until this unit has returned.

        graph: leave the graph from the leaves to the output; else the unit runs without gradients.
        to_end: run on, to the end of the model.

        Returns:
            The output of the unit, or of the model.
        """
        run = partial(_Run, self, batch.number, unit, graph, to_end)
        return self._until_read(unit, batch, to_end, lambda: self._ran(batch, run()))

    def next(self, batch: Batch) -> str | None:
        """The unit that a batch reaches after those that it has been through; None if it reaches the end."""

        def explored() -> str | None:
            run = _Run(self, batch.number, None, True, True)
            try:
                with hooked(self._astray()):
                    output = self._ran(batch, run)
            except _Reached as reached:
                return reached.unit
            run.require(output, END)
            return None

        return self._until_read(END, batch, True, explored)

    def needed(self, unit: str, number: int, to_end: bool = False) -> list[str]:
        """The units of a batch's course before this one, or before the END, that it depends on, in order; to_end: and
        what comes after it."""
        order, leaves = self.course.orders[number], self.course.of(unit) | (self.course.of(END) if to_end else set())
        before = order[: order.index(unit)] if unit in order else order
        return [other for other in before if any(leaf[0] == other for leaf in leaves)]

    def again(self, unit: str, batch: Batch) -> None:
        """Run a unit again whose output was thinned out."""
        if not self.is_kept(unit, batch.number):
            if not self._lasting:
                raise Unstreamable(f"only behind compressed layers something depends on what {unit} returned")
            self.keep(unit, batch.number, self.through(batch, unit))

    def _until_read(self, unit: str, batch: Batch, to_end: bool, attempt: Callable[[], object]) -> object:
        """The result of an attempt, with more leaves read each time it lacks some."""
        while True:
            for other in self.needed(unit, batch.number, to_end):
                self.again(other, batch)
            try:
                return attempt()
            except _Lacking as lacking:
                self.course.of(unit).update(lacking.leaves)

    def _astray(self) -> Iterator[tuple[nn.Module, Hook]]:
        """What to call after layers inside of units, which do not run where these return what they returned before."""

        def refuse(unit: str, *_: object) -> None:
            raise Unstreamable(f"layers of {unit} are called although it is not called itself")

        for unit, names in self.units.items():
            yield from ((self.model.get_submodule(name), partial(refuse, unit)) for name in names if name != unit)

    def _ran(self, batch: Batch, run: _Run) -> object:
        self.leaves = run.leaves
        try:
            with run.installed(), torch.enable_grad():
                return batch.call(self.model)
        except _Left as left:
            return left.output


class _Run:
    """One run of one batch; unit: the one that is run, None for none."""

    def __init__(self, cut: Cut, number: int, unit: str | None, graph: bool, to_end: bool) -> None:
        self._cut, self._number, self._unit, self._graph, self._to_end = cut, number, unit, graph, to_end
        self._known = cut.course.of(unit or END) | (cut.course.of(END) if to_end else set())
        order = cut.course.orders[number]
        self._before = order[: order.index(unit)] if unit in order else order
        self._calls: Counter[str] = Counter()
        self.leaves: dict[Leaf, Tensor] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the units do as they should in this run."""
        modules = self._cut.modules()
        own = {unit: vars(module).get("forward") for unit, module in modules.items()}
        handle = None
        try:
            for unit, module in modules.items():
                vars(module)["forward"] = partial(self._call, unit, module.forward)
            if self._unit and not self._to_end:
                handle = modules[self._unit].register_forward_hook(self._leave)
            yield
        finally:
            if handle:
                handle.remove()
            for unit, module in modules.items():
                del vars(module)["forward"]
                if own[unit] is not None:
                    vars(module)["forward"] = own[unit]

    def require(self, value: object, unit: str) -> None:
        """Raise _Lacking where these depend on leaves that were not read."""
        if lacking := self._behind(value) - self._known:
            raise _Lacking(lacking)

    def _behind(self, value: object) -> set[Leaf]:
        return behind(nested.tensors(value), {id(leaf): name for name, leaf in self.leaves.items()})

    def _call(self, unit: str, forward: Callable, *args: object, **kwargs: object) -> object:
        self._calls[unit] += 1
        if self._calls[unit] > 1:
            raise Unstreamable(f"{unit} runs several times in one run of the model")
        if unit in self._before:
            return self._returned(unit)
        if unit != self._unit:
            self._cut.course.of(unit).update(self._behind((args, kwargs)))
            raise _Reached(unit)
        self.require((args, kwargs), unit)
        if self._graph:
            output = forward(*args, **kwargs)
        else:
            args, kwargs = nested.mapped(Tensor.detach, (args, kwargs))
            with torch.no_grad():
                output = forward(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if not isinstance(value, _PLAIN) and next(nested.tensors(value), None) is not None:
                raise Unstreamable(f"{unit} shares a {type(value).__name__} with other parts of the model")
        return output

    def _returned(self, unit: str) -> object:
        """What a unit returned, its tensors as leaves of a graph."""

        def made(number: int, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            self.leaves[unit, number] = tensor.requires_grad_()
            return tensor.clone()  # a leaf would not bear what the model may do to it in place

        return read_value(self._cut.file(unit, self._number), lambda number: (unit, number) in self._known, made)

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        raise _Left(output)
