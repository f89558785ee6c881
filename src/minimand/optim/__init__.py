"""How to descend: optimizers and wrappers of optimizers."""

from .muon import Muon
from .sam import SAM

__all__ = ["SAM", "Muon"]
