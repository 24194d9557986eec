"""Files that others write and read through safetensors.torch: what was saved comes back, or an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import shrank
from tests.common.models import Mixed, draw, mlp, seeded


class HubNet(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"map_location": "cpu"}], ids=["plain", "strict", "placed"])
@pytest.mark.parametrize("rule", [{"body.0": 8}, {"body.0": 5, "body.2": 2}], ids=["one", "both"])
@pytest.mark.parametrize("pivot", [False, True])
def test_hub_mixin(options, rule, pivot, tmp_path, capsys):
    saved = shrank.auto_fact(HubNet(96), rule, pivot=pivot).eval()
    saved.save_pretrained(tmp_path)
    loaded = HubNet.from_pretrained(tmp_path, **options)
    assert torch.equal(loaded(draw(3, 96)), saved(draw(3, 96)))
    assert shrank.describe(loaded) == shrank.describe(saved)
    assert not loaded.training and loaded.body[0].in_features == 96


def test_pushing_to_the_hub(tmp_path, monkeypatch, capsys):
    class Hub:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def create_repo(self, repo_id: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: str, **_: object) -> None:
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    saved = shrank.auto_fact(HubNet(), 8)
    saved.push_to_hub("someone/net")
    assert torch.equal(HubNet.from_pretrained(tmp_path / "hub")(draw(3, 64)), saved(draw(3, 64)))


@pytest.mark.parametrize("write, read", [(save_file, load_file), (torch.save, torch.load)], ids=["tensors", "pickle"])
def test_mixins_with_files_of_their_own_load_no_dense_model(write, read, tmp_path, capsys):
    class OwnNet(HubNet):
        def _save_pretrained(self, save_directory: Path) -> None:
            write(self.state_dict(), save_directory / "own")

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **_: object) -> OwnNet:
            model = cls()
            model.load_state_dict(read(Path(model_id) / "own"), strict=False)
            return model

    shrank.auto_fact(OwnNet(), 8).save_pretrained(tmp_path / "small")
    with pytest.raises(RuntimeError, match=r"size mismatch for body\.0\.weight"):
        OwnNet.from_pretrained(tmp_path / "small")
    OwnNet().save_pretrained(tmp_path / "dense")
    OwnNet.from_pretrained(tmp_path / "dense")


def test_the_hub_mixin_of_a_dense_model_is_as_ever(tmp_path, capsys):
    saved = HubNet(32)
    saved.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() is None
    assert torch.equal(HubNet.from_pretrained(tmp_path)(draw(3, 32)), saved(draw(3, 32)))


def test_save_model_is_shrank_save_with_the_callers_metadata(tmp_path):
    saved = shrank.auto_fact(seeded(Mixed), 4, allow_slower=True)
    save_model(saved, tmp_path / "a.safetensors", metadata={"format": "pt"})
    shrank.save(saved, tmp_path / "b.safetensors")
    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "shrank"}
    for path in tmp_path.iterdir():
        loaded = seeded(Mixed)
        missing, unexpected = load_model(loaded, path, strict=False)
        assert not missing and not unexpected
        assert torch.equal(loaded(draw(2, 16, 8, 8)), saved(draw(2, 16, 8, 8)))


def test_load_model_fills_a_model_that_is_low_rank_already(tmp_path):
    saved = shrank.auto_fact(mlp(), 8)
    save_model(saved, tmp_path / "m.safetensors")
    loaded = shrank.auto_fact(mlp(), 8)
    for parameter in loaded.parameters():
        parameter.data.zero_()
    load_model(loaded, tmp_path / "m.safetensors")
    assert torch.equal(loaded(draw(3, 32)), saved(draw(3, 32)))


def test_load_model_refuses_what_does_not_fit(tmp_path):
    save_model(shrank.auto_fact(mlp(), 8), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_model(mlp(2), tmp_path / "m.safetensors", strict=False)
    save_model(shrank.auto_fact(nn.Linear(64, 64), 8), tmp_path / "root.safetensors")
    with pytest.raises(ValueError, match=r"model = shrank\.load\(model, path\)"):
        load_model(nn.Linear(64, 64), tmp_path / "root.safetensors", strict=False)
    (tmp_path / "m.safetensors").write_bytes(b"no file of tensors")
    with pytest.raises(SafetensorError):  # as without shrank
        load_model(mlp(), tmp_path / "m.safetensors")


def test_accelerate_writes_what_only_the_low_rank_model_loads(tmp_path):
    saved = shrank.auto_fact(mlp(), 8)
    accelerate.Accelerator(cpu=True).save_model(saved, tmp_path)
    loaded = shrank.auto_fact(mlp(), 8)
    for parameter in loaded.parameters():
        parameter.data.zero_()
    accelerate.load_checkpoint_in_model(loaded, tmp_path)
    assert torch.equal(loaded(draw(3, 32)), saved(draw(3, 32)))
    for options in ({}, {"device_map": {"": "cpu"}}):
        with pytest.raises((RuntimeError, ValueError), match="shape"):
            accelerate.load_checkpoint_in_model(mlp(), tmp_path, **options)
