"""What must hold: multipliers, penalties, projections, and solvers that end where the constraints do hold."""

from ..projections import Ball, Box, Projection, Simplex, project_ball, project_simplex
from .constrain import constrain
from .multiplier import Multiplier, augmented_lagrangian
from .penalties import exact_penalty, log_barrier, quadratic_penalty

__all__ = [
    "Ball",
    "Box",
    "Multiplier",
    "Projection",
    "Simplex",
    "augmented_lagrangian",
    "constrain",
    "exact_penalty",
    "log_barrier",
    "project_ball",
    "project_simplex",
    "quadratic_penalty",
]
