"""The examples run as their docstrings say and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = {
    "demo": (["--keep", "0.9", "--out", "OUT"], ("cosine to dense", "tokens/s", "low-rank")),
    "post_training": ([], ("cosine mean", "merged back")),
    "conv": (["--model", "tiny", "--keep", "0.9", "--tones", "32", "--rounds", "1"], ("mean cents", "keep 0.9")),
    "speech_transformer": (["--quick"], ("parameters", "dense", "LED")),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path) -> None:
    arguments, words = EXAMPLES[name]
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    for word in words:
        assert word in done.stdout, done.stdout


def test_every_example_is_tested() -> None:
    runnable = {p.stem for p in (ROOT / "examples").glob("*.py") if "__main__" in p.read_text()}
    assert runnable == EXAMPLES.keys()
