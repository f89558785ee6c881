"""What is minimised: maps ``(input, target)`` to one number per example."""

from .aggregate_responses import AggregateLoss, aggregate_loss, ols, private_bag_means, within_bag_variance
from .aldr_kl import ALDRKLLoss, LDRKLLoss, aldr_temperature, ldr_kl_loss
from .factored_spherical import FactoredSphericalLinear
from .loss import Loss
from .tempnet import RobustTemperatureLoss, TempNet, exact_temperature, robust_temperature_loss
from .tempnet_contrastive import ContrastiveOut, TempNetContrastiveLoss
from .z_loss import SphericalLoss, SphericalSoftmaxLoss, SquaredErrorLoss, TaylorSoftmaxLoss, ZLoss, z_loss

__all__ = [
    "ALDRKLLoss",
    "AggregateLoss",
    "ContrastiveOut",
    "FactoredSphericalLinear",
    "LDRKLLoss",
    "Loss",
    "RobustTemperatureLoss",
    "SphericalLoss",
    "SphericalSoftmaxLoss",
    "SquaredErrorLoss",
    "TaylorSoftmaxLoss",
    "TempNet",
    "TempNetContrastiveLoss",
    "ZLoss",
    "aggregate_loss",
    "aldr_temperature",
    "exact_temperature",
    "ldr_kl_loss",
    "ols",
    "private_bag_means",
    "robust_temperature_loss",
    "within_bag_variance",
    "z_loss",
]
