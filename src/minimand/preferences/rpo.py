r"""Regularized preference optimisation: DPO plus the likelihood of a baseline answer, which is pessimism in disguise.

Preference pairs tell rewards apart only on answers that were compared. The cautious policy is best against the worst
reward :math:`r` that still fits the pairs, in comparison with a baseline policy :math:`\pi_b` and at the price of a
divergence from the reference:

.. math:: \hat\pi \in \arg\max_\pi \min_r \; \eta\, \mathrm{E}_x V(\pi, r) + L(r), \qquad
          V(\pi, r) = \mathrm{E}_\pi[r] - \mathrm{E}_{\pi_b}[r] - \beta\, KL(\pi \| \pi_{ref}),

with :math:`L(r) = -\mathrm{E} \log\sigma(r(x, y_w) - r(x, y_l))`. For one :math:`r` the best policy is
:math:`\pi_r \propto \pi_{ref}\, e^{r / \beta}`. Exchange maximum and minimum and write :math:`r` through
:math:`\pi_r`: the normaliser cancels against the baseline's, the value is
:math:`-\beta\, \mathrm{E}_{\pi_b} \log \frac{\pi_r}{\pi_{ref}}`, and what is left to minimise, but for a constant, is

.. math:: L_{RPO}(\pi) = L_{DPO}(\pi) + \eta \beta\, \mathrm{E}_{x,\, y_0 \sim \pi_b}[-\log\pi(y_0 | x)].

Source: Liu, Lu, Zhang, Liu, Guo, Yang, Blanchet and Wang, "Provably Mitigating Overoptimization in RLHF: Your SFT Loss
is Implicitly an Adversarial Regularizer", NeurIPS 2024, arXiv 2405.16436: algorithm 1 (the game), algorithm 2 (the
loss), section 5 (coverage).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..reduction import Reduction, reduce
from .margin_losses import dpo_loss
from .pair_loss import PairLogProbabilities, PairLoss

Likelihood = Literal["sum", "mean"]


def rpo_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    ref_logp_chosen: Float[Tensor, " batch"],
    ref_logp_rejected: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
    eta: float = 0.005,
    sft: Likelihood = "sum",
    label_smoothing: float = 0.0,
    logp_baseline: Float[Tensor, " batch"] | None = None,
    baseline_lengths: Tensor | None = None,
) -> Float[Tensor, " batch"]:
    r"""Compute the RPO loss of each pair.

    With :math:`y_0` the baseline answer, of :math:`|y_0|` tokens, it is the DPO loss plus
    :math:`-\eta \beta \log\pi(y_0 | x)` where ``sft="sum"``, or :math:`-\eta \log\pi(y_0 | x) / |y_0|` where
    ``sft="mean"``.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, summed over tokens, in nats.
        logp_rejected: The same for each rejected answer.
        ref_logp_chosen: The reference's.
        ref_logp_rejected: The reference's.
        beta: Strength of the KL divergence to the reference, above 0; DPO's usual 0.1. The official recipes have 0.01
            and 0.05 for ``"sum"``, 0.5 for ``"mean"``.
        eta: Strength of pessimism, at least 0; 0 is DPO. 0.005 is that of the official recipes for ``"sum"``; for
            ``"mean"`` they have 0.2.
        sft: How the baseline answer's tokens add up: ``"sum"`` is the theorem's, ``"mean"`` keeps long answers from
            weighing more.
        label_smoothing: The share of pairs assumed to be labelled the wrong way, in [0, 0.5); for the DPO term only.
        logp_baseline: Policy's log-probability of an answer drawn from the baseline policy; None takes the chosen one.
        baseline_lengths: Tokens in each baseline answer (the chosen one if ``logp_baseline`` is None); for ``"mean"``.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, a setting is out of range, or lengths are missing.

    Example:
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> rpo_loss(policy[:1], policy[1:], reference[:1], reference[1:], eta=0.5)
        tensor([0.6241])

    Source:
        Liu et al. 2024, arXiv 2405.16436, algorithm 2; ``"mean"`` is the official code's second variant.
    """
    _check_settings(eta, sft)
    losses = dpo_loss(
        logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, beta=beta, label_smoothing=label_smoothing
    )
    if logp_baseline is None:
        logp_baseline = logp_chosen
    else:
        checks.floating(logp_baseline, "logp_baseline")
        if logp_baseline.shape != logp_chosen.shape:
            raise ValueError(
                f"logp_baseline must have shape {tuple(logp_chosen.shape)}, got {tuple(logp_baseline.shape)}"
            )
        checks.finite(logp_baseline, "logp_baseline")
    if sft == "sum":
        return losses - eta * beta * logp_baseline
    if baseline_lengths is None:
        raise ValueError("baseline_lengths is missing: sft='mean' divides by the number of tokens")
    if baseline_lengths.shape != logp_chosen.shape:
        raise ValueError(
            f"baseline_lengths must have shape {tuple(logp_chosen.shape)}, got {tuple(baseline_lengths.shape)}"
        )
    checks.require(baseline_lengths >= 1, lambda: "baseline_lengths must be at least 1")
    return losses - eta * logp_baseline / baseline_lengths


class RPOLoss(PairLoss):
    r"""DPO with pessimism: the likelihood of a baseline answer keeps probability where the pairs have been.

    Args:
        beta: Strength of the KL divergence to the reference, above 0; DPO's usual 0.1.
        eta: Strength of pessimism, at least 0; 0 is DPO. The answer's negative log-likelihood weighs ``eta * beta``
            where ``sft="sum"`` and ``eta`` where ``sft="mean"``. 0.005 is that of the official recipes for ``"sum"``;
            for ``"mean"`` they have 0.2.
        sft: How the baseline answer's tokens add up, ``"sum"`` (the theorem's) or ``"mean"``, which needs lengths.
        label_smoothing: The share of pairs assumed to be labelled the wrong way, in [0, 0.5); for the DPO term only.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> loss = RPOLoss(beta=0.5, eta=0.1)
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> loss(policy[:1], policy[1:], reference[:1], reference[1:])
        tensor(0.2289)

    Source:
        Liu et al. 2024, arXiv 2405.16436, algorithm 2.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        eta: float = 0.005,
        sft: Likelihood = "sum",
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        _check_settings(eta, sft)
        checks.between(label_smoothing, "label_smoothing", 0.0, 0.5, high_open=True)
        self.beta = beta
        self.eta = eta
        self.sft = sft
        self.label_smoothing = label_smoothing
        # A trainer asks the instance; only one of the two forms divides.
        self.needs_lengths = sft == "mean"

    def forward(
        self,
        logp_chosen: Float[Tensor, " batch"],
        logp_rejected: Float[Tensor, " batch"],
        ref_logp_chosen: Float[Tensor, " batch"] | None = None,
        ref_logp_rejected: Float[Tensor, " batch"] | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        logp_baseline: Float[Tensor, " batch"] | None = None,
        baseline_lengths: Tensor | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """Compute the loss of a batch of pairs, each with a baseline answer of its own if one is given.

        Args:
            logp_chosen: Policy's log-probability of each chosen answer, summed over tokens, ``(batch,)``, in nats.
            logp_rejected: The same for each rejected answer.
            ref_logp_chosen: The frozen reference's.
            ref_logp_rejected: The same for each rejected answer.
            chosen_lengths: Tokens in each chosen answer, for ``sft="mean"`` without ``logp_baseline``.
            rejected_lengths: The same for each rejected answer.
            logp_baseline: Policy's log-probability of an answer drawn from the baseline policy, one a pair; None takes
                the chosen one.
            baseline_lengths: Tokens in each of those, for ``sft="mean"``.

        Returns:
            A scalar, or ``(batch,)`` with ``reduction="none"``.

        Raises:
            TypeError: If a log-probability is no floating-point tensor.
            ValueError: If shapes differ, a value is not finite, or an input this objective needs is missing.
        """
        pairs = PairLogProbabilities(
            logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, chosen_lengths, rejected_lengths
        )
        if logp_baseline is None:
            if baseline_lengths is not None:
                raise ValueError("baseline_lengths came without logp_baseline")
            return self.of(pairs)
        return reduce(self._losses(pairs, logp_baseline, baseline_lengths), self.reduction)

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair, with the chosen answer as the baseline."""
        return self._losses(pairs, None, pairs.chosen_lengths)

    def _losses(self, pairs: PairLogProbabilities, logp_baseline: Tensor | None, lengths: Tensor | None) -> Tensor:
        return rpo_loss(
            pairs.chosen,
            pairs.rejected,
            *pairs.references(),
            beta=self.beta,
            eta=self.eta,
            sft=self.sft,
            label_smoothing=self.label_smoothing,
            logp_baseline=logp_baseline,
            baseline_lengths=lengths,
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}, eta={self.eta}, sft={self.sft!r}, label_smoothing={self.label_smoothing}"


def adversarial_value(
    reward: Float[Tensor, "*rewards answers"],
    reference: Float[Tensor, "*references answers"],
    baseline: Float[Tensor, "*baselines answers"],
    *,
    beta: float = 0.1,
    policy: Float[Tensor, "*policies answers"] | None = None,
) -> Float[Tensor, "*values"]:
    r"""Compute what a policy gains on a baseline under a reward, after paying for its divergence from the reference.

    :math:`V(\pi, r) = \mathrm{E}_\pi[r] - \mathrm{E}_{\pi_b}[r] - \beta\, KL(\pi \| \pi_{ref})`, and without ``policy``
    its maximum over policies, :math:`\beta \log \mathrm{E}_{\pi_{ref}} e^{r / \beta} - \mathrm{E}_{\pi_b}[r]`. The
    adversary picks, among rewards that fit the pairs, the one where this is least. A reward shifted by a constant has
    the same value.

    Args:
        reward: Reward of each answer; leading dimensions (prompts, rewards, policies) broadcast.
        reference: The reference policy's probabilities of the answers.
        baseline: The baseline policy's probabilities.
        beta: Price of the divergence, above 0.
        policy: The policy's probabilities, or None for the best policy,
            :math:`\pi_r \propto \pi_{ref}\, e^{r / \beta}`.

    Returns:
        The values; minus infinity where ``policy`` gives an answer that the reference never gives.

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If a reward is not finite, probabilities are none, or ``beta`` is not above 0.

    Example:
        >>> even = torch.tensor([0.5, 0.5])
        >>> adversarial_value(torch.tensor([1.0, -1.0]), even, even, beta=1.0)
        tensor(0.4338)

    Source:
        Liu et al. 2024, arXiv 2405.16436, algorithm 1.
    """
    checks.positive(beta, "beta")
    checks.floating(reward, "reward")
    checks.finite(reward, "reward")
    _check_probabilities(reference, "reference")
    _check_probabilities(baseline, "baseline")
    of_baseline = (baseline * reward).sum(-1)
    if policy is None:
        return beta * (reference.log() + reward / beta).logsumexp(-1) - of_baseline
    _check_probabilities(policy, "policy")
    divergence = (torch.special.xlogy(policy, policy) - torch.special.xlogy(policy, reference)).sum(-1)
    return (policy * reward).sum(-1) - of_baseline - beta * divergence


def coverage_coefficient(
    rewards: Float[Tensor, "rewards *prompts answers"],
    true_reward: Float[Tensor, "*prompts answers"],
    policy: Float[Tensor, "*prompts answers"],
    baseline: Float[Tensor, "*prompts answers"],
    pairs: Float[Tensor, "*prompts answers answers"],
) -> Float[Tensor, ""]:
    r"""Compute how far preference pairs can leave a policy's value in doubt, for a finite class of rewards.

    With :math:`d = r^* - r` the error of a reward,

    .. math:: C(\pi) = \max\Bigl(0, \max_r \frac{\mathrm{E}_{y_1 \sim \pi,\, y_0 \sim \pi_b}[d(x, y_1) - d(x, y_0)]}
              {\sqrt{\mathrm{E}_{(y_1, y_0) \sim \mu}[(d(x, y_1) - d(x, y_0))^2]}}\Bigr).

    It is infinite if some reward agrees with the true one on all pairs and yet undervalues the policy. Pessimism
    competes with every policy whose coefficient is small, whatever happens to the others: for rewards in [0, R] and
    infinitely many pairs, no :math:`\pi` has a value :math:`V(\pi, r^*)` above that of the solution of the game by more
    than :math:`\eta\, C(\pi)^2 / (8 \sigma'(R)^2)`.

    Args:
        rewards: The class, one reward of every answer to every prompt a row; without ``prompts`` dimensions there is
            one prompt.
        true_reward: The reward that preferences follow.
        policy: Probabilities of the policy that is to be covered.
        baseline: Probabilities of the baseline policy.
        pairs: How often two answers to a prompt are compared, the paper's mu: adds up to one over all its entries.
            Prompts weigh as they do here.

    Returns:
        The coefficient, at least 0.

    Raises:
        TypeError: If an argument is no floating-point tensor.
        ValueError: If a reward is not finite, or probabilities are none.

    Example:
        >>> true, other = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])
        >>> compared = torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> best, even = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.0])
        >>> coverage_coefficient(torch.stack([true, other]), true, best, even, compared)
        tensor(0.5000)

    Source:
        Liu et al. 2024, arXiv 2405.16436, section 5; the bound for infinitely many pairs follows from the game's
        optimality and the strong convexity of the logistic loss on [-R, R] (derived here).
    """
    for value, name in ((rewards, "rewards"), (true_reward, "true_reward")):
        checks.floating(value, name)
        checks.not_empty(value, name)
        checks.finite(value, name)
    _check_probabilities(policy, "policy")
    _check_probabilities(baseline, "baseline")
    _check_probabilities(pairs.flatten(), "pairs")
    errors = true_reward - rewards
    # Rewards that differ by a constant must be told from those that do not: below this a difference is rounding.
    size = rewards.flatten(1).abs().amax(1) + true_reward.abs().amax()
    rounding = 8 * torch.finfo(errors.dtype).eps * size
    differences = errors[..., :, None] - errors[..., None, :]
    squares = (pairs * differences.square()).reshape(len(rewards), -1).sum(1)
    deviations = torch.where(squares.sqrt() > rounding, squares.sqrt(), torch.zeros_like(squares))
    doubts = (pairs.sum((-1, -2)) * ((policy - baseline) * errors).sum(-1)).reshape(len(rewards), -1).sum(1)
    return torch.where(doubts > rounding, doubts / deviations, torch.zeros_like(doubts)).amax()


def _check_settings(eta: float, sft: str) -> None:
    checks.non_negative(eta, "eta")
    checks.one_of(sft, "sft", ("sum", "mean"))


def _check_probabilities(value: Tensor, name: str) -> None:
    checks.floating(value, name)
    checks.not_empty(value, name)
    tolerance = torch.finfo(value.dtype).eps ** 0.5
    checks.require(
        (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() <= tolerance),
        lambda: f"{name} must hold probabilities: at least 0, finite, and one in sum",
    )
