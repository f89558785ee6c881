"""What is minimised: maps ``(input, target)`` to one number per example."""

from .aldr_kl import ALDRKLLoss, LDRKLLoss, aldr_temperature, ldr_kl_loss
from .loss import Loss

__all__ = [
    "ALDRKLLoss",
    "LDRKLLoss",
    "Loss",
    "aldr_temperature",
    "ldr_kl_loss",
]
