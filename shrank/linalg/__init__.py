"""Pure tensors in, tensors out: factors and what they cost, singular values, second moments and the norms that they
make, pivots, whole numbers of few bits and what rounding loses, and how a budget is spent. Imports nothing of shrank.
"""

from .allocation import Allocation, BudgetTooSmall, Options, allocate, combined, frontier
from .correction import Lost, QuantizedCorrected, corrected_errors, on_grids, quantized_corrected
from .factors import Factors, Shape
from .grids import AS_IT_IS, Grid, Storage
from .moments import Columns, Kept, Metric, Moments, channel_columns, columns, metric
from .narrowing import Elimination, Refit, eliminate, fitted, refit
from .pivots import PivotedFactors, pivoted, unpivoted
from .quantization import Quantized, gptq, nearest
from .quantized_factors import (
    Loss,
    QuantizedDense,
    QuantizedFactors,
    inputs_of,
    loss_of,
    quantized_dense,
    quantized_factors,
)
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
    "Kept",
    "Loss",
    "Lost",
    "Metric",
    "Moments",
    "Options",
    "PivotedFactors",
    "Quantized",
    "QuantizedCorrected",
    "QuantizedDense",
    "QuantizedFactors",
    "Refit",
    "Shape",
    "Storage",
    "allocate",
    "channel_columns",
    "columns",
    "combined",
    "corrected_errors",
    "eliminate",
    "energy_curve",
    "factorize",
    "factorize_weighted",
    "fitted",
    "frontier",
    "gptq",
    "inputs_of",
    "loss_of",
    "metric",
    "nearest",
    "on_grids",
    "pivoted",
    "quantized_corrected",
    "quantized_dense",
    "quantized_factors",
    "refit",
    "spectrum",
    "squared_errors",
    "unpivoted",
]
