"""How examples add up: maps per-example losses ``(batch,)`` to a scalar."""

from .mean import Mean
from .risk import Risk

__all__ = ["Mean", "Risk"]
