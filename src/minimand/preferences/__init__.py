"""Learning from comparisons: objectives on pairs of answers, rewards that are uncertain, and what goes wrong."""

from .log_probabilities import sequence_log_probability, token_log_probabilities
from .margin_losses import DPOLoss, dpo_loss
from .pair_loss import PairLogProbabilities, PairLoss, PairTokens
from .ppo import clipped_policy_loss, clipped_value_loss, generalized_advantages, kl_estimate

__all__ = [
    "DPOLoss",
    "PairLogProbabilities",
    "PairLoss",
    "PairTokens",
    "clipped_policy_loss",
    "clipped_value_loss",
    "dpo_loss",
    "generalized_advantages",
    "kl_estimate",
    "sequence_log_probability",
    "token_log_probabilities",
]
