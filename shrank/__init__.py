"""shrank: low-rank twins for the linear and convolution layers of any PyTorch model."""

from .calibration.calibration import Calibration, calibrate
from .compression.apply import apply, describe, merge
from .compression.auto_fact import auto_fact
from .healing.heal import heal
from .layers.ced import CED
from .layers.led import LED
from .measuring.layer_errors import measured
from .model import peft_hook as peft_hook
from .model.subclasses import treat_as_base
from .ops.availability import why_not
from .ops.dispatch import Backend, backend, low_rank_conv, low_rank_linear
from .planning.budget import Budget
from .planning.latency import LatencyTable
from .planning.make_plan import make_plan
from .planning.options import PlanOptions
from .planning.plan import LayerPlan, RankPlan
from .planning.rank import Energy, Fraction
from .saving import diffusers_hook as diffusers_hook
from .saving import safetensors_hook as safetensors_hook
from .saving import transformers_hook as transformers_hook
from .saving.checkpoint import load, save
from .version import __version__

__all__ = [
           "CED",
           "LED",
           "Backend",
           "Budget",
           "Calibration",
           "Energy",
           "Fraction",
           "LatencyTable",
           "LayerPlan",
           "PlanOptions",
           "RankPlan",
           "__version__",
           "apply",
           "auto_fact",
           "backend",
           "calibrate",
           "describe",
           "heal",
           "load",
           "low_rank_conv",
           "low_rank_linear",
           "make_plan",
           "measured",
           "merge",
           "save",
           "treat_as_base",
           "why_not",
]
