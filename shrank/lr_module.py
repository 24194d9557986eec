"""The ancestors' import path."""

from .ced import CED
from .led import LED

__all__ = ["CED", "LED"]
