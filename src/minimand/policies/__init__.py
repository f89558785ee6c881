"""Learning to act: from logged decisions, under constraints, for several objectives at once."""

from .backtest import Backtest, walk_forward
from .curvature import ConjugateGradients, conjugate_gradients, fisher_product
from .expected_utility import ExpectedUtility
from .portfolio import PortfolioPolicy, PortfolioTraining, train_portfolio
from .price_history import PriceHistory, read_prices
from .return_law import ReturnLaw
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
from .static_portfolios import RiskParity, maximum_sharpe, minimum_variance, risk_parity, shrunk_moments
from .stock import edit_stock, stock_update
from .stock_augmented_distributional_dp import (
    FirstStock,
    StockLayer,
    StockMDP,
    StockSolution,
)
from .trading import (
    Observation,
    Step,
    TradingEnvironment,
    drift,
    portfolio_log_returns,
    price_image,
    wealth_after_trade,
)
from .transitions import Transitions, read_transitions
from .trust_region import LineSearch, TrustRegionStep, backtracking, trust_region_step


__all__ = [
    "AverageSharpeReward",
    "Backtest",
    "ConjugateGradients",
    "ExpectedUtility",
    "FirstStock",
    "LineSearch",
    "Observation",
    "PortfolioPolicy",
    "PortfolioTraining",
    "PriceHistory",
    "ReturnLaw",
    "RiskParity",
    "SharpeLoss",
    "Step",
    "StockLayer",
    "StockMDP",
    "StockSolution",
    "TradingEnvironment",
    "Transitions",
    "TrustRegionStep",
    "average_sharpe_rewards",
    "backtracking",
    "conjugate_gradients",
    "differential_sharpe_rewards",
    "drawdowns",
    "drift",
    "edit_stock",
    "fisher_product",
    "maximum_sharpe",
    "minimum_variance",
    "portfolio_log_returns",
    "prefix_sharpe_ratios",
    "price_image",
    "read_prices",
    "read_transitions",
    "risk_parity",
    "sharpe_ratio",
    "shrunk_moments",
    "sortino_ratio",
    "stock_update",
    "train_portfolio",
    "trust_region_step",
    "walk_forward",
    "wealth_after_trade",
]
