"""Learning to act: from logged decisions, under constraints, for several objectives at once."""

from .backtest import Backtest, walk_forward
from .curvature import ConjugateGradients, conjugate_gradients, fisher_product
from .expected_utility import ExpectedUtility
from .pareto_archive import ArchivedPolicy, ParetoArchive
from .pareto_front import crowding_distance, expected_utility, hypervolume, non_dominated, sparsity, weight_grid
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
    "ArchivedPolicy",
    "AverageSharpeReward",
    "Backtest",
    "ConjugateGradients",
    "ExpectedUtility",
    "FirstStock",
    "LineSearch",
    "Observation",
    "ParetoArchive",
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
    "crowding_distance",
    "differential_sharpe_rewards",
    "drawdowns",
    "drift",
    "edit_stock",
    "expected_utility",
    "fisher_product",
    "hypervolume",
    "maximum_sharpe",
    "minimum_variance",
    "non_dominated",
    "portfolio_log_returns",
    "prefix_sharpe_ratios",
    "price_image",
    "read_prices",
    "read_transitions",
    "risk_parity",
    "sharpe_ratio",
    "shrunk_moments",
    "sortino_ratio",
    "sparsity",
    "stock_update",
    "train_portfolio",
    "trust_region_step",
    "walk_forward",
    "wealth_after_trade",
    "weight_grid",
]
