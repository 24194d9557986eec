"""Models of transformers in folders, as the command line reads and writes them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from torch import nn

from . import hf_saving as hf_saving
from .apply import describe
from .checkpoint import not_finite
from .files import replacing
from .plan import RankPlan
from .saving import is_plan


def load_model(source: str) -> nn.Module:
    """The model in a folder or hub repository, as the class that wrote it; ValueError or OSError if there is none."""
    import transformers

    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ValueError(f"{source}: no such folder")
    config = transformers.AutoConfig.from_pretrained(source)
    name = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(f"{source}: transformers {transformers.__version__} has no class {name}")
    return model_class.from_pretrained(source, dtype="auto")


def save_model(model: nn.Module, source: str, folder: str | os.PathLike) -> None:
    """Write the model to a folder, atomically, with the tokenizer and processor files of its source."""
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        for file in Path(source).glob("*") if Path(source).is_dir() else ():
            if file.is_file() and not _is_weights(file) and not (temporary / file.name).exists():
                shutil.copy2(file, temporary / file.name)


def inspect_folder(folder: str | os.PathLike) -> tuple[RankPlan, list[str]]:
    """The plan of a folder that save_pretrained wrote, and what is wrong with the weights; ValueError if it does not
    load."""
    config = Path(folder) / "config.json"
    if not config.is_file() or not is_plan(json.loads(config.read_text()).get("quantization_config")):
        raise ValueError(f"{folder}: has no config.json with a plan of shrank")
    model = load_model(str(folder))
    return describe(model), not_finite(model.state_dict())


def _is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf") or \
        file.name.endswith(".index.json")
