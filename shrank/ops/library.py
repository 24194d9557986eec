"""Where the ops of shrank are registered, in Python."""

from __future__ import annotations

from collections.abc import Callable

import torch

library = torch.library.Library("shrank", "FRAGMENT")


def define(name: str, schema: str) -> None:
    """Define an op, unless a C++ library that was loaded before has (csrc/ops/schema.cpp has the same schemas)."""
    if not hasattr(torch.ops.shrank, name):
        library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)


def native_op(name: str) -> Callable:
    """An op that native code alone defines (csrc/ops/named_schema.cpp); RuntimeError where none is loaded."""
    if not hasattr(torch.ops.shrank, name):
        raise RuntimeError(f"shrank::{name} is an op of the native extension, which is not loaded")
    return getattr(torch.ops.shrank, name)
