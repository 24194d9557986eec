"""What holds for every test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models lose more to the hand-over between threads than they gain, many times more on a busy machine."""
    torch.set_num_threads(1)
