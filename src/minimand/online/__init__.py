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
from .classification_bandit import BanditAgent, BanditRun, ClassificationBandit, play_bandit
from .learning_to_actively_learn import RobustTraining, train_robust_policy
from .linear_mdp import LinearMDP
from .neural_contextual_bandits import (
    Decision,
    NeuralCB,
    PerturbedOutput,
    inverse_gap_weights,
    online_regression_loss,
)
from .problem_complexity import ComplexitySolution, complexity
from .query_game import GameSolution, Instances, QueryGame
from .query_policies import QueryNetwork, TabularPolicy, generalized_binary_search, thresholds, uniform_allocation

__all__ = [
    "ActiveLearner",
    "AdversarialMDPLearner",
    "BanditAgent",
    "BanditRun",
    "BarrierStep",
    "ClassificationBandit",
    "ComplexitySolution",
    "Decision",
    "GameSolution",
    "Instances",
    "LinearMDP",
    "NeuralCB",
    "PerturbedOutput",
    "QueryGame",
    "QueryNetwork",
    "RobustTraining",
    "TabularPolicy",
    "complexity",
    "exploration_bonus",
    "generalized_binary_search",
    "inverse_covariance",
    "inverse_gap_weights",
    "linear_q_estimate",
    "log_barrier_step",
    "magnitude_reduced_estimate",
    "matrix_geometric_resampling",
    "online_regression_loss",
    "play_bandit",
    "thresholds",
    "train_robust_policy",
    "uniform_allocation",
]
