"""What the layers of a model see: second moments of their inputs or outputs, and of the gradients that reach them."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..linalg import Columns, FactorizationError, Kept, Metric, Moments, channel_columns, columns, metric
from ..model.hooks import frozen
from ..model.survey import Survey
from ..model.unit_blocks import UnitBlock
from ..util import tensor_file
from ..util.fingerprint import Unhashable, fingerprint
from ..util.names import checks_keywords
from ..util.processes import current
from .batches import Batch, as_batches, bound
from .losses import LossLike, Sensitivity, as_sensitivity
from .metric_source import LayerStatistics
from .moment_files import FORMAT
from .passes import layer_calls, moment_files
from .request import Calibrate
from .sameness import agree_on
from .sharing import Sides
from .streams import Masking
from .unit_blocks import blocks_in


class Calibration(LayerStatistics):
    """Moments by layer name, kept in files of a folder, one for every pass over the data; read when asked for.

    `calibrate` makes them.

    Args:
        folder: Where the files are.
        files: One for every pass over the data.
        unseen: Layers that saw no data.
        unit_blocks: The blocks that can be narrowed, and those that look so with the reason; None: not looked for.
        inputs: Whether all linear layers were observed by their inputs, so that weights may be rounded.

    Attributes:
        reached: Whether gradients came to any layer.
        scales: What the error of a layer is worth over what gradients say, by name, where that was measured.
    """

    def __init__(
        self,
        folder: Path,
        files: Iterable[Path],
        unseen: Iterable[str] = (),
        unit_blocks: Iterable[UnitBlock] | None = None,
        inputs: bool = False,
    ) -> None:
        self.folder, self.inputs = folder, inputs
        self._unit_blocks = None if unit_blocks is None else tuple(unit_blocks)
        self._entries: dict[str, tuple[Path, dict]] = {}
        self.unseen = list(unseen)
        self.reached = False
        self.scales: dict[str, float] = {}
        for file in files:
            header = json.loads(tensor_file.read_table(file)[1]["moments"])
            self._entries |= {fqn: (file, entry) for fqn, entry in header["layers"].items()}
            self.reached |= header["reached"]

    def __contains__(self, fqn: str) -> bool:
        return fqn in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        """True even if no layer saw anything: that is known then."""
        return True

    @property
    def has_gradients(self) -> bool:
        """Whether errors are weighted by a loss."""
        return any("gradient" in entry["tensors"] for _, entry in self._entries.values())

    @property
    def unit_blocks(self) -> tuple[UnitBlock, ...] | None:
        """The blocks that can be narrowed, and those that look so with the reason; None: not looked for."""
        return self._unit_blocks

    def require_gradients(self) -> None:
        """ValueError if there are layers and no gradient came to any."""
        if len(self) and not self.reached:
            raise ValueError(
                "the loss depends on no layer: does the model run without gradients, as generate does? "
                "loss='none' calibrates without"
            )

    def tokens(self, fqn: str) -> int:
        """Tokens, or positions of a convolution's output, that the layer saw."""
        return self._entries[fqn][1]["tokens"]

    def of_inputs(self, fqn: str) -> bool:
        """Whether the layer's moments are those of its inputs, else of its outputs."""
        return self._entries[fqn][1]["of_inputs"]

    def knows_inputs(self, fqn: str) -> bool:
        """Whether its weight may be rounded: the inputs were observed, and stay known."""
        return self.inputs and self.of_inputs(fqn)

    def __getitem__(self, fqn: str) -> Moments:
        if fqn not in self._entries:
            raise KeyError(f"the calibration has no layer {fqn!r}")
        file, entry = self._entries[fqn]
        held = tensor_file.read(file, set(entry["tensors"].values()))
        tensors = {field: held[name] for field, name in entry["tensors"].items()}
        return Moments(
            entry["tokens"], of_inputs=entry["of_inputs"], gradient_samples=entry["gradient_samples"], **tensors
        )

    def metric(
        self, fqn: str, matrices: Tensor, centred: bool, seen: Moments | None = None, kept: Kept | None = None
    ) -> Metric | None:
        """The norm for the error of one layer.

        Args:
            fqn: Its dotted name.
            matrices: Its weight (G, N/G, K/G), one matrix for each group.
            centred: Whether a bias makes up for the mean error.
            seen: What it sees now instead; gradients are those of the calibration.
            kept: Which rows and columns of the weight that the calibration knows are left in `matrices`; by default
                all.

        Returns:
            The norm; None where nothing is known of the layer, or of groups as large as these.

        Raises:
            FactorizationError: The layer is of no consequence, or what it sees is not finite.
        """
        moments = self._seen(fqn, matrices, seen)
        if moments is not None and kept is not None:
            moments = moments.of(kept)
        if moments is None or (not moments.of_inputs and moments.data.shape[:2] != matrices.shape[:2]):
            return None
        return metric(matrices, moments, centred, self.inputs)

    def columns(self, fqn: str, matrices: Tensor, centred: bool, seen: Moments | None = None) -> Columns | None:
        """As `metric`, by the layer's inputs one by one, a convolution's by its channels; None where these were not
        observed."""
        moments = self._seen(fqn, matrices, seen)
        if moments is None or len(matrices) > 1:
            return None
        if moments.channels is not None:
            return channel_columns(matrices, moments, centred)
        if not moments.of_inputs:
            return None
        return columns(matrices, moments, centred)

    def _seen(self, fqn: str, matrices: Tensor, seen: Moments | None) -> Moments | None:
        """The moments of a layer, where its matrices are; FactorizationError where they are of no use."""
        if fqn not in self._entries:
            return None
        moments = self[fqn]
        if seen is not None:
            # The channels of a convolution are observed in the dense model alone.
            kept = ("gradient", "gradient_samples", "channels", "channel_mean")
            moments = replace(seen, **{field: getattr(moments, field) for field in kept})
        moments = moments.to(matrices.device)
        if moments.gradient is not None and not bool(moments.gradient.any()):
            raise FactorizationError("the loss does not depend on it")
        if not bool(moments.data.isfinite().all()):
            raise FactorizationError("what it sees behind compressed layers holds NaN or infinity")
        if moments.gradient is None or fqn not in self.scales:
            return moments
        return replace(moments, gradient=moments.gradient * self.scales[fqn])


