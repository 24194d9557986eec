"""The tests of the ops run on every implementation there is: PyTorch and C++ on the CPU, CUDA with `-m gpu`."""

from __future__ import annotations

import os

import pytest

import shrank
from tests.common.ops import pretend_native


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda":
        assert shrank.why_not() == [], "the tests would be of PyTorch's own kernels"
    return request.param


@pytest.fixture
def on_cpp() -> bool:
    """Whether the CPU runs the C++ implementation (tests/csrc/test_ops.py)."""
    return "SHRANK_TEST_LIBRARY" in os.environ


@pytest.fixture
def native(monkeypatch) -> None:
    """As if the native kernels could run here."""
    pretend_native(monkeypatch)
