"""shrank: low-rank twins for the linear and convolution layers of any PyTorch model."""

from .apply import apply, describe, merge
from .auto_fact import auto_fact
from .ced import CED
from .led import LED
from .plan import LayerPlan, RankPlan
from .planning import PlanOptions, make_plan
from .rank import Energy

__version__ = "0.1.0"

__all__ = ["CED", "Energy", "LED", "LayerPlan", "PlanOptions", "RankPlan", "apply", "auto_fact", "describe",
           "make_plan", "merge"]
