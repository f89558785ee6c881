"""How to descend: optimizers and wrappers of optimizers."""

from .ensemble_mirror_descent import EnsembleMirrorDescent, EnsembleState, ensemble_step, ensemble_step_sizes
from .muon import Muon
from .optimistic_ftrl import FollowState, OptimisticFTRL, optimistic_entropic_step, optimistic_ftrl_step
from .optimistic_mirror_descent import MirrorState, OptimisticMirrorDescent, optimistic_step
from .optimistic_newton import NewtonState, optimistic_newton_step, project_ball_in_metric
from .sam import SAM
from .sea import SEAStream, measure_sea

__all__ = [
    "SAM",
    "EnsembleMirrorDescent",
    "EnsembleState",
    "FollowState",
    "MirrorState",
    "Muon",
    "NewtonState",
    "OptimisticFTRL",
    "OptimisticMirrorDescent",
    "SEAStream",
    "ensemble_step",
    "ensemble_step_sizes",
    "measure_sea",
    "optimistic_entropic_step",
    "optimistic_ftrl_step",
    "optimistic_newton_step",
    "optimistic_step",
    "project_ball_in_metric",
]
