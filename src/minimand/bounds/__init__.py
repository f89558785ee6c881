"""What can be promised: bounds on the error of what was learnt."""

from .generalization_measures import generalization_measures, margin_quantile, path_norm
from .h_consistency import comp_sum_bound, comp_sum_transform, conditional_regret, minimizability_gap
from .interpolation_risk import best_bag_size, best_rho, interpolation_risk
from .linear_field_game import (
    FailureBound,
    FieldSolution,
    GameReport,
    LinearFieldGame,
    solve_over_field,
    uniform_failure_bound,
)
from .noise_tolerance import NoiseTolerance, noise_tolerance
from .pac_bayes import PACBayesBound, SpectralMarginBound, binary_kl_inverse, pac_bayes_bound, spectral_margin_bound
from .sharpness import sharpness, top_hessian_eigenvalue
from .shattered_game import ShatteredGame
from .twin_audit import AuditReport, AuditRow, twin_audit

__all__ = [
    "AuditReport",
    "AuditRow",
    "FailureBound",
    "FieldSolution",
    "GameReport",
    "LinearFieldGame",
    "NoiseTolerance",
    "PACBayesBound",
    "ShatteredGame",
    "SpectralMarginBound",
    "best_bag_size",
    "best_rho",
    "binary_kl_inverse",
    "comp_sum_bound",
    "comp_sum_transform",
    "conditional_regret",
    "generalization_measures",
    "interpolation_risk",
    "margin_quantile",
    "minimizability_gap",
    "noise_tolerance",
    "pac_bayes_bound",
    "path_norm",
    "sharpness",
    "solve_over_field",
    "spectral_margin_bound",
    "top_hessian_eigenvalue",
    "twin_audit",
    "uniform_failure_bound",
]
