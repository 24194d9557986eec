"""Gradients on their way back through a model, from unit to unit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.batches import Batch
from ..calibration.losses import Sensitivity
from ..util import nested, tensor_file
from ..util.files import write_text
from .course import END, Leaf
from .cut import Cut


class SentBack(Sensitivity):
    """What sends the gradients of a loss on: from the files of the units behind into one for those before."""

    def __init__(self, cut: Cut, unit: str, loss: Sensitivity, seed: int, folder: Path) -> None:
        self._cut, self._unit, self._loss, self._seed, self._folder = cut, unit, loss, seed, folder

    def backward(self, output: object, batch: Batch, generator: torch.Generator) -> int:
        arrived: dict[Leaf, list[Tensor]] = {leaf: [] for leaf in self._cut.leaves}

        def take(leaf: Leaf, tensor: Tensor) -> None:
            arrived[leaf].append(tensor.grad)
            tensor.grad = None

        for leaf, tensor in self._cut.leaves.items():
            tensor.register_post_accumulate_grad_hook(partial(take, leaf))
        if self._cut.course.is_last(self._unit, batch.number):
            own = torch.Generator().manual_seed(self._seed * 1_000_003 + batch.number)
            write_text(self._samples(batch.number), str(self._loss.backward(output, batch, own)))
        else:
            self._send(output, batch.number)
        tensors = {
            f"{unit}:{number}:{draw}": gradient.contiguous()
            for (unit, number), gradients in arrived.items()
            for draw, gradient in enumerate(gradients)
        }
        tensor_file.write(self._file(self._unit, batch.number), tensors, {"through": self._unit})
        return int(self._samples(batch.number).read_text())

    def _send(self, output: object, number: int) -> None:
        """Send what arrived at the units behind on through this one."""
        draws: dict[int, dict[int, Tensor]] = {}
        for consumer in self._cut.course.consumers(self._unit, number):
            file = self._file(consumer, number)
            names = tensor_file.read_table(file)[0]
            mine = [name for name in names if name.rsplit(":", 2)[0] == self._unit]
            for name, gradient in tensor_file.read(file, mine).items():
                leaf, draw = map(int, name.split(":")[-2:])
                sums = draws.setdefault(draw, {})
                sums[leaf] = sums[leaf] + gradient if leaf in sums else gradient
        outputs = list(nested.tensors(output))
        for draw in sorted(draws):
            reached = {leaf: g for leaf, g in draws[draw].items() if outputs[leaf].requires_grad}
            if reached:
                ends = [outputs[leaf] for leaf in reached]
                torch.autograd.backward(ends, list(reached.values()), retain_graph=draw + 1 < len(draws))

    def _samples(self, number: int) -> Path:
        """Where it is noted from how many rows of the output the gradients of a batch stem."""
        return self._folder / f"{number:06d}.samples"

    def _file(self, unit: str, number: int) -> Path:
        return self._folder / self._cut.place(unit) / f"{number:06d}.safetensors"


def forget_behind(folder: Path, cut: Cut, order: list[str], unit: str) -> None:
    """Delete gradients that only this unit and later ones of this order needed."""
    place = order.index(unit)
    for later in order[place:]:
        needed = {other for other, _ in cut.course.of(later) | cut.course.of(END)}
        if not needed & set(order[:place]):
            for file in (folder / cut.place(later)).glob("*.safetensors"):
                file.unlink()
