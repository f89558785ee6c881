"""How to descend: optimizers and wrappers of optimizers."""

from .compressors import Compressor, Identity, LowRank, Message, RandK, SignMean, TopK
from .econtrol import (
    EF21,
    EF21SGDM,
    CompressedDataParallel,
    CompressionState,
    EControl,
    Encoding,
    ErrorFeedback,
    GradientExchange,
    NaiveCompression,
    WorkerState,
    compression_hook,
    econtrol_step,
)
from .ensemble_mirror_descent import EnsembleMirrorDescent, EnsembleState, ensemble_step, ensemble_step_sizes
from .muon import Muon
from .optimistic_ftrl import FollowState, OptimisticFTRL, optimistic_entropic_step, optimistic_ftrl_step
from .optimistic_mirror_descent import MirrorState, OptimisticMirrorDescent, optimistic_step
from .optimistic_newton import NewtonState, optimistic_newton_step, project_ball_in_metric
from .sam import SAM
from .sea import SEAStream, measure_sea

__all__ = [
    "EF21",
    "EF21SGDM",
    "SAM",
    "CompressedDataParallel",
    "CompressionState",
    "Compressor",
    "EControl",
    "Encoding",
    "EnsembleMirrorDescent",
    "EnsembleState",
    "ErrorFeedback",
    "FollowState",
    "GradientExchange",
    "Identity",
    "LowRank",
    "Message",
    "MirrorState",
    "Muon",
    "NaiveCompression",
    "NewtonState",
    "OptimisticFTRL",
    "OptimisticMirrorDescent",
    "RandK",
    "SEAStream",
    "SignMean",
    "TopK",
    "WorkerState",
    "compression_hook",
    "econtrol_step",
    "ensemble_step",
    "ensemble_step_sizes",
    "measure_sea",
    "optimistic_entropic_step",
    "optimistic_ftrl_step",
    "optimistic_newton_step",
    "optimistic_step",
    "project_ball_in_metric",
]
