"""Deciding as data arrive: bandits, adversaries, and questions worth asking."""

from .active_learner import ActiveLearner
from .adversarial_linear_mdps import (
    AdversarialMDPLearner,
    BarrierStep,
    exploration_bonus,
    inverse_covariance,
    linear_q_estimate,
    log_barrier_step,
    magnitude_reduced_estimate,
    matrix_geometric_resampling,
)
from .bandit_agents import BanditAgent, Decision
from .classification_bandit import BanditRun, ClassificationBandit, play_bandit
from .confidence_bandits import LinUCB, NeuralTS, NeuralUCB
from .disjoint_linear import DisjointLinear
from .epsilon_greedy import EpsilonGreedy
from .instance_classes import InstanceClasses, Instances
from .learning_to_actively_learn import RobustTraining, train_robust_policy, train_sampled_policy
from .linear_mdp import LinearMDP
from .neural_contextual_bandits import NeuralCB, inverse_gap_weights
from .online_regression import OnlineRegressor, online_regression_loss
from .perturbed_output import PerturbedOutput
from .policy_cover import CoverExplorer, PolicyCover
from .problem_complexity import ComplexitySolution, complexity
from .query_game import GameSolution, QueryGame
from .query_policies import (
    QueryNetwork,
    QueryScorer,
    TabularPolicy,
    gap_search,
    generalized_binary_search,
    thresholds,
    uniform_allocation,
)
from .sampled_game import PlayedGames, SampledQueryGame
from .simulator_free_learner import SimulatorFreeLearner, exploration_weights, linear_q_weights

__all__ = [
    "ActiveLearner",
    "AdversarialMDPLearner",
    "BanditAgent",
    "BanditRun",
    "BarrierStep",
    "ClassificationBandit",
    "ComplexitySolution",
    "CoverExplorer",
    "Decision",
    "DisjointLinear",
    "EpsilonGreedy",
    "GameSolution",
    "InstanceClasses",
    "Instances",
    "LinUCB",
    "LinearMDP",
    "NeuralCB",
    "NeuralTS",
    "NeuralUCB",
    "OnlineRegressor",
    "PerturbedOutput",
    "PlayedGames",
    "PolicyCover",
    "QueryGame",
    "QueryNetwork",
    "QueryScorer",
    "RobustTraining",
    "SampledQueryGame",
    "SimulatorFreeLearner",
    "TabularPolicy",
    "complexity",
    "exploration_bonus",
    "exploration_weights",
    "gap_search",
    "generalized_binary_search",
    "inverse_covariance",
    "inverse_gap_weights",
    "linear_q_estimate",
    "linear_q_weights",
    "log_barrier_step",
    "magnitude_reduced_estimate",
    "matrix_geometric_resampling",
    "online_regression_loss",
    "play_bandit",
    "thresholds",
    "train_robust_policy",
    "train_sampled_policy",
    "uniform_allocation",
]
