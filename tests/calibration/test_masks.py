"""Masks by themselves: which arguments are any, what they are of, and which shapes they fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shrank.calibration.masks import Mask, Masks, Traits, find_masks, given_masks, resampled, streams_of
from tests.common.models import draw, tokens

COUNTS = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
IDS = tokens(2, 4)


@pytest.mark.parametrize(
    "name, value",
    [
        ("attention_mask", COUNTS.long()),
        ("attention_mask", COUNTS.float()),
        ("pixel_attention_mask", COUNTS),
        ("input_features_mask", COUNTS),
        ("padding_mask", COUNTS),
        ("key_padding_mask", ~COUNTS),
        ("input_mask", 1.0 - COUNTS.float()),
        ("src_key_padding_mask", torch.zeros(2, 4).masked_fill(~COUNTS, -torch.inf)),
        ("attention_mask", torch.zeros(2, 1, 4, 4).masked_fill(~COUNTS[:, None, None], torch.finfo(torch.float32).min)),
        ("attention_mask", COUNTS[:, None] & torch.ones(4, 4).tril().bool()),
    ],
)
def test_every_kind_of_mask_says_what_counts(name: str, value: Tensor) -> None:
    (mask,) = find_masks({"inputs_embeds": draw(2, 4, 8), name: value})
    assert mask.name == name and torch.equal(mask.counts, COUNTS)


@pytest.mark.parametrize(
    "name, value",
    [
        ("bool_masked_pos", COUNTS),
        ("global_attention_mask", COUNTS),
        ("mask_labels", COUNTS),
        ("src_mask", COUNTS),
        ("head_mask", COUNTS),
        ("attention_mask", torch.ones(4)),
        ("attention_mask", None),
        ("attention_mask", [[1, 0]]),
    ],
)
def test_other_arguments_are_none(name: str, value: object) -> None:
    assert not len(find_masks({"input_ids": IDS, name: value}))


def test_outside_of_transformers_true_is_padding() -> None:
    (mask,) = find_masks({"x": IDS, "padding_mask": ~COUNTS}, Traits(of_transformers=False))
    assert torch.equal(mask.counts, COUNTS)


@pytest.mark.parametrize(
    "pad, start, arguments, expected",
    [
        (0, 0, {"labels": torch.tensor([[5, 6, -100], [5, 0, 0]])}, [[1, 1, 0], [1, 0, 0]]),
        (None, None, {"labels": torch.tensor([[5, 0, -100], [5, -100, -100]])}, [[1, 1, 0], [1, 0, 0]]),
        (0, 0, {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 5, 0]])}, [[1, 1, 1], [1, 1, 0]]),
        (
            0,
            0,
            {"decoder_input_ids": torch.tensor([[0, 0, 5], [0, 0, 0]])},
            [[0, 1, 1], [1, 0, 0]],
        ),  # padded on the left
        (0, 2, {"decoder_input_ids": torch.tensor([[2, 5, 6], [2, 5, 0]])}, [[1, 1, 1], [1, 1, 0]]),
        (0, 2, {"decoder_input_ids": torch.tensor([[0, 2, 5], [2, 5, 0]])}, [[0, 1, 1], [1, 1, 0]]),
        (0, 0, {"decoder_inputs_embeds": draw(2, 3, 8)}, [[1, 1, 1], [1, 1, 1]]),
        (
            0,
            0,
            {"decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]), "labels": torch.ones(2, 3).long()},
            [[1, 1, 0], [1, 0, 0]],
        ),
    ],
)
def test_what_the_decoder_gets_says_what_counts_where_no_mask_does(pad, start, arguments, expected) -> None:
    found = find_masks({"input_ids": IDS, **arguments}, Traits(pad, start, has_decoder=True))
    (decoder,) = (mask for mask in found if mask.stream == "decoder")
    assert torch.equal(decoder.counts, torch.tensor(expected).bool())


@pytest.mark.parametrize(
    "leading, expected",
    [
        ((2, 4), COUNTS),
        ((8,), COUNTS),
        ((2, 4, 3), COUNTS[..., None].expand(2, 4, 3)),
        ((2, 3, 4), COUNTS[:, None].expand(2, 3, 4)),
        ((4, 2), COUNTS.mT),
        ((4, 2, 3), COUNTS.mT[..., None].expand(4, 2, 3)),
        ((2,), None),
        ((2, 5), None),
        ((2, 7), None),
        ((), None),
        ((3, 4), None),
    ],
)
def test_shapes_that_a_mask_fits(leading: tuple[int, ...], expected: Tensor | None) -> None:
    found = Mask("attention_mask", COUNTS).fit(leading)
    assert found is None if expected is None else torch.equal(found, expected.flatten())


def test_as_many_positions_as_sequences() -> None:
    square = COUNTS[:, :2].clone()
    assert torch.equal(Mask("m", square).fit((2, 2)), square.flatten())
    assert torch.equal(Mask("m", square, time_first=True).fit((2, 2)), square.mT.flatten())
    assert torch.equal(Mask("m", COUNTS, time_first=True).fit((8,)), COUNTS.mT.flatten())


def test_masks_are_those_of_the_streams_that_a_call_depends_on() -> None:
    traits = Traits(has_decoder=True)
    masks = find_masks({"input_ids": IDS, "attention_mask": COUNTS, "labels": IDS}, traits)
    assert torch.equal(masks.fit((2, 4), {"main"}), COUNTS.flatten())
    assert masks.fit((2, 4), {"main", "decoder"}).all() and masks.fit((2, 4)).all()
    assert streams_of({"input_features": 0, "attention_mask": 0, "labels": 0}, traits) == {
        "input_features": "audio",
        "attention_mask": "audio",
        "labels": "decoder",
    }
    assert streams_of({"src": 0, "tgt": 0, "memory_key_padding_mask": 0}, Traits())["memory_key_padding_mask"] == "main"


def test_convolutions_are_followed() -> None:
    masks = Masks((Mask("attention_mask", COUNTS),))
    assert masks.fit((2, 2)) is None
    masks.follow((4,), (2,))
    masks.follow((2,), (1,))
    assert masks.fit((2, 2)).tolist() == [True, True, True, False]
    assert masks.fit((2, 1)).tolist() == [True, True]
    speech = Masks((Mask("attention_mask", COUNTS),))
    speech.follow((4, 10), (2, 5))  # frames by frequencies
    assert torch.equal(speech.fit((2, 2, 5)), torch.tensor([True, True, True, False]).repeat_interleave(5))
    image = Masks((Mask("pixel_mask", COUNTS[:, None].expand(2, 4, 4)),))
    image.follow((4, 4), (2, 2))
    assert image.fit((2, 4)).int().tolist() == image.fit((2, 2, 2)).int().tolist() == [1, 1, 1, 1, 1, 0, 1, 0]


def test_resampling_takes_the_nearest() -> None:
    assert resampled(COUNTS, (8,)).tolist() == COUNTS.repeat_interleave(2, 1).tolist()
    assert resampled(COUNTS, (2,)).tolist() == [[True, True], [True, False]]
    assert resampled(COUNTS, (0,)).shape == (2, 0)


def test_answers_of_a_function() -> None:
    assert given_masks(None).fit((2, 4)) is None
    assert torch.equal(given_masks(COUNTS).fit((2, 4), {"image"}), COUNTS.flatten())
    answer, arguments = {"encoder": COUNTS, "decoder": ~COUNTS}, {"pixel_values": 0, "labels": 0}
    both = given_masks(answer, arguments, Traits(has_decoder=True))
    assert torch.equal(both.fit((2, 4), {"image"}), COUNTS.flatten())
    assert torch.equal(both.fit((2, 4), {"image", "decoder"}), ~COUNTS.flatten())
    with pytest.raises(TypeError, match="got list"):
        given_masks([1, 0])
