"""A checkpoint that is compressed from its files into others, as `auto_fact` compresses a model in memory."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from torch import nn

from ..calibration.request import Calibrate
from ..compression.anchored import require_share
from ..compression.auto_fact import Streamed, auto_fact
from ..model import notes
from ..planning.budget import Budget, SmallestGoodEnough
from ..planning.options import PlanOptions
from ..planning.plan import RankPlan
from ..planning.rank import Rank
from .journal import work_folder
from .values import Unstreamable


class Checkpoint(Streamed):
    """A transformers model in a folder, to be compressed without ever being in memory.

    Args:
        source: The folder, with weights in safetensors; of sentence-transformers, that with its modules.
    """

    def __init__(self, source: str | os.PathLike) -> None:
        self.source = os.fspath(source)

    def model(self) -> nn.Module:
        """Map the model from its files; where they cannot be mapped, load it, with a warning that says why.

        Returns:
            The model. What is not touched of its parameters takes no memory, and they must not be changed in place.

        Raises:
            ValueError: The folder is damaged; the text says what is missing.
        """
        from ..saving.transformers_folder import load_model
        from .mapped import MappedModel  # with transformers, which not everybody has

        try:
            return MappedModel(self.source).model
        except Unstreamable as reason:
            warnings.warn(f"{self.source} is loaded into memory: {reason}", stacklevel=2)
            return load_model(self.source)

    def compressed(
        self,
        folder: str | os.PathLike,
        rank: Rank | Budget | RankPlan,
        options: PlanOptions,
        calibrate: Calibrate | None,
        anchored: float,
    ) -> nn.Module:
        """Compress into a folder; see `shrank.auto_fact`.

        Args:
            folder: What `from_pretrained` will load, replaced whole at the end. What is found on the way is kept in
                FOLDER.streaming, from where a run that was stopped goes on.
            rank: What `auto_fact` takes.
            options: Which layers may change.
            calibrate: Data and how.
            anchored: The share of the dense outputs; 0 for layers fitted alone.

        Returns:
            The model, mapped from the files that were written.

        Raises:
            ValueError: The source is damaged, or FOLDER.streaming is that of another run.
            TypeError: An option needs a model in memory, or something given has no value to know the run again by.
            OSError: A file cannot be written, as on a full disk. What was done is kept.
        """
        if isinstance(rank, Budget) and isinstance(rank.goal, SmallestGoodEnough):
            raise TypeError(
                "a Budget(eval_fn=) tries compressed models, which streaming does not make: give keep_params="
            )
        if options.narrow or (isinstance(rank, RankPlan) and rank.narrower):
            raise TypeError("stream: blocks are narrowed only in memory; leave out narrow=, or load the model")
        if options.submodules is not None or options.fact_led_unit:
            raise TypeError("stream: name layers with include= and exclude=; submodules and fact_led_unit need a model")
        if anchored:
            require_share(anchored)
        from ..saving.transformers_folder import load_model, save_model
        from .mapped import MappedModel
        from .run import Run

        target = Path(folder)
        try:
            return Run(MappedModel(self.source), self.source, target, calibrate, anchored).carry_out(rank, options)
        except OSError as error:
            if not (work := work_folder(target)).exists():
                raise
            raise OSError(f"{error}; what was done is kept in {work}, and the same call goes on from there") from error
        except Unstreamable as reason:
            warnings.warn(f"{self.source} is compressed in memory: {reason}", stacklevel=3)
        model = load_model(self.source)
        further = {} if isinstance(rank, RankPlan) else vars(options)
        model = auto_fact(model, rank, calibrate=calibrate, anchored=anchored, **further)
        if notes.noted(model, notes.PLAN).low_rank:
            save_model(model, self.source, target)
        return model
