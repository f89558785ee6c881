"""What can be promised: bounds on the error of what was learnt."""

from .interpolation_risk import best_bag_size, best_rho, interpolation_risk
from .sharpness import sharpness, top_hessian_eigenvalue

__all__ = [
    "best_bag_size",
    "best_rho",
    "interpolation_risk",
    "sharpness",
    "top_hessian_eigenvalue",
]
