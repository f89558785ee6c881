"""How examples add up: maps per-example losses ``(batch,)`` to a scalar."""

from .chi_square_dro import ChiSquareDRO, chi_square_dro_weights
from .cvar import CVaR
from .group_dro import GroupDRO
from .kl_dro import KLDRO, kl_dro_weights
from .loss_reweighting import DynamicLossReweighting, loss_weights, sequence_losses
from .mean import Mean
from .risk import Risk

__all__ = [
    "KLDRO",
    "CVaR",
    "ChiSquareDRO",
    "DynamicLossReweighting",
    "GroupDRO",
    "Mean",
    "Risk",
    "chi_square_dro_weights",
    "kl_dro_weights",
    "loss_weights",
    "sequence_losses",
]
