"""What must hold: multipliers, penalties, projections, and solvers that end where the constraints do hold."""

from ..numerics import orthogonalize
from ..projections import Ball, Box, Projection, Simplex, project_ball, project_simplex
from .acyclicity import acyclicity, reachability, topological_order
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
from .node_scores import LeastSquaresScore, LogisticScore, MLPScore, NodeFits, NodeScore
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
from .topo import DagResult, TopoSwap, kkt_residual, order_score, prune_edges, swap_change

__all__ = [
    "Ball",
    "Box",
    "ClosedLoopBounds",
    "DagResult",
    "ExactALNewton",
    "LeastSquaresScore",
    "LipschitzBlock",
    "LipschitzBound",
    "LipschitzFit",
    "LipschitzGPT",
    "LipschitzRegressor",
    "LogisticScore",
    "MLPScore",
    "Multiplier",
    "NewtonResult",
    "NewtonStep",
    "NodeFits",
    "NodeScore",
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
    "TopoSwap",
    "acyclicity",
    "augmented_lagrangian",
    "certified_radius",
    "closed_loop_bounds",
    "constrain",
    "exact_augmented_lagrangian",
    "exact_penalty",
    "fill_distance",
    "fill_failure_probability",
    "kkt_residual",
    "lipschitz_bound",
    "lipschitz_regression",
    "log_barrier",
    "mcshane_extension",
    "measurement_attack",
    "order_score",
    "orthogonalize",
    "policy_error_bound",
    "project_ball",
    "project_simplex",
    "prune_edges",
    "quadratic_penalty",
    "reachability",
    "rms_operator_norm",
    "sketch_and_project",
    "slope_violation",
    "soft_cap_strength",
    "swap_change",
    "topological_order",
]
