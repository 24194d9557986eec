"""What is noted on a user's model: attributes of these names, and no others."""

from __future__ import annotations

from torch import nn

PLAN = "shrank_plan"  # what its layers became, and why
NARROWED = "shrank_narrowed"  # on layers: of which block they are, and as what
HEALING = "shrank_healing"  # how its factors were trained


def note(model: nn.Module, name: str, value: object) -> None:
    """Into the model's own attributes, past what a module does to tensors and modules that are set on it."""
    vars(model)[name] = value


def noted(model: nn.Module, name: str) -> object:
    """What was noted, or None."""
    return vars(model).get(name)
