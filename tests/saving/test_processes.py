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
import transformers
from torch import nn

import shrank
from shrank import LED
from shrank.saving.transformers_hook import join_models
from tests.common.models import HF_MODELS, hf_inputs, hf_model
from tests.common.sentences import sentence_model

ROOT = Path(__file__).parents[2]


def run(code: str, *args: str | Path, path: Path | None = ROOT) -> None:
    environment = os.environ | {"PYTHONPATH": str(path or ""), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        cwd="/",
        env=environment,
        timeout=120,
        check=False,
    )
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


@pytest.mark.parametrize(
    "imports",
    ["import shrank", "from transformers import AutoModel; import shrank", "import shrank.saving.transformers_folder"],
)
def test_new_process_and_import_orders(imports, tmp_path):
    families = HF_MODELS if imports == "import shrank" else ["vit"]
    run(f"{imports}\n{LOAD_ALL}", *saved_with_outputs(tmp_path, families, lambda model: model))


REFUSED_WITHOUT_SHRANK = """
import sys
def refused(load, what):
    try:
        load()
    except (ValueError, RuntimeError) as error:
        assert what in str(error), error
    else:
        raise AssertionError("was loaded")
    assert "shrank" not in sys.modules
"""


def test_transformers_alone_raises(tmp_path):
    folders = saved_with_outputs(tmp_path, HF_MODELS, lambda model: model)
    for folder in folders:
        load_again = transformers.AutoModel.from_pretrained(folder)
        assert shrank.describe(load_again).low_rank
    run(
        f"""{REFUSED_WITHOUT_SHRANK}
import transformers
for folder in sys.argv[1:]:
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    for loader in (kind, transformers.AutoModel):
        for options in ({{}}, {{"device_map": "cpu"}}, {{"dtype": "float16"}}):
            refused(lambda: loader.from_pretrained(folder, **options), "ignore_mismatched_sizes")
""",
        *folders,
        path=None,
    )


def test_pipelines_and_sentence_transformers_alone_raise(tmp_path):
    saved = shrank.auto_fact(sentence_model(tmp_path / "transformer"), 8)
    saved.save_pretrained(str(tmp_path / "saved"))
    run(
        f"""{REFUSED_WITHOUT_SHRANK}
from sentence_transformers import SentenceTransformer
from transformers import pipeline
refused(lambda: SentenceTransformer(sys.argv[1], device="cpu"), "ignore_mismatched_sizes")
refused(lambda: pipeline("feature-extraction", sys.argv[1]), "Could not load model")
""",
        tmp_path / "saved",
        path=None,
    )


def test_the_hub_mixin_and_diffusers_alone_raise(tmp_path):
    define = """
import torch, huggingface_hub
class Net(torch.nn.Module, huggingface_hub.PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)
"""
    run(
        f"""import sys, shrank, diffusers
{define}
shrank.auto_fact(Net(), 8).save_pretrained(sys.argv[1])
net = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
                            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
shrank.auto_fact(net, 0.5, allow_slower=True).save_pretrained(sys.argv[2])
""",
        tmp_path / "hub",
        tmp_path / "unet",
    )
    run(
        f"""{REFUSED_WITHOUT_SHRANK}
import diffusers
{define}
refused(lambda: Net.from_pretrained(sys.argv[1]), "size mismatch for layer.weight")
refused(lambda: diffusers.UNet2DModel.from_pretrained(sys.argv[2]), "Unknown quantization type, got shrank")
""",
        tmp_path / "hub",
        tmp_path / "unet",
        path=None,
    )


ORDERS = [  # the first is that of lm-evaluation-harness
    "import shrank; from transformers.quantizers.auto import AutoQuantizationConfig",
    "from transformers.quantizers.auto import AutoQuantizationConfig; import shrank",
    "import transformers.modeling_utils; import shrank; from transformers.quantizers import AutoQuantizationConfig",
    "import shrank.saving.transformers_models; from transformers.quantizers.auto import AutoQuantizationConfig",
    "import shrank; import diffusers.models.modeling_utils; from transformers.quantizers import AutoQuantizationConfig",
]


@pytest.mark.parametrize("order", ORDERS)
def test_whatever_of_transformers_is_asked_first_knows_shrank(order, tmp_path):
    low_rank = shrank.auto_fact(hf_model("llama"), 8)
    low_rank.save_pretrained(tmp_path / "small")
    run(
        f"""{order}
import sys, transformers
assert type(AutoQuantizationConfig.from_dict({{"quant_method": "shrank"}})).__name__ == "ShrankConfig"
folder, again = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
model.save_pretrained(again)
assert shrank.describe(transformers.AutoModelForCausalLM.from_pretrained(again)) == shrank.describe(model)
assert len(shrank.describe(model).low_rank) == 14
""",
        tmp_path / "small",
        tmp_path / "again",
    )


@pytest.mark.parametrize("late", [False, True])
def test_functions_of_safetensors_that_others_took_before(late, tmp_path):
    taken = "from safetensors.torch import load_model, save_model"
    run(
        f"""
import sys
{taken if late else ""}
import shrank, torch
{"" if late else taken}
model, path = shrank.auto_fact(torch.nn.Sequential(torch.nn.Linear(64, 64)), 8), sys.argv[1]
save_model(model, path)
loaded = torch.nn.Sequential(torch.nn.Linear(64, 64))
load_model(loaded, path, strict=False)
x = torch.randn(2, 64)
assert torch.equal(loaded(x), model(x))
assert not {{"transformers", "diffusers", "accelerate", "peft", "sentence_transformers"}} & sys.modules.keys()
""",
        tmp_path / "model.safetensors",
    )


def test_a_merged_checkpoint_needs_no_shrank(tmp_path):
    folders = saved_with_outputs(tmp_path, HF_MODELS, shrank.merge)
    run(f"{LOAD_ALL}\nassert 'shrank' not in sys.modules", *folders, path=None)


def test_works_without_transformers(tmp_path):
    run(
        """
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
""",
        tmp_path / "model.safetensors",
    )


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
