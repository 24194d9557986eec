"""Saved transformers models in processes of their own: fresh ones, ones without shrank, ones without transformers."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

import shrank
from shrank import LED
from shrank.transformers_hook import join_models
from tests.common.models import HF_MODELS, hf_inputs, hf_model

ROOT = Path(__file__).parents[1]


def run(code: str, *args: str | Path, path: Path | None = ROOT) -> None:
    environment = os.environ | {"PYTHONPATH": str(path or ""), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd="/",
                          env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


LOAD_ALL = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    model = kind.from_pretrained(folder).eval()
    inputs, expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected), folder
"""


def saved_with_outputs(folder: Path, families: Iterable[str], change: Callable[[nn.Module], nn.Module]) -> list[Path]:
    for family in families:
        model = change(shrank.auto_fact(hf_model(family), 0.5))
        model.save_pretrained(folder / family)
        inputs = hf_inputs(model)
        with torch.no_grad():
            torch.save((inputs, model(**inputs)[0]), folder / family / "expected.pt")
    return [folder / family for family in families]


@pytest.mark.parametrize("imports", ["import shrank", "from transformers import AutoModel; import shrank",
                                     "import shrank.hf"])
def test_new_process_and_import_orders(imports, tmp_path):
    families = HF_MODELS if imports == "import shrank" else ["vit"]
    run(f"{imports}\n{LOAD_ALL}", *saved_with_outputs(tmp_path, families, lambda model: model))


def test_a_merged_checkpoint_needs_no_shrank(tmp_path):
    folders = saved_with_outputs(tmp_path, HF_MODELS, shrank.merge)
    run(f"{LOAD_ALL}\nassert 'shrank' not in sys.modules", *folders, path=None)


def test_works_without_transformers(tmp_path):
    run("""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import torch, shrank
build = lambda: torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Unflatten(1, (16, 2)), torch.nn.Conv1d(16, 16, 2))
model, x = shrank.auto_fact(build(), 0.5, allow_slower=True), torch.randn(2, 32)
shrank.save(model, sys.argv[1])
loaded = shrank.load(build(), sys.argv[1])
assert torch.equal(loaded(x), model(x)) and len(shrank.describe(loaded)) == 2
assert type(shrank.merge(loaded)[0]) is torch.nn.Linear and "transformers" not in sys.modules
""", tmp_path / "model.safetensors")


def test_an_older_transformers_is_kept_from_writing_what_it_cannot_load(monkeypatch):
    class PreTrainedModel(nn.Linear):
        def save_pretrained(self, folder: str) -> str:
            return folder

    old = types.ModuleType("modeling_utils")
    old.PreTrainedModel = PreTrainedModel
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    join_models(old)
    assert PreTrainedModel(4, 4).save_pretrained("here") == "here"
    model = PreTrainedModel(4, 4)
    model.layer = LED(4, 4, 2)
    with pytest.raises(RuntimeError, match=r"transformers 4\.57\.1 cannot load low-rank models again"):
        model.save_pretrained("here")
