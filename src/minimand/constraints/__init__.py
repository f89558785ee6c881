"""What must hold: multipliers, penalties, projections, and solvers that end where the constraints do hold."""

from ..numerics import orthogonalize
from ..projections import Ball, Box, Projection, Simplex, project_ball, project_simplex
from .constrain import constrain
from .lipschitz_policy import (
    ClosedLoopBounds,
    LipschitzFit,
    LipschitzRegressor,
    closed_loop_bounds,
    fill_distance,
    fill_failure_probability,
    lipschitz_regression,
    mcshane_extension,
    measurement_attack,
    policy_error_bound,
    slope_violation,
)
from .multiplier import Multiplier, augmented_lagrangian
from .penalties import exact_penalty, log_barrier, quadratic_penalty
from .spectral import (
    SpectralHammer,
    SpectralHardCap,
    SpectralNormalize,
    SpectralSoftCap,
    SpectralWeightDecay,
    Stiefel,
    rms_operator_norm,
    soft_cap_strength,
)

__all__ = [
    "Ball",
    "Box",
    "ClosedLoopBounds",
    "LipschitzFit",
    "LipschitzRegressor",
    "Multiplier",
    "Projection",
    "Simplex",
    "SpectralHammer",
    "SpectralHardCap",
    "SpectralNormalize",
    "SpectralSoftCap",
    "SpectralWeightDecay",
    "Stiefel",
    "augmented_lagrangian",
    "closed_loop_bounds",
    "constrain",
    "exact_penalty",
    "fill_distance",
    "fill_failure_probability",
    "lipschitz_regression",
    "log_barrier",
    "mcshane_extension",
    "measurement_attack",
    "orthogonalize",
    "policy_error_bound",
    "project_ball",
    "project_simplex",
    "quadratic_penalty",
    "rms_operator_norm",
    "slope_violation",
    "soft_cap_strength",
]
