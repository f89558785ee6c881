"""Deciding as data arrive: bandits, adversaries, and questions worth asking."""

from .neural_contextual_bandits import (
    Decision,
    NeuralCB,
    PerturbedOutput,
    inverse_gap_weights,
    online_regression_loss,
)

__all__ = [
    "Decision",
    "NeuralCB",
    "PerturbedOutput",
    "inverse_gap_weights",
    "online_regression_loss",
]
