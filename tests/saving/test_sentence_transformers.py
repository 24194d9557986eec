"""sentence-transformers: every module that was compressed comes back from its folder, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import shrank
from tests.common.sentences import TEXTS, sentence_model


@pytest.mark.parametrize(
    "convolution, part, count", [(False, None, 14), (False, 0, 13), (False, 2, 1), (True, None, 16), (True, 1, 3)]
)
def test_round_trip(convolution, part, count, tmp_path):
    saved = sentence_model(tmp_path / "transformer", convolution)
    shrank.auto_fact(saved if part is None else saved[part], 0.5, allow_slower=True, min_features=8)
    assert len(shrank.describe(saved).low_rank) == count
    saved.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert shrank.describe(loaded) == shrank.describe(saved)
    assert np.array_equal(loaded.encode(TEXTS), saved.encode(TEXTS))


def test_modules_with_low_rank_layers_are_not_pickled(tmp_path):
    model = sentence_model(tmp_path / "transformer")
    shrank.auto_fact(model[2], 8)
    with pytest.raises(ValueError, match="Dense with low-rank layers is loaded again only from safetensors"):
        model.save_pretrained(str(tmp_path / "saved"), safe_serialization=False)
