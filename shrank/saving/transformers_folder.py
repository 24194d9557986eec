"""Models of transformers in folders, as the command line reads and writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..compression.describe import describe
from ..planning.plan import RankPlan
from ..util.files import replacing
from . import transformers_saving as transformers_saving
from .checkpoint import not_finite
from .checks import is_plan
from .folders import MODULES, copy_beside, transformer_folder, transformer_of
from .model_card import write_card

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_model(source: str) -> nn.Module:
    """The model in a folder or hub repository, as the class that wrote it; ValueError or OSError if there is none.

    Of a sentence-transformers folder, its transformer.
    """
    import transformers

    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ValueError(f"{source}: no such folder")
    source = transformer_folder(source)
    model_class = class_of(transformers.AutoConfig.from_pretrained(source), source)
    return model_class.from_pretrained(source, dtype="auto")


def class_of(config: PreTrainedConfig, source: str) -> type[nn.Module]:
    """The class that wrote a config; ValueError if this transformers does not have it."""
    import transformers

    name = (config.architectures or ["AutoModel"])[0]
    if (found := getattr(transformers, name, None)) is None:
        raise ValueError(f"{source}: transformers {transformers.__version__} has no class {name}")
    return found


def save_model(model: nn.Module, source: str, folder: str | os.PathLike) -> None:
    """Write the model to a folder, atomically, with all that its source has beside the transformer's weights: tokenizer
    and processor files, modules of a sentence-transformers folder, and a card of its own."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "with adapters attached, transformers saves nothing but these; merge them into the model "
            "first: PeftModel.merge_and_unload()"
        )
    place = transformer_of(source)
    with replacing(folder) as temporary:
        model.save_pretrained(temporary / place)
        complete(model, source, temporary, Path(folder).name)


def complete(model: nn.Module, source: str, folder: Path, name: str) -> None:
    """Add to a folder with the weights of a model what its source has beside them, and its card; name: of the folder,
    in the end."""
    if Path(source).is_dir():
        copy_beside(model, Path(source), folder, transformer_of(source))
    write_card(model, source, folder, _loading_code(model, source, name))


def _loading_code(model: nn.Module, source: str, name: str) -> str:
    if (Path(source) / MODULES).is_file():
        return f'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("{name}")'
    kind = type(model).__name__
    return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{name}")'


def inspect_folder(folder: str | os.PathLike) -> tuple[RankPlan, list[str]]:
    """The plan of a folder that save_pretrained wrote, and what is wrong with the weights; ValueError if it does not
    load."""
    config = Path(folder) / transformer_of(folder) / "config.json"
    if not config.is_file() or not is_plan(json.loads(config.read_text()).get("quantization_config")):
        raise ValueError(f"{folder}: has no config.json with a plan of shrank")
    model = load_model(str(folder))
    return describe(model), not_finite(model.state_dict())
