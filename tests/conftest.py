"""What holds for every test."""

from __future__ import annotations

import os

import pytest
import torch

if library := os.environ.get("SHRANK_TEST_LIBRARY"):  # C++ ops for the CPU; they must be there before shrank is
    torch.ops.load_library(library)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models lose more to the hand-over between threads than they gain, many times more on a busy machine."""
    torch.set_num_threads(1)
