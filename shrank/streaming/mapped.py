"""A transformers model whose parameters are the bytes of its files: what is not touched takes no memory, and what was
touched can be let go."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from torch import Tensor, nn

from ..saving.checks import is_plan
from ..saving.folders import transformer_folder
from ..saving.transformers_folder import class_of
from ..util import tensor_file
from ..util.lines import indented
from .values import Unstreamable

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Bytes that may be converted as they are loaded, such as buffers: more would be memory that nothing lets go.
_CONVERTED = 64 << 20


class MappedModel:
    """A model from a folder that transformers wrote, mapped into memory.

    Args:
        source: The folder; of sentence-transformers, that with its modules.

    Attributes:
        model: In eval mode, its parameters without gradients. They must not be changed in place.
        files: The files with its weights.

    Raises:
        ValueError: A file or a tensor is missing, or a file is damaged.
        Unstreamable: The files are none that can be mapped as they are.
    """

    def __init__(self, source: str) -> None:
        self.folder = Path(transformer_folder(source))
        if not self.folder.is_dir():
            raise Unstreamable(f"{source} is no folder on this machine")
        self.files = _files(self.folder)
        tensors, self._places = {}, {}
        for file, names in self.files.items():
            for name, tensor in tensor_file.read(file, names).items():
                tensors[name] = tensor
                self._places[tensor.data_ptr()] = file, name
        self.model = _loaded(self.folder, tensors)
        self._of = self._mapped()
        del tensors
        self.release(self.model)

    def release(self, module: nn.Module) -> None:
        """Let go of what was touched of the parameters of a module: they are mapped anew."""
        by_file: dict[Path, dict[str, Tensor]] = defaultdict(dict)
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta and (place := self._of.get(id(tensor))):
                by_file[place[0]][place[1]] = tensor
        for file, wanted in by_file.items():
            for name, fresh in tensor_file.read(file, wanted).items():
                wanted[name].data = fresh

    def _mapped(self) -> dict[int, tuple[Path, str]]:
        """Where each parameter is, by its id; Unstreamable if too many were converted."""
        held = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        converted = {name: t for name, t in held.items() if t.data_ptr() not in self._places}
        if sum(t.nbytes for t in converted.values()) > _CONVERTED:
            first, tensor = max(converted.items(), key=lambda both: both[1].nbytes)
            raise Unstreamable(
                f"transformers converts {len(converted)} tensors of {self.folder} as it loads them, such as {first}, "
                f"which becomes {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            )
        return {id(t): self._places[t.data_ptr()] for name, t in held.items() if name not in converted}


def _files(folder: Path) -> dict[Path, list[str]]:
    """The names of the tensors in every file with weights; ValueError names what is missing or damaged."""
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text())["weight_map"]
    elif (folder / _ONE).is_file():
        index = dict.fromkeys(tensor_file.read_table(folder / _ONE)[0], _ONE)
    else:
        raise Unstreamable(f"{folder} has neither {_ONE} nor {_INDEX}")
    names: dict[Path, list[str]] = defaultdict(list)
    for name, file in index.items():
        names[folder / file].append(name)
    problems = []
    for file, wanted in names.items():
        if not file.is_file():
            problems.append(f"{file.name}: missing")
            continue
        held = tensor_file.read_table(file)[0]
        problems += [f"{name}: not in {file.name}, where {_INDEX} says it is" for name in wanted if name not in held]
    if problems:
        raise ValueError(f"{folder} is not complete:{indented(problems)}")
    return names


def _loaded(folder: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """The model of these tensors, as transformers renames and ties them."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not is_plan(quantization):
        raise Unstreamable(f"{folder} is quantized")
    model, found = class_of(config, str(folder)).from_pretrained(
        None, config=config, state_dict=tensors, dtype="auto", output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder} lacks weights of the model:{indented(missing)}")
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model.requires_grad_(False).eval()


def bytes_of(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
