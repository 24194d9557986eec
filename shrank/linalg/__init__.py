from .factors import Factors, Shape
from .svd import FactorizationError, energy_curve, factorize, spectrum

__all__ = ["FactorizationError", "Factors", "Shape", "energy_curve", "factorize", "spectrum"]
