"""shrank: low-rank twins for the linear and convolution layers of any PyTorch model."""

from importlib import import_module

from wrapt import register_post_import_hook

from .apply import apply, describe, merge
from .auto_fact import auto_fact
from .ced import CED
from .checkpoint import load, save
from .led import LED
from .plan import LayerPlan, RankPlan
from .planning import PlanOptions, make_plan
from .rank import Energy
from .version import __version__

# transformers learns about shrank when it is imported, whichever of the two comes first.
register_post_import_hook(lambda _: import_module("shrank.hf"), "transformers.modeling_utils")

__all__ = [
           "CED",
           "LED",
           "Energy",
           "LayerPlan",
           "PlanOptions",
           "RankPlan",
           "__version__",
           "apply",
           "auto_fact",
           "describe",
           "load",
           "make_plan",
           "merge",
           "save",
]
