"""What counts as data: every form of batch, texts, masks, and files of texts."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BertTokenizerFast

from shrank import auto_fact, calibrate, heal
from shrank.calibration.batches import as_batches, batches, bound
from shrank.calibration.losses import main_output
from shrank.util import nested
from shrank.util.fingerprint import fingerprint
from tests.common.models import WIDTH, draw, hf_model, tokens
from tests.common.tolerances import assert_close


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
    first = batches([draw(3, 4)], mask=lambda item: item[:, 0] > 0)
    assert as_batches(first) == first


def test_texts_are_tokenized_in_batches() -> None:
    texts = ["one two three", "four", "five six", "a much longer text than that"]
    calls = batches(texts, WordTokenizer(), batch_size=3, max_length=4)
    assert [tuple(b.kwargs["input_ids"].shape) for b in calls] == [(3, 3), (1, 4)]
    assert [int(mask.counts.sum()) for mask in calls[0].masks] == [6]
    assert len(batches(texts, WordTokenizer(pad_token=None))) == 4  # cannot be padded


@pytest.mark.parametrize(
    "data, tokenizer, error, says",
    [
        ([], None, ValueError, "no batches"),
        (["a text"], None, TypeError, "without a tokenizer"),
        (["a text", draw(3)], WordTokenizer(), TypeError, "cannot be mixed"),
        ([3.0], None, TypeError, "got float"),
    ],
)
def test_bad_data_is_named(data, tokenizer, error, says) -> None:
    with pytest.raises(error, match=says):
        batches(data, tokenizer)


def test_masks_belong_to_activations_of_their_shape() -> None:
    mask = tokens(2, 5) % 2
    item = {"input_ids": tokens(2, 5), "attention_mask": mask, "decoder_attention_mask": torch.ones(2, 3)}
    (batch,) = as_batches([item])
    assert torch.equal(batch.mask_for((2, 5)), mask.bool().flatten())
    assert torch.equal(batch.mask_for((10,)), mask.bool().flatten())  # tokens of all texts in one dimension
    assert batch.mask_for((2, 3)).all() and len(batch.mask_for((2, 3))) == 6
    assert batch.mask_for((2, 7)) is None and batch.mask_for((4,)) is None


def test_a_function_may_say_what_counts() -> None:
    (batch,) = batches([{"a": draw(2, 5)}], mask=lambda item: item["a"] > 0)
    assert torch.equal(batch.mask_for((2, 5)), (draw(2, 5) > 0).flatten())
    assert batches([draw(2)], mask=lambda item: None)[0].mask_for((2,)) is None


class OneMapping(nn.Module):
    """As a SentenceTransformer: all its inputs are one mapping, which it adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, features: dict, **kwargs: object) -> dict:
        features["sentence_embedding"] = (features["input_ids"] * features["attention_mask"]).sum(1) * self.weight
        return features


@pytest.mark.parametrize("kind", [dict, UserDict, BatchEncoding])
def test_a_mapping_may_be_the_only_argument(kind) -> None:
    item = kind({"input_ids": tokens(2, 5), "attention_mask": tokens(2, 5) % 2})
    expected = (tokens(2, 5) * (tokens(2, 5) % 2)).sum(1)
    for data in (item, (item,), [item]):
        (batch,) = bound(as_batches([data]), OneMapping())
        assert torch.equal(main_output(batch.call(OneMapping())), expected)
        assert torch.equal(batch.mask_for((2, 5)), (tokens(2, 5) % 2).bool().flatten())
        assert set(item) == {"input_ids", "attention_mask"}
    texts = ["one two three", "four"]
    assert main_output(batches(texts, WordTokenizer())[0].call(OneMapping())).tolist() == [11.0, 4.0]


def test_a_dict_that_names_arguments_is_no_mapping_for_one() -> None:
    assert torch.equal(as_batches({"a": draw(3), "b": 1})[0].call(Adds()), draw(3) + 1)
    for item, says in (({"a": draw(3), "c": 1}, "unexpected keyword argument 'c'"), ({"b": 1}, "missing 1 required")):
        with pytest.raises(TypeError, match=says):
            as_batches(item)[0].call(Adds())


def test_tensors_go_to_the_model_wherever_they_are(monkeypatch) -> None:
    box, seen = SimpleNamespace(x=draw(2), rows=[UserDict(y=draw(2)), (draw(2),)]), []
    monkeypatch.setattr("shrank.calibration.batches.device_of", lambda model: torch.device("meta"))
    (batch,) = batches([(box,)], forward=lambda model, batch: seen.extend(batch.args))
    batch.call(Adds())
    assert [t.device.type for t in nested.tensors(seen)] == ["meta"] * 3 and type(seen[0]) is SimpleNamespace
    assert [t.device.type for t in nested.tensors(box)] == ["cpu"] * 3


def test_a_function_may_run_the_model() -> None:
    class Generates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def generate(self, x: Tensor, times: int) -> Tensor:
            for _ in range(times):
                x = torch.tanh(self.layer(x))
            return x

    run = lambda model, batch: model.generate(batch.kwargs["x"], 3)  # noqa: E731
    data = batches([{"x": draw(5, WIDTH)}], forward=run)
    found = calibrate(Generates(), data)
    assert found.tokens("layer") == 15 and found.has_gradients
    small = auto_fact(Generates(), 4, calibrate=data)
    assert small.shrank_plan.low_rank


def digest(item: object) -> str:
    return fingerprint(as_batches([item])[0].content())


def test_the_hash_is_of_everything() -> None:
    same = {"a": draw(3, 4), "b": 1}
    assert digest(same) == digest({"b": 1, "a": draw(3, 4).clone()})
    for other in (
        {"a": draw(3, 4), "b": 2},
        {"a": draw(3, 4) + 1e-6, "b": 1},
        {"a": draw(4, 3), "b": 1},
        {"a": draw(3, 4).double(), "b": 1},
    ):
        assert digest(other) != digest(same)
    assert digest(draw(3, 4).bfloat16()) == digest(draw(3, 4).bfloat16())


def test_a_sentence_transformer(tmp_path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    hf_model("bert").bert.save_pretrained(tmp_path)
    transformer = modules.Transformer(str(tmp_path))
    model = SentenceTransformer(modules=[transformer, modules.Pooling(transformer.get_embedding_dimension())])
    texts = ["one two three", "four", "two two"]
    found = calibrate(model, batches(texts, model.tokenizer))
    name = next(name for name in found if name.endswith("layer.1.output.dense"))
    assert found.tokens(name) == 5 + 3 + 4 and found[name].gradient.any()
    features = model.tokenize(texts)
    for data in (features, (features,)):
        again = calibrate(model, [data])
        assert again.tokens(name) == 12
        assert_close(again[name].data, found[name].data)
    small = auto_fact(model, 0.6, calibrate=batches(texts, model.tokenizer), deepcopy=True)
    assert small.shrank_plan.low_rank and small.encode(texts).shape == (3, WIDTH)
    healed = heal(small, model, batches(texts, model.tokenizer, batch_size=1), steps=2)
    assert healed.shrank_healing.after <= healed.shrank_healing.before
