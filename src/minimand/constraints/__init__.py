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
from .lipschitz_transformer import (
    LipschitzBlock,
    LipschitzBound,
    LipschitzGPT,
    certified_radius,
    lipschitz_bound,
)
from .multiplier import Multiplier, augmented_lagrangian
from .penalties import exact_penalty, log_barrier, quadratic_penalty
from .sketch import SketchSolution, sketch_and_project
from .sketched_newton import (
    ExactALNewton,
    NewtonResult,
    NewtonStep,
    SingularConstraintError,
    exact_augmented_lagrangian,
)
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
    "ExactALNewton",
    "LipschitzBlock",
    "LipschitzBound",
    "LipschitzFit",
    "LipschitzGPT",
    "LipschitzRegressor",
    "Multiplier",
    "NewtonResult",
    "NewtonStep",
    "Projection",
    "Simplex",
    "SingularConstraintError",
    "SketchSolution",
    "SpectralHammer",
    "SpectralHardCap",
    "SpectralNormalize",
    "SpectralSoftCap",
    "SpectralWeightDecay",
    "Stiefel",
    "augmented_lagrangian",
    "certified_radius",
    "closed_loop_bounds",
    "constrain",
    "exact_augmented_lagrangian",
    "exact_penalty",
    "fill_distance",
    "fill_failure_probability",
    "lipschitz_bound",
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
    "sketch_and_project",
    "slope_violation",
    "soft_cap_strength",
]
