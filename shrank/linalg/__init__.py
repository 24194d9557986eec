"""Pure tensors in, tensors out: factors and what they cost, singular values, second moments and the norms that they
make, pivots, and how a budget is spent. Imports nothing of shrank.
"""

from .allocation import Allocation, BudgetTooSmall, Options, allocate, combined, frontier
from .factors import Factors, Shape
from .grids import AS_IT_IS, Grid, Storage
from .moments import Columns, Metric, Moments, columns, metric
from .narrowing import Elimination, Refit, eliminate, refit
from .pivots import PivotedFactors, pivoted, unpivoted
from .quantization import Quantized, gptq, nearest
from .svd import FactorizationError, energy_curve, factorize, spectrum
from .weighted import factorize_weighted, squared_errors

__all__ = [
    "AS_IT_IS",
    "Allocation",
    "BudgetTooSmall",
    "Columns",
    "Elimination",
    "FactorizationError",
    "Factors",
    "Grid",
    "Metric",
    "Moments",
    "Options",
    "PivotedFactors",
    "Quantized",
    "Refit",
    "Shape",
    "Storage",
    "allocate",
    "columns",
    "combined",
    "eliminate",
    "energy_curve",
    "factorize",
    "factorize_weighted",
    "frontier",
    "gptq",
    "metric",
    "nearest",
    "pivoted",
    "refit",
    "spectrum",
    "squared_errors",
    "unpivoted",
]
