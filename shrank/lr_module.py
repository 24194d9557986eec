"""The ancestors' import path."""

from .layers.ced import CED
from .layers.led import LED

__all__ = ["CED", "LED"]
