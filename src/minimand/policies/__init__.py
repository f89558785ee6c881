"""Learning to act: from logged decisions, under constraints, for several objectives at once."""

from .a2pr import A2PR, GuidedTarget, advantage_guided_target
from .advantage_gated_vae import AdvantageGatedVAE
from .backtest import Backtest, walk_forward
from .behaviour_cloning import BehaviourCloning
from .behaviour_data import behaviour_data
from .c_morl import CMORLTraining, train_c_morl
from .constrained_extension import extension_thresholds, interior_point_barrier
from .cql import CQL
from .curvature import ConjugateGradients, conjugate_gradients, fisher_product
from .dataset_constraint import DatasetConstraint, NearestPair
from .dose_simulator import DoseSimulator
from .environments import Environment, GymnasiumEnvironment, make_environment
from .expected_utility import ExpectedUtility
from .famo2o import FamO2O
from .features import history_rows, logged_rows, monomials
from .fine_tuning import FineTuning, fine_tune
from .fitted_q import FittedValue, fitted_q_evaluation
from .gaussian_policy import GaussianPolicy
from .guarded_rollout import GuardedEpisodes, guarded_rollout
from .guardians import ChristoffelGuardian, CountGuardian, Guardian, KernelDensityGuardian, coverage_threshold
from .icu_sepsis import ICUSepsis
from .iql import IQL
from .mdp_environment import MDPEnvironment
from .minari_data import OfflineData, read_minari, write_minari
from .offline_batches import Batch, BatchStream, ScaledLog
from .offline_training import OfflineLearner, OfflineTraining, train_offline
from .ogsrl import OGSRL, OGSRLStep
from .online_td3 import OnlineRun, Snapshot, train_online
from .parallel_ppo import PPOSettings, VectorPolicy
from .pareto_archive import ArchivedPolicy, ParetoArchive
from .pareto_front import crowding_distance, expected_utility, hypervolume, non_dominated, sparsity, weight_grid
from .pendulum import Pendulum
from .portfolio import PortfolioPolicy, PortfolioTraining, train_portfolio
from .prdc import PRDC
from .price_history import PriceHistory, read_prices
from .quantile_regression import quantile_huber_loss
from .return_law import ReturnLaw
from .saved_policy import Policy, load_policy
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
from .tabular_cmdp import CMDPSolution, InfeasibleBudgetsError, PolicyEvaluation, TabularCMDP
from .td3_bc import TD3BC
from .trading import (
    Observation,
    Step,
    TradingEnvironment,
    drift,
    portfolio_log_returns,
    price_image,
    wealth_after_trade,
)
from .transition_models import NearestNeighborModel, Predicted, RegressionModel, TransitionModel
from .transitions import Transitions, read_transitions
from .trust_region import LineSearch, TrustRegionStep, backtracking, trust_region_step
from .vector_actor_critic import VectorActorCritic
from .vector_environment import GymEpisodes, VectorEnvironment, VectorStep

__all__ = [
    "A2PR",
    "CQL",
    "IQL",
    "OGSRL",
    "PRDC",
    "TD3BC",
    "AdvantageGatedVAE",
    "ArchivedPolicy",
    "AverageSharpeReward",
    "Backtest",
    "Batch",
    "BatchStream",
    "BehaviourCloning",
    "CMDPSolution",
    "CMORLTraining",
    "ChristoffelGuardian",
    "ConjugateGradients",
    "CountGuardian",
    "DatasetConstraint",
    "DoseSimulator",
    "Environment",
    "EpisodicEnvironment",
    "ExpectedUtility",
    "FamO2O",
    "FineTuning",
    "FirstStock",
    "FittedValue",
    "GaussianPolicy",
    "GuardedEpisodes",
    "Guardian",
    "GuidedTarget",
    "GymEpisodes",
    "GymnasiumEnvironment",
    "ICUSepsis",
    "InfeasibleBudgetsError",
    "KernelDensityGuardian",
    "LineSearch",
    "MDPEnvironment",
    "NearestNeighborModel",
    "NearestPair",
    "OGSRLStep",
    "Observation",
    "OfflineData",
    "OfflineLearner",
    "OfflineTraining",
    "OnlineRun",
    "PPOSettings",
    "ParetoArchive",
    "Pendulum",
    "Policy",
    "PolicyEvaluation",
    "PortfolioPolicy",
    "PortfolioTraining",
    "Predicted",
    "PriceHistory",
    "RegressionModel",
    "ReturnLaw",
    "RiskParity",
    "ScaledLog",
    "SharpeLoss",
    "Snapshot",
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
    "TabularCMDP",
    "TradingEnvironment",
    "TransitionModel",
    "Transitions",
    "TrustRegionStep",
    "VectorActorCritic",
    "VectorEnvironment",
    "VectorPolicy",
    "VectorStep",
    "advantage_guided_target",
    "average_sharpe_rewards",
    "backtracking",
    "behaviour_data",
    "conjugate_gradients",
    "coverage_threshold",
    "crowding_distance",
    "differential_sharpe_rewards",
    "drawdowns",
    "drift",
    "edit_stock",
    "expected_utility",
    "extension_thresholds",
    "fine_tune",
    "fisher_product",
    "fitted_q_evaluation",
    "guarded_rollout",
    "history_rows",
    "hypervolume",
    "interior_point_barrier",
    "load_policy",
    "logged_rows",
    "make_environment",
    "maximum_sharpe",
    "minimum_variance",
    "monomials",
    "non_dominated",
    "portfolio_log_returns",
    "prefix_sharpe_ratios",
    "price_image",
    "quantile_huber_loss",
    "read_minari",
    "read_prices",
    "read_transitions",
    "risk_parity",
    "sharpe_ratio",
    "shrunk_moments",
    "sortino_ratio",
    "sparsity",
    "stock_update",
    "train_c_morl",
    "train_offline",
    "train_online",
    "train_portfolio",
    "train_stock_agent",
    "trust_region_step",
    "walk_forward",
    "wealth_after_trade",
    "weight_grid",
    "write_minari",
]
