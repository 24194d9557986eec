"""What counts as data: every form of batch, texts, masks, and files of texts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shrank.batches import as_batches, read_texts
from shrank.fingerprint import fingerprint
from tests.common.models import draw, tokens


@dataclass
class WordTokenizer:
    """Words to their lengths, padded with 0."""

    pad_token: str | None = "."

    def __call__(self, texts, padding, truncation, max_length, return_tensors) -> dict[str, Tensor]:
        assert truncation and return_tensors == "pt"
        rows = [[len(word) for word in text.split()][:max_length] for text in texts]
        longest = max(map(len, rows))
        assert padding or len(rows) == 1
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, a: Tensor, b: Tensor = 0) -> Tensor:
        return a + b + self.weight


FORMS = {
    "tensor": (draw(3, 4), draw(3, 4)),
    "tuple": ((draw(3, 4), 2.0), draw(3, 4) + 2),
    "list": ([draw(3, 4), draw(3, 4)], 2 * draw(3, 4)),
    "dict": ({"a": draw(3, 4), "b": 1}, draw(3, 4) + 1),
}


@pytest.mark.parametrize("item, expected", FORMS.values(), ids=FORMS)
def test_every_form_is_a_call(item, expected) -> None:
    for data in ([item, item], iter([item, item])):
        first, second = as_batches(data)
        assert torch.equal(first.call(Adds()), expected) and torch.equal(second.call(Adds()), expected)


def test_one_batch_alone_and_loaders() -> None:
    assert len(as_batches(draw(3, 4))) == len(as_batches({"a": draw(3, 4)})) == 1
    loader = DataLoader(TensorDataset(draw(10, 4), draw(10, 4)), batch_size=4)
    assert [b.call(Adds()).shape[0] for b in as_batches(loader)] == [4, 4, 2]


def test_batches_stay_as_they_are() -> None:
    first = as_batches([draw(3, 4)], mask=lambda item: item[:, 0] > 0)
    assert as_batches(first) == first


def test_texts_are_tokenized_in_batches() -> None:
    texts = ["one two three", "four", "five six", "a much longer text than that"]
    batches = as_batches(texts, WordTokenizer(), batch_size=3, max_length=4)
    assert [tuple(b.kwargs["input_ids"].shape) for b in batches] == [(3, 3), (1, 4)]
    assert [int(mask.counts.sum()) for mask in batches[0].masks] == [6]
    assert len(as_batches(texts, WordTokenizer(pad_token=None))) == 4  # cannot be padded


@pytest.mark.parametrize("data, tokenizer, error, says", [
    ([], None, ValueError, "no batches"),
    (["a text"], None, TypeError, "without a tokenizer"),
    (["a text", draw(3)], WordTokenizer(), TypeError, "cannot be mixed"),
    ([3.0], None, TypeError, "got float"),
])
def test_bad_data_is_named(data, tokenizer, error, says) -> None:
    with pytest.raises(error, match=says):
        as_batches(data, tokenizer)


def test_masks_belong_to_activations_of_their_shape() -> None:
    mask = tokens(2, 5) % 2
    item = {"input_ids": tokens(2, 5), "attention_mask": mask, "decoder_attention_mask": torch.ones(2, 3)}
    batch, = as_batches([item])
    assert torch.equal(batch.mask_for((2, 5)), mask.bool().flatten())
    assert torch.equal(batch.mask_for((10,)), mask.bool().flatten())  # tokens of all texts in one dimension
    assert batch.mask_for((2, 3)).all() and len(batch.mask_for((2, 3))) == 6
    assert batch.mask_for((2, 7)) is None and batch.mask_for((4,)) is None


def test_a_function_may_say_what_counts() -> None:
    batch, = as_batches([{"a": draw(2, 5)}], mask=lambda item: item["a"] > 0)
    assert torch.equal(batch.mask_for((2, 5)), (draw(2, 5) > 0).flatten())
    assert as_batches([draw(2)], mask=lambda item: None)[0].mask_for((2,)) is None


def digest(item: object) -> str:
    return fingerprint(as_batches([item])[0].content())


def test_the_hash_is_of_everything() -> None:
    same = {"a": draw(3, 4), "b": 1}
    assert digest(same) == digest({"b": 1, "a": draw(3, 4).clone()})
    for other in ({"a": draw(3, 4), "b": 2}, {"a": draw(3, 4) + 1e-6, "b": 1}, {"a": draw(4, 3), "b": 1},
                  {"a": draw(3, 4).double(), "b": 1}):
        assert digest(other) != digest(same)
    assert digest(draw(3, 4).bfloat16()) == digest(draw(3, 4).bfloat16())


def test_files_of_texts(tmp_path) -> None:
    plain, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("One\nparagraph.\n\n\nAnother one.\n")
    assert read_texts(plain) == ["One paragraph.", "Another one."]
    lines.write_text('{"text": "One."}\n\n{"text": "Two.", "id": 3}\n')
    assert read_texts(lines) == ["One.", "Two."]
    lines.write_text('{"text": "One."}\n{"txt": "Two."}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_texts(lines)
    plain.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(plain)