@checks_keywords
def calibrate(
    model: nn.Module,
    data: Iterable[object] | Calibration,
    *,
    loss: LossLike = "output",
    layers: Iterable[str] | None = None,
    cache: str | os.PathLike | None = None,
    max_memory: int | None = None,
    spill: bool = False,
    seed: int = 0,
    inputs: bool = False,
    narrow: bool = False,
) -> Calibration:
    """Run data through a model, which is not changed, and note what its layers see.

    Args:
        model: The dense model.
        data: What `shrank.batches` made, or takes without further arguments. A Calibration is returned as it is.
        loss: By which gradients errors are weighted. "output": the sensitivity of the model's outputs to every layer;
            "kl": the divergence of the outputs as distributions, logits or probabilities, without labels; "lm":
            next-token cross entropy; a function (output, batch) -> scalar, summed over what it averages; "none": not at
            all, without a backward pass.
        layers: Names of the layers to observe; by default all that could be replaced.
        cache: A folder. Passes over the data that are found there are not repeated. It is not used, with a warning,
            where model, data or loss hold something that has no value to know it again by.
        max_memory: Bytes for moments that are held at a time; more passes over the data where they do not suffice. By
            default half of what the model takes in float32, and at least 64 MiB.
        spill: Keep what a backward pass needs in temporary files.
        seed: Of the random directions that "output" draws, and of the classes that "kl" does.
        inputs: Observe linear layers by their inputs where these are more numbers than their outputs, too. Rounding
            weights to a few bits needs it.
        narrow: Find the blocks of units too (feed-forward, channels, heads), and observe these one by one: what a plan
            with `narrow` asks for, and more numbers than the ranks of their layers need.

    Returns:
        The moments of every layer, in files that are read when asked for.

    Raises:
        ValueError: Data or gradients are not finite (the text names batch and layer), or no gradient reaches any layer.
    """
    if isinstance(data, Calibration):
        return data
    request = Calibrate(data, loss, cache, max_memory, spill, seed, inputs, narrow)
    return calibrated(Survey(model), request, layers)


