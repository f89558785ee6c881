"""Learning to act: from logged decisions, under constraints, for several objectives at once."""

from .backtest import Backtest, walk_forward
from .curvature import ConjugateGradients, conjugate_gradients, fisher_product
from .expected_utility import ExpectedUtility
from .mdp_environment import MDPEnvironment
from .pareto_archive import ArchivedPolicy, ParetoArchive
from .pareto_front import crowding_distance, expected_utility, hypervolume, non_dominated, sparsity, weight_grid
from .portfolio import PortfolioPolicy, PortfolioTraining, train_portfolio
from .price_history import PriceHistory, read_prices
from .quantile_regression import quantile_huber_loss
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
from .stock_agent import StockAgent, StockChoice, StockQuantileNetwork, StockTransitions
from .stock_augmented_distributional_dp import (
    FirstStock,
    StockLayer,
    StockMDP,
    StockSolution,
)
from .stock_replay import StockReplay
from .stock_training import EpisodicEnvironment, StockTraining, train_stock_agent
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
    "EpisodicEnvironment",
    "ExpectedUtility",
    "FirstStock",
    "LineSearch",
    "MDPEnvironment",
    "Observation",
    "ParetoArchive",
    "PortfolioPolicy",
    "PortfolioTraining",
    "PriceHistory",
    "ReturnLaw",
    "RiskParity",
    "SharpeLoss",
    "Step",
    "StockAgent",
    "StockChoice",
    "StockLayer",
    "StockMDP",
    "StockQuantileNetwork",
    "StockReplay",
    "StockSolution",
    "StockTraining",
    "StockTransitions",
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
    "quantile_huber_loss",
    "read_prices",
    "read_transitions",
    "risk_parity",
    "sharpe_ratio",
    "shrunk_moments",
    "sortino_ratio",
    "sparsity",
    "stock_update",
    "train_portfolio",
    "train_stock_agent",
    "trust_region_step",
    "walk_forward",
    "wealth_after_trade",
    "weight_grid",
]
