"""Deciding as data arrive: bandits, adversaries, and questions worth asking."""

from .classification_bandit import BanditAgent, BanditRun, ClassificationBandit, play_bandit
from .learning_to_actively_learn import (
    ActiveLearner,
    GameSolution,
    Instances,
    QueryGame,
    QueryNetwork,
    RobustTraining,
    TabularPolicy,
    generalized_binary_search,
    thresholds,
    train_robust_policy,
    uniform_allocation,
)
from .neural_contextual_bandits import (
    Decision,
    NeuralCB,
    PerturbedOutput,
    inverse_gap_weights,
    online_regression_loss,
)
from .problem_complexity import ComplexitySolution, complexity

__all__ = [
    "ActiveLearner",
    "BanditAgent",
    "BanditRun",
    "ClassificationBandit",
    "ComplexitySolution",
    "Decision",
    "GameSolution",
    "Instances",
    "NeuralCB",
    "PerturbedOutput",
    "QueryGame",
    "QueryNetwork",
    "RobustTraining",
    "TabularPolicy",
    "complexity",
    "generalized_binary_search",
    "inverse_gap_weights",
    "online_regression_loss",
    "play_bandit",
    "thresholds",
    "train_robust_policy",
    "uniform_allocation",
]
