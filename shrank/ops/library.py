"""Where the ops of shrank are registered, in Python."""

from __future__ import annotations

import torch

library = torch.library.Library("shrank", "FRAGMENT")


def define(name: str, schema: str) -> None:
    """Define an op, unless a C++ library that was loaded before has (csrc/ops/schema.cpp has the same schemas)."""
    if not hasattr(torch.ops.shrank, name):
        library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
