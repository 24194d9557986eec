"""Pure tensors in, tensors out: factors and what they cost, singular values, second moments and the norms that they
make, pivots, and how a budget is spent. Imports nothing of shrank.
"""

from .allocation import Allocation, BudgetTooSmall, Options, allocate, frontier
from .factors import Factors, Shape
from .moments import Metric, Moments, metric
from .pivots import PivotedFactors, pivoted, unpivoted
from .svd import FactorizationError, energy_curve, factorize, spectrum
from .weighted import factorize_weighted, squared_errors

__all__ = [
    "Allocation",
    "BudgetTooSmall",
    "FactorizationError",
    "Factors",
    "Metric",
    "Moments",
    "Options",
    "PivotedFactors",
    "Shape",
    "allocate",
    "energy_curve",
    "factorize",
    "factorize_weighted",
    "frontier",
    "metric",
    "pivoted",
    "spectrum",
    "squared_errors",
    "unpivoted",
]
