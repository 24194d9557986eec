"""A model that runs through one block at a time, and gradients that go back the same way."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from shrank.calibration.batches import Batch, as_batches
from shrank.calibration.losses import Custom
from shrank.calibration.masks import Mask
from shrank.streaming.course import END, Course
from shrank.streaming.cut import Cut
from shrank.streaming.gradients import SentBack
from shrank.streaming.values import Unstreamable, is_whole, read_masks, read_value, thin, write_masks, write_value
from tests.common.models import WIDTH, draw, seeded
from tests.common.tolerances import assert_close


class Block(nn.Module):
    """Returns a tensor that is used, one that is not, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor | None], int]:
        h = torch.tanh(self.inner(x))
        return h * scale, {"squares": h.square(), "nothing": None, "places": h.argmax(-1)}, 2


class Skips(nn.Module):
    """Blocks that look at others than the one before; the end looks at the first as well."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first, more, factor = self.blocks[0](x + 1)
        second = self.blocks[1](first * factor)[0]
        first[..., 0] = 0.0  # in place, between the blocks
        third = self.blocks[2](second + more["squares"], scale=0.5)[0]
        fourth, _, _ = self.blocks[3](third)
        return fourth * (more["places"][..., None] + 1) + first


UNITS = {f"blocks.{i}": [f"blocks.{i}.inner"] for i in range(4)}


def model_and_cut(build: Callable[[], nn.Module], folder: Path) -> tuple[nn.Module, Cut]:
    model = seeded(build).requires_grad_(False)
    return model, Cut(model, UNITS, folder / "outputs", Course([[]]))


def swept(cut: Cut, batch: Batch) -> list[str]:
    """The units, after the batch went through all of them."""
    while unit := cut.next(batch):
        cut.keep(unit, 0, cut.through(batch, unit))
        cut.course.orders[0].append(unit)
    return cut.course.orders[0]


def test_only_what_a_unit_depends_on_is_read(tmp_path) -> None:
    model, cut = model_and_cut(Skips, tmp_path)
    batch = as_batches([draw(5, WIDTH)])[0]
    assert swept(cut, batch) == list(UNITS)
    needs = {unit: sorted(cut.course.of(unit)) for unit in (*UNITS, END)}
    assert needs == {
        "blocks.0": [],
        "blocks.1": [("blocks.0", 0)],
        "blocks.2": [("blocks.0", 1), ("blocks.1", 0)],
        "blocks.3": [("blocks.2", 0)],
        END: [("blocks.0", 0), ("blocks.3", 0)],
    }
    assert cut.course.consumers("blocks.0", 0) == ["blocks.3", "blocks.2", "blocks.1"]
    expected = batch.call(model)
    assert_close(cut.through(batch, "blocks.3", to_end=True), expected)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_gradients_are_those_of_the_whole_model(tmp_path) -> None:
    model, cut = model_and_cut(Skips, tmp_path)
    batch = as_batches([draw(5, WIDTH)])[0]
    swept(cut, batch)
    loss = Custom(lambda output, batch: output.square().sum())
    seen: dict[str, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()
        output.register_hook(lambda gradient: seen.setdefault(names[module], []).append(gradient))
        return output

    names = {block.inner: f"blocks.{i}" for i, block in enumerate(model.blocks)}
    for inner in names:
        inner.register_forward_hook(note)
    loss.backward(batch.call(model), batch, torch.Generator())
    for unit in reversed(UNITS):
        output = cut.through(batch, unit, graph=True, to_end=cut.course.is_last(unit, 0))
        assert SentBack(cut, unit, loss, 0, tmp_path / "gradients").backward(output, batch, torch.Generator()) == 5
    for unit in UNITS:
        whole, parts = seen[unit]
        assert_close(parts, whole)


def test_what_was_thinned_out_is_made_again(tmp_path) -> None:
    model, cut = model_and_cut(Skips, tmp_path)
    batch = as_batches([draw(5, WIDTH)])[0]
    swept(cut, batch)
    expected = batch.call(model)
    cut.thin_out({"blocks.1"})
    assert [unit for unit in UNITS if cut.is_kept(unit, 0)] == ["blocks.1"]
    assert torch.equal(cut.through(batch, "blocks.3", to_end=True), expected)
    assert [unit for unit in UNITS if cut.is_kept(unit, 0)] == ["blocks.0", "blocks.1", "blocks.2"]
    gone = Cut(model, UNITS, tmp_path / "outputs", cut.course, lasting=False)
    gone.thin_out(set())
    with pytest.raises(Unstreamable, match=r"something depends on what blocks\.0 returned"):
        gone.through(batch, "blocks.1")


class Twice(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[0](x)[0])[0]


class Shared(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x, SimpleNamespace(held=x))[0]


class Opened(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0].inner(x))[0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, "blocks.0 runs several times in one run of the model"),
        (Shared, "blocks.0 shares a SimpleNamespace with other parts of the model"),
        (Opened, "layers of blocks.0 are called although it is not called itself"),
    ],
)
def test_what_cannot_be_cut_says_why(kind: type[nn.Module], reason: str, tmp_path) -> None:
    model, cut = model_and_cut(kind, tmp_path)
    if kind is Shared:
        model.blocks[0].forward = lambda x, cache: (x, {}, 0)
    with pytest.raises(Unstreamable, match=re.escape(reason)):
        swept(cut, as_batches([draw(5, WIDTH)])[0])


def test_values_in_files(tmp_path) -> None:
    twice = draw(2, 3)
    value = (twice, [None, {"a": twice, "b": torch.arange(3)}], draw(4).bfloat16(), True, 1.5, "word")
    write_value(tmp_path / "value", value, "it")
    found = read_value(tmp_path / "value", lambda number: number != 2, lambda number, tensor: tensor)
    assert type(found) is tuple and found[1][0] is None and found[3:] == value[3:]
    assert torch.equal(found[0], twice) and torch.equal(found[1][1]["a"], twice)
    assert torch.equal(found[1][1]["b"], torch.arange(3))  # whole numbers are always read
    assert torch.equal(found[2], torch.zeros(4, dtype=torch.bfloat16))  # not wanted
    thin(tmp_path / "value")
    assert not is_whole(tmp_path / "value") and not is_whole(tmp_path / "other")
    left = read_value(tmp_path / "value", lambda number: False, lambda number, tensor: tensor)
    assert (
        torch.equal(left[1][1]["b"], torch.arange(3))
        and torch.equal(left[0], torch.zeros(2, 3))
        and left[3:] == value[3:]
    )
    with pytest.raises(Unstreamable, match="it returns a Batch, which no file can hold"):
        write_value(tmp_path / "other", replace(as_batches([twice])[0]), "it")


def test_masks_in_files(tmp_path) -> None:
    masks = [Mask("attention_mask", draw(2, 7) > 0, "audio"), Mask("other", draw(2, 3) > 0, None, time_first=True)]
    write_masks(tmp_path / "masks", {3: masks, 4: [], 5: masks[:1]})
    found = read_masks(tmp_path / "masks")
    assert found.keys() == {3, 5} and len(found[3]) == 2
    for mask, here in zip(masks, found[3], strict=True):
        assert torch.equal(mask.counts, here.counts)
        assert (mask.name, mask.stream, mask.time_first) == (here.name, here.stream, here.time_first)
    write_masks(tmp_path / "none", {0: []})
    assert read_masks(tmp_path / "none") == {}
