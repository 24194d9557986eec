"""What lies beside the weights of a transformer in its folder, and which of it goes into a compressed copy."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from torch import nn

from ..layers.seal import sealed_names
from .checkpoint import tensor_names

CARD = "README.md"
MODULES = "modules.json"  # sentence-transformers' list of modules, each in a folder of its own
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".xml",
    ".tflite",
    ".npz",
    ".index.json",
)


def transformer_of(source: str | os.PathLike) -> str:
    """The folder of the transformer within a sentence-transformers folder; '' for any other, whose root it is."""
    if (Path(source) / "config.json").is_file():
        return ""
    paths = _module_paths(Path(source))
    return next((path for path in paths if _is_transformer(Path(source) / path)), "")


def transformer_folder(source: str) -> str:
    """The source itself, or the folder of the transformer within a sentence-transformers folder."""
    place = transformer_of(source)
    return os.path.join(source, place) if place else source


def copy_beside(model: nn.Module, source: Path, target: Path, place: str) -> None:
    """Copy what is not written yet: all of a sentence-transformers folder's other modules, and everywhere else what is
    not weights, exports or checkpoints of the transformer itself, at `place`; its card is not copied."""
    modules = {path for path in _module_paths(source) if path not in ("", place)}
    own = set(model.state_dict())
    own |= sealed_names(own)
    for folder, subfolders, files in os.walk(source):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(folder).relative_to(source)
        kept = [name for name in files if not _is_weights(name)]
        if modules & {path.as_posix() for path in (relative, *relative.parents)}:
            kept = files
        elif relative not in (Path(), Path(place)) and len(kept) < len(files):
            kept = files if _holds_others(Path(folder), own) else []
        for name in kept:
            new = target / relative / name
            if not new.exists() and (relative != Path() or name != CARD):
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(Path(folder) / name, new)


def _module_paths(source: Path) -> list[str]:
    modules = source / MODULES
    return [module.get("path", "") for module in json.loads(modules.read_text())] if modules.is_file() else []


def _is_transformer(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "model_type" in json.loads(config.read_text())


def _holds_others(folder: Path, own: set[str]) -> bool:
    """Whether a folder holds safetensors, and none with a tensor of the transformer: those of another model."""
    files = list(folder.glob("*.safetensors"))
    bare = {name.partition(".")[2] for name in own}  # without or with the name of the base model
    return bool(files) and not any(
        name in own or name in bare or name.partition(".")[2] in own for file in files for name in tensor_names(file)
    )


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS)
