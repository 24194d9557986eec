"""shrank: low-rank twins for the linear and convolution layers of any PyTorch model."""

from . import diffusers_hook as diffusers_hook
from . import peft_hook as peft_hook
from . import safetensors_hook as safetensors_hook
from . import transformers_hook as transformers_hook
from .apply import apply, describe, merge
from .auto_fact import auto_fact
from .budget import Budget
from .calibration import Calibration, calibrate
from .ced import CED
from .checkpoint import load, save
from .fitting import PlanOptions
from .heal import heal
from .latency import LatencyTable
from .led import LED
from .measure import measured
from .ops.api import Backend, backend, low_rank_conv, low_rank_linear, why_not
from .plan import LayerPlan, RankPlan
from .planning import make_plan
from .rank import Energy, Fraction
from .subclasses import treat_as_base
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
