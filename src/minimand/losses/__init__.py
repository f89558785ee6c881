"""What is minimised: maps ``(input, target)`` to one number per example."""

from .adversarial_comp_sum import SmoothAdversarialCompSumLoss, smooth_adversarial_comp_sum_loss
from .aggregate_responses import AggregateLoss, aggregate_loss, ols, private_bag_means, within_bag_variance
from .aldr_kl import ALDRKLLoss, LDRKLLoss, aldr_temperature, ldr_kl_loss
from .calibrators import (
    Calibrator,
    EnsembleTemperatureScaling,
    IsotonicCalibration,
    TemperatureScaling,
    VectorScaling,
)
from .comp_sum import CompSumLoss, comp_sum_loss
from .correctness_aware import (
    AdaptiveTemperature,
    CACalibrator,
    CorrectnessAwareLoss,
    TransformConsistencyFeatures,
    consistency_features,
    correctness_aware_loss,
)
from .ensloss import EnsLoss, calibrated_derivatives, check_cc, inverse_box_cox
from .factored_spherical import FactoredSphericalLinear
from .focal import FocalLoss
from .generalized_cross_entropy import GeneralizedCrossEntropyLoss, MeanAbsoluteErrorLoss
from .loss import Loss
from .pgd import pgd_attack
from .saf import MESALoss, SAFLoss, trajectory_kl
from .survival import (
    CoxPHLoss,
    DiscreteHazardLoss,
    cox_ph_loss,
    discrete_hazard_loss,
    event_time_edges,
    hazard_survival,
)
from .symmetric_cross_entropy import SymmetricCrossEntropyLoss
from .tempnet import RobustTemperatureLoss, TempNet, exact_temperature, robust_temperature_loss
from .tempnet_contrastive import ContrastiveOut, TempNetContrastiveLoss
from .trades import trades_loss
from .z_loss import SphericalLoss, SphericalSoftmaxLoss, SquaredErrorLoss, TaylorSoftmaxLoss, ZLoss, zloss

__all__ = [
    "ALDRKLLoss",
    "AdaptiveTemperature",
    "AggregateLoss",
    "CACalibrator",
    "Calibrator",
    "CompSumLoss",
    "ContrastiveOut",
    "CorrectnessAwareLoss",
    "CoxPHLoss",
    "DiscreteHazardLoss",
    "EnsLoss",
    "EnsembleTemperatureScaling",
    "FactoredSphericalLinear",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "IsotonicCalibration",
    "LDRKLLoss",
    "Loss",
    "MESALoss",
    "MeanAbsoluteErrorLoss",
    "RobustTemperatureLoss",
    "SAFLoss",
    "SmoothAdversarialCompSumLoss",
    "SphericalLoss",
    "SphericalSoftmaxLoss",
    "SquaredErrorLoss",
    "SymmetricCrossEntropyLoss",
    "TaylorSoftmaxLoss",
    "TempNet",
    "TempNetContrastiveLoss",
    "TemperatureScaling",
    "TransformConsistencyFeatures",
    "VectorScaling",
    "ZLoss",
    "aggregate_loss",
    "aldr_temperature",
    "calibrated_derivatives",
    "check_cc",
    "comp_sum_loss",
    "consistency_features",
    "correctness_aware_loss",
    "cox_ph_loss",
    "discrete_hazard_loss",
    "event_time_edges",
    "exact_temperature",
    "hazard_survival",
    "inverse_box_cox",
    "ldr_kl_loss",
    "ols",
    "pgd_attack",
    "private_bag_means",
    "robust_temperature_loss",
    "smooth_adversarial_comp_sum_loss",
    "trades_loss",
    "trajectory_kl",
    "within_bag_variance",
    "zloss",
]
