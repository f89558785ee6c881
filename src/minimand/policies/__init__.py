"""Learning to act: from logged decisions, under constraints, for several objectives at once."""

from .price_history import PriceHistory, read_prices
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
from .trading import (
    Backtest,
    Observation,
    Step,
    TradingEnvironment,
    drift,
    portfolio_log_returns,
    price_image,
    walk_forward,
    wealth_after_trade,
)

__all__ = [
    "AverageSharpeReward",
    "Backtest",
    "Observation",
    "PriceHistory",
    "SharpeLoss",
    "Step",
    "TradingEnvironment",
    "average_sharpe_rewards",
    "differential_sharpe_rewards",
    "drawdowns",
    "drift",
    "portfolio_log_returns",
    "prefix_sharpe_ratios",
    "price_image",
    "read_prices",
    "sharpe_ratio",
    "sortino_ratio",
    "walk_forward",
    "wealth_after_trade",
]
