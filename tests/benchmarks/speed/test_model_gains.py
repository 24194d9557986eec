"""The page of predictions is what the model predicts."""

from __future__ import annotations

import pytest

from benchmarks.speed.model_gains import PAGE, page
from shrank.ops import native


@pytest.mark.skipif(bool(native.problems()), reason="only the extension has the model")
def test_the_page_has_what_the_model_predicts() -> None:
    text = PAGE.read_text()
    assert text == page(text), "python -m benchmarks.speed.model_gains --docs"
