"""Learning to act: from logged decisions, under constraints, for several objectives at once."""

from .sharpe import (
    AverageSharpeReward,
    SharpeLoss,
    average_sharpe_rewards,
    differential_sharpe_rewards,
    drawdowns,
    prefix_sharpe_ratios,
    sharpe_ratio,
    sortino_ratio,
)

__all__ = [
    "AverageSharpeReward",
    "SharpeLoss",
    "average_sharpe_rewards",
    "differential_sharpe_rewards",
    "drawdowns",
    "prefix_sharpe_ratios",
    "sharpe_ratio",
    "sortino_ratio",
]
