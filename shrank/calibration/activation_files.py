"""What a backward pass needs, in files instead of in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

_SMALLEST = 1 << 18  # bytes: what is less, such as the angles of rotary embeddings, is not worth a file


@dataclass(frozen=True)
class _Stored:
    file: Path
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


@contextmanager
def saved_on_disk(model: nn.Module) -> Iterator[None]:
    """Write what autograd saves of activations to temporary files, which go with the `with` block: memory then hardly
    depends on how deep the model is."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    numbers = count()
    with tempfile.TemporaryDirectory(prefix="shrank-") as folder:

        def pack(tensor: Tensor) -> Tensor | _Stored:
            if tensor.nbytes < _SMALLEST or tensor.is_meta or tensor.untyped_storage().data_ptr() in held:
                return tensor  # the weights are in memory anyway
            file = Path(folder, str(next(numbers)))
            file.write_bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            return _Stored(file, tensor.dtype, tensor.shape, tensor.device)

        def unpack(saved: Tensor | _Stored) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            flat = torch.frombuffer(bytearray(saved.file.read_bytes()), dtype=saved.dtype)
            return flat.view(saved.shape).to(saved.device)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
