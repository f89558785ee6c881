"""What can be promised: bounds on the error of what was learnt."""

from .h_consistency import comp_sum_bound, comp_sum_transform, conditional_regret, minimizability_gap
from .interpolation_risk import best_bag_size, best_rho, interpolation_risk
from .sharpness import sharpness, top_hessian_eigenvalue

__all__ = [
    "best_bag_size",
    "best_rho",
    "comp_sum_bound",
    "comp_sum_transform",
    "conditional_regret",
    "interpolation_risk",
    "minimizability_gap",
    "sharpness",
    "top_hessian_eigenvalue",
]
