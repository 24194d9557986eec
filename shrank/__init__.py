"""shrank: low-rank twins for the linear and convolution layers of any PyTorch model."""

import importlib
import os
from typing import TYPE_CHECKING

from .calibration.batches import Batch, batches
from .calibration.calibration import Calibration, calibrate
from .calibration.metric_source import LayerStatistics, MetricSource
from .calibration.request import Calibrate
from .compression.anchored import apply_anchored
from .compression.apply import apply, merge
from .compression.auto_fact import auto_fact
from .compression.correct import correct, uncorrect
from .compression.describe import describe
from .compression.quantize_factors import quantize_factors
from .fusing import compile_pass as compile_pass
from .fusing.fuse import Fused, fuse, unfuse
from .healing.heal import Healing, heal
from .healing.options import HealOptions
from .healing.recorded import RecordedLogits, record_logits
from .layers.ced import CED
from .layers.corrected import CorrectedLinear
from .layers.led import LED
from .linalg import Grid, Metric, Storage
from .measuring.language_model import Evaluation, evaluate
from .measuring.layer_errors import measure_errors
from .measuring.tasks import lm_eval_model
from .measuring.tuning import tune, tune_this_process
from .model import peft_hook as peft_hook
from .model.storage import unpivot
from .model.subclasses import treat_as_base
from .ops.availability import why_not
from .ops.dispatch import (
    Backend,
    backend,
    low_rank_conv,
    low_rank_gated,
    low_rank_linear,
    low_rank_linear_multi,
    low_rank_pivoted,
)
from .planning.budget import Budget
from .planning.latency import LatencyTable
from .planning.make_plan import eligible, make_plan
from .planning.narrowed import NarrowedBlock
from .planning.options import PlanOptions
from .planning.plan import LayerPlan, RankPlan
from .planning.rank import Energy, Fraction, Rank
from .reporting.drawings import figures
from .reporting.page import report
from .saving import diffusers_hook as diffusers_hook
from .saving import safetensors_hook as safetensors_hook
from .saving import transformers_hook as transformers_hook
from .saving.checkpoint import load, save
from .saving.lora_adapter import export_lora
from .streaming.checkpoint import Checkpoint
from .util.processes import across_processes
from .version import __version__

if TYPE_CHECKING:
    from .healing.trainer import DistillationTrainer
    from .layers.tensor_parallel import ColwiseParallel, RowwiseParallel

if os.environ.get("SHRANK_TUNE") == "1":
    tune_this_process()


# What takes long to import, or needs transformers: modules by the names that they are asked for.
_ON_DEMAND = {
    "ColwiseParallel": ".layers.tensor_parallel",
    "DistillationTrainer": ".healing.trainer",
    "RowwiseParallel": ".layers.tensor_parallel",
}


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(_ON_DEMAND[name], __name__), name)
    raise AttributeError(f"module 'shrank' has no attribute {name!r}")


__all__ = [
    "CED",
    "LED",
    "Backend",
    "Batch",
    "Budget",
    "Calibrate",
    "Calibration",
    "Checkpoint",
    "ColwiseParallel",
    "CorrectedLinear",
    "DistillationTrainer",
    "Energy",
    "Evaluation",
    "Fraction",
    "Fused",
    "Grid",
    "HealOptions",
    "Healing",
    "LatencyTable",
    "LayerPlan",
    "LayerStatistics",
    "Metric",
    "MetricSource",
    "NarrowedBlock",
    "PlanOptions",
    "Rank",
    "RankPlan",
    "RecordedLogits",
    "RowwiseParallel",
    "Storage",
    "__version__",
    "across_processes",
    "apply",
    "apply_anchored",
    "auto_fact",
    "backend",
    "batches",
    "calibrate",
    "correct",
    "describe",
    "eligible",
    "evaluate",
    "export_lora",
    "figures",
    "fuse",
    "heal",
    "lm_eval_model",
    "load",
    "low_rank_conv",
    "low_rank_gated",
    "low_rank_linear",
    "low_rank_linear_multi",
    "low_rank_pivoted",
    "make_plan",
    "measure_errors",
    "merge",
    "quantize_factors",
    "record_logits",
    "report",
    "save",
    "treat_as_base",
    "tune",
    "uncorrect",
    "unfuse",
    "unpivot",
    "why_not",
]
