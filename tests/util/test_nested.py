"""Nested values: every container that a model may take or return is entered, mapped with its type, and left alone."""

from __future__ import annotations

import enum
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from shrank.util import nested
from tests.common.models import draw

Pair = namedtuple("Pair", "x note")


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    note: str = "n"


@dataclass(slots=True)
class Slotted:
    x: Tensor
    note: str = "n"


class Plain:
    def __init__(self, x: Tensor) -> None:
        self.x, self.inner = x, [x]


class Named(dict):
    """A dict with an attribute."""

    def __init__(self, **entries: Tensor) -> None:
        super().__init__(**entries)
        self.extra = entries["x"] + 1


X = draw(3, 4)
FORMS = [
    {"x": X},
    OrderedDict(x=X),
    defaultdict(list, x=X),
    UserDict(x=X),
    BatchEncoding({"x": X}),
    MappingProxyType({"x": X}),
    BaseModelOutput(last_hidden_state=X),
    [X],
    (X, 1),
    UserList([X]),
    deque([X], maxlen=4),
    Pair(X, 1),
    Frozen(X),
    Slotted(X),
    SimpleNamespace(x=X),
    Plain(X),
    Named(x=X),
    {"deep": [(Frozen(X), SimpleNamespace(y=UserDict(x=X)))]},
    {X},
    frozenset([X]),
]


@pytest.mark.parametrize("value", FORMS, ids=lambda v: type(v).__name__)
def test_every_container_is_mapped_with_its_type_and_left_alone(value: object) -> None:
    before = list(nested.tensors(value))
    made = nested.mapped(lambda t: t * 2, value)
    assert type(made) is type(value) and made is not value
    after = list(nested.tensors(made))
    assert len(before) == len(after) > 0
    assert all(torch.equal(2 * old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(before[0], X) and next(nested.tensors(value)) is before[0]


def test_outputs_of_transformers_stay_whole() -> None:
    made = nested.mapped(lambda t: t * 2, BaseModelOutput(last_hidden_state=X))
    assert made["last_hidden_state"] is made.last_hidden_state is made[0]


def test_packed_sequences_keep_their_batch_sizes() -> None:
    packed = pack_sequence([draw(3, 2), draw(2, 2)])
    made = nested.mapped(lambda t: t.double(), packed)
    assert type(made) is type(packed) and made.data.dtype == torch.float64 and made.batch_sizes is packed.batch_sizes


def test_what_a_model_does_to_its_containers_is_not_seen() -> None:
    given = {"features": {"x": X}, "rows": [X], "box": SimpleNamespace(entries=[X])}
    made = nested.mapped(lambda t: t, given)
    made["features"]["new"] = 1
    made["rows"].append(1)
    made["box"].entries.append(1)
    made["box"].new = 1
    assert given["features"].keys() == {"x"} and len(given["rows"]) == 1
    assert vars(given["box"]).keys() == {"entries"}


def test_what_refers_to_itself_and_what_is_shared() -> None:
    loop = SimpleNamespace(x=X)
    loop.me = loop
    made = nested.mapped(lambda t: t + 1, [loop, loop])
    assert made[0] is made[1] and made[0].me is made[0] and len(list(nested.tensors(loop))) == 1


def test_modules_classes_and_values_without_tensors_are_as_they_are() -> None:
    Colour = enum.Enum("Colour", "RED")
    for value in (nn.Linear(2, 2), nn.Linear, len, Colour.RED, "text", torch.float32, SimpleNamespace(a=1), lambda: X):
        assert nested.mapped(lambda t: t * 2, value) is value
        assert not list(nested.tensors(value))


def test_names_are_found_wherever_they_are() -> None:
    for value in (UserDict(x=X), Frozen(X), Slotted(X), Pair(X, 1), SimpleNamespace(x=X), (1, {"deep": Plain(X)})):
        assert next(nested.named(value, "x")) is X
        assert not list(nested.named(value, "y"))