def calibrated(survey: Survey, request: Calibrate, layers: Iterable[str] | None) -> Calibration:
    """As `calibrate`, of a model that was looked at before."""
    model = survey.model
    batches, loss = bound(as_batches(request.data), model), as_sensitivity(request.loss)
    wanted = None if layers is None else set(layers)
    agree_on(model, batches)
    how = (wanted and sorted(wanted), type(loss), request.seed, request.max_memory, request.inputs, request.narrow)
    current().agree("the layers and the loss to calibrate", how)
    key = _key(model, batches, loss, request.seed) if request.cache else None
    temporary = None if key else tempfile.TemporaryDirectory(prefix="shrank-")
    folder = Path(request.cache) / key if key else Path(temporary.name)
    blocks = blocks_in(folder, survey, batches) if request.narrow else None
    with frozen(model), torch.set_grad_enabled(loss is not None):
        found = _found(survey, batches, loss, wanted, folder, request, blocks)
    if temporary:
        weakref.finalize(found, temporary.cleanup)
    if loss:
        found.require_gradients()
    return found


def _found(
    survey: Survey,
    batches: list[Batch],
    loss: Sensitivity | None,
    wanted: set[str] | None,
    folder: Path,
    request: Calibrate,
    blocks: list[UnitBlock] | None,
) -> Calibration:
    """What the layers see, in files of the folder; those that are there already are not made again."""
    model = survey.model
    # Stages of low-rank layers are observed for whoever names them.
    known = survey.sites(inside_low_rank=wanted is not None)
    possible = [s for s in known if s.adapter is not None and (not s.inside or s.fqn in wanted)]
    sites = [site for site in possible if (wanted is None or site.fqn in wanted) and not site.why_not()]
    masking = Masking(model, {site.fqn: site.module for site in possible})
    calls = layer_calls(folder, model, sites, batches, masking, [site for site in possible if site not in sites])
    warn_of_unseen(calls.unseen)
    narrowable = [block for block in blocks or () if not block.reason]
    consumers = frozenset(block.consumer for block in narrowable)
    by_channels = consumers & {site.fqn for site in sites if not site.adapter.takes_vectors}
    told_apart = frozenset(fqn for block in narrowable for fqn in block.layers)
    sides = Sides(request.inputs or consumers - by_channels, told_apart, by_channels)
    files = moment_files(folder, sites, calls, batches, masking, loss, request, sides)
    return Calibration(folder, files, calls.unseen, blocks, request.inputs)


def warn_of_unseen(names: list[str]) -> None:
    if names:
        warnings.warn(f"layers that no batch reaches stay as they are: {', '.join(names)}", stacklevel=5)


def _key(model: nn.Module, batches: list[Batch], loss: Sensitivity | None, seed: int) -> str | None:
    """A hash of everything that the moments depend on; None, with a warning, where something cannot be hashed."""
    try:
        parts = {"model": model, "loss": loss, "data": [batch.content() for batch in batches]}
        precision = [
            torch.get_float32_matmul_precision(),
            *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
        ]
        return fingerprint({"format": FORMAT, "seed": seed, "precision": precision} | parts)[:32]
    except Unhashable as unhashable:
        warnings.warn(f"calibrating without the cache: {unhashable}", stacklevel=5)
        return None
