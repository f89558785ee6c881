"""What is minimised: maps ``(input, target)`` to one number per example."""

from .aggregate_responses import AggregateLoss, aggregate_loss, ols, private_bag_means, within_bag_variance
from .aldr_kl import ALDRKLLoss, LDRKLLoss, aldr_temperature, ldr_kl_loss
from .comp_sum import CompSumLoss, comp_sum_loss
from .factored_spherical import FactoredSphericalLinear
from .focal import FocalLoss
from .generalized_cross_entropy import GeneralizedCrossEntropyLoss, MeanAbsoluteErrorLoss
from .loss import Loss
from .saf import MESALoss, SAFLoss, trajectory_kl
from .symmetric_cross_entropy import SymmetricCrossEntropyLoss
from .tempnet import RobustTemperatureLoss, TempNet, exact_temperature, robust_temperature_loss
from .tempnet_contrastive import ContrastiveOut, TempNetContrastiveLoss
from .z_loss import SphericalLoss, SphericalSoftmaxLoss, SquaredErrorLoss, TaylorSoftmaxLoss, ZLoss, z_loss

__all__ = [
    "ALDRKLLoss",
    "AggregateLoss",
    "CompSumLoss",
    "ContrastiveOut",
    "FactoredSphericalLinear",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "LDRKLLoss",
    "Loss",
    "MESALoss",
    "MeanAbsoluteErrorLoss",
    "RobustTemperatureLoss",
    "SAFLoss",
    "SphericalLoss",
    "SphericalSoftmaxLoss",
    "SquaredErrorLoss",
    "SymmetricCrossEntropyLoss",
    "TaylorSoftmaxLoss",
    "TempNet",
    "TempNetContrastiveLoss",
    "ZLoss",
    "aggregate_loss",
    "aldr_temperature",
    "comp_sum_loss",
    "exact_temperature",
    "ldr_kl_loss",
    "ols",
    "private_bag_means",
    "robust_temperature_loss",
    "trajectory_kl",
    "within_bag_variance",
    "z_loss",
]
