"""What holds for every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

if library := os.environ.get("SHRANK_TEST_LIBRARY"):  # C++ ops for the CPU; they must be there before shrank is
    torch.ops.load_library(library)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models lose more to the hand-over between threads than they gain, many times more on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_accelerator():
    """A process has one state of all its Accelerators, which keeps the precision of the first."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Callable[[str], Path]:
    """From a name of tests.common.model_folders to the folder of that model, which is written once; not to be
    changed."""
    from tests.common.model_folders import write_model

    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: write_model(name, root / name))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """texts.txt, and folders of images and sounds with and without texts beside them."""
    from tests.common.model_folders import write_data

    return write_data(tmp_path_factory.mktemp("data"))
