"""How to descend: optimizers and wrappers of optimizers."""

from .sam import SAM

__all__ = ["SAM"]
