r"""The field's objectives that judge each answer of a pair by itself, against a reference.

With :math:`u_w = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}` and :math:`u_l` for the rejected answer, each objective is
the sum of a function of :math:`u_w` and one of :math:`u_l`: no margin ties the two answers together.

Source: named at each function.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..reduction import Reduction, reduce
from .pair_loss import PairLogProbabilities, PairLoss, check_pairs


def sppo_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    ref_logp_chosen: Float[Tensor, " batch"],
    ref_logp_rejected: Float[Tensor, " batch"],
    *,
    beta: float = 0.001,
) -> Float[Tensor, " batch"]:
    r"""Compute the self-play (SPPO) loss of each pair with hard labels.

    :math:`(u_w - \frac{1}{2\beta})^2 + (u_l + \frac{1}{2\beta})^2`: the chosen answer wins against the policy with
    probability 1, the rejected one with probability 0.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        ref_logp_chosen: The reference's: the policy of the round before.
        ref_logp_rejected: The reference's.
        beta: The paper's 1 / eta, above 0; a round moves each log-probability towards a change of
            ``1 / (2 beta)`` nats. 0.001 is the paper's.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or ``beta`` is out of range.

    Example:
        >>> rows = torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-5.0])
        >>> sppo_loss(*rows, beta=0.1)
        tensor([17.])

    Source:
        Wu et al. 2024, "Self-play preference optimization for language model alignment", arXiv 2405.00675,
        equation 4.7.
    """
    checks.positive(beta, "beta")
    check_pairs(PairLogProbabilities(logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected), reference=True)
    target = 1 / (2 * beta)
    return (logp_chosen - ref_logp_chosen - target).square() + (logp_rejected - ref_logp_rejected + target).square()


class SPPOLoss(PairLoss):
    r"""Self-play preference optimisation with hard labels: each log-ratio is pulled to its own target.

    Args:
        beta: The paper's 1 / eta, above 0; 0.001 is the paper's.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> SPPOLoss(beta=0.1)(policy[:1], policy[1:], reference[:1], reference[1:])
        tensor(17.)

    Source:
        Wu et al. 2024, arXiv 2405.00675, equation 4.7.
    """

    def __init__(self, beta: float = 0.001, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        self.beta = beta

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        return sppo_loss(pairs.chosen, pairs.rejected, *pairs.references(), beta=self.beta)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}"


def kto_baseline(
    logp_mismatched: Float[Tensor, " batch"], ref_logp_mismatched: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    r"""Estimate KTO's point of reference, the KL divergence of the policy from its reference.

    :math:`z_0 = \max(0, \frac{1}{n} \sum_i \log\frac{\pi(y_{i+1}|x_i)}{\pi_{ref}(y_{i+1}|x_i)})` over answers that
    belong to other prompts of the batch: cheap, because nothing is sampled, and biased, which the paper accepts.

    Args:
        logp_mismatched: Policy's log-probability of another prompt's answer after each prompt, in nats.
        ref_logp_mismatched: The reference's.

    Returns:
        The estimate, a scalar without gradient, in nats.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ or a value is not finite.

    Example:
        >>> kto_baseline(torch.tensor([-3.0, -7.0]), torch.tensor([-4.0, -8.0]))
        tensor(1.)

    Source:
        Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1.
    """
    checks.floating(logp_mismatched, "logp_mismatched")
    checks.floating(ref_logp_mismatched, "ref_logp_mismatched")
    if logp_mismatched.shape != ref_logp_mismatched.shape:
        raise ValueError(
            f"ref_logp_mismatched must have shape {tuple(logp_mismatched.shape)}, "
            f"got {tuple(ref_logp_mismatched.shape)}"
        )
    checks.not_empty(logp_mismatched, "logp_mismatched")
    checks.finite(logp_mismatched, "logp_mismatched")
    checks.finite(ref_logp_mismatched, "ref_logp_mismatched")
    return (logp_mismatched - ref_logp_mismatched).detach().mean().clamp_min(0)


def kto_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    ref_logp_chosen: Float[Tensor, " batch"],
    ref_logp_rejected: Float[Tensor, " batch"],
    *,
    baseline: Float[Tensor, ""] | float | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " batch"]:
    r"""Compute the KTO loss of each pair: the mean loss of a desirable and an undesirable example.

    :math:`\frac12 [\lambda_D (1 - \sigma(\beta (u_w - z_0))) + \lambda_U (1 - \sigma(\beta (z_0 - u_l)))]`.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, the desirable example, in nats.
        logp_rejected: The same for each rejected answer, the undesirable example.
        ref_logp_chosen: The reference's.
        ref_logp_rejected: The reference's.
        baseline: z_0, at least 0, in nats, no gradient flows into it; :func:`kto_baseline` estimates it from
            mismatched answers. None estimates it from the pairs themselves: desirable examples are judged against
            the mean log-ratio of the batch's rejected answers, undesirable ones against that of the chosen, both
            clamped at 0.
        beta: Risk aversion, above 0; 0.1 is the paper's.
        desirable_weight: lambda_D, at least 0.
        undesirable_weight: lambda_U, at least 0.

    Returns:
        The losses, ``(batch,)``; their mean is the mean over the ``2 * batch`` examples.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or a setting is out of range.

    Example:
        >>> rows = torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-5.0])
        >>> kto_loss(*rows, baseline=0.5)
        tensor([0.4384])

    Source:
        Ethayarajh et al. 2024, "KTO: model alignment as prospect theoretic optimization", arXiv 2402.01306,
        equations 7 and 8.
    """
    checks.positive(beta, "beta")
    checks.non_negative(desirable_weight, "desirable_weight")
    checks.non_negative(undesirable_weight, "undesirable_weight")
    check_pairs(PairLogProbabilities(logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected), reference=True)
    chosen, rejected = logp_chosen - ref_logp_chosen, logp_rejected - ref_logp_rejected
    if baseline is None:
        for_chosen = rejected.detach().mean().clamp_min(0)
        for_rejected = chosen.detach().mean().clamp_min(0)
    else:
        given = torch.as_tensor(baseline, dtype=chosen.dtype, device=chosen.device).detach()
        checks.require(
            torch.isfinite(given) & (given >= 0),
            lambda: f"baseline must be a finite number of nats of at least 0, got {baseline}",
        )
        for_chosen = for_rejected = given
    # 1 - sigma(z) = sigma(-z), which keeps its digits where z is large.
    desirable = torch.sigmoid(beta * (for_chosen - chosen))
    undesirable = torch.sigmoid(beta * (rejected - for_rejected))
    return (desirable_weight * desirable + undesirable_weight * undesirable) / 2


class KTOLoss(PairLoss):
    r"""Kahneman-Tversky optimisation: each answer is good or bad by itself, with the value function of prospects.

    Args:
        beta: Risk aversion, above 0; 0.1 is the paper's.
        desirable_weight: Weight of desirable examples, at least 0.
        undesirable_weight: Weight of undesirable examples, at least 0.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> KTOLoss()(policy[:1], policy[1:], reference[:1], reference[1:], baseline=0.5)
        tensor(0.4384)

    Source:
        Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        checks.non_negative(desirable_weight, "desirable_weight")
        checks.non_negative(undesirable_weight, "undesirable_weight")
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight

    def forward(
        self,
        logp_chosen: Float[Tensor, " batch"],
        logp_rejected: Float[Tensor, " batch"],
        ref_logp_chosen: Float[Tensor, " batch"] | None = None,
        ref_logp_rejected: Float[Tensor, " batch"] | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        baseline: Float[Tensor, ""] | float | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """Compute the loss of a batch of pairs.

        Args:
            logp_chosen: Policy's log-probability of each chosen answer, summed over tokens, ``(batch,)``, in nats.
            logp_rejected: The same for each rejected answer.
            ref_logp_chosen: The frozen reference's.
            ref_logp_rejected: The same for each rejected answer.
            chosen_lengths: Unused: KTO does not ask for lengths.
            rejected_lengths: Unused.
            baseline: The KL divergence to the reference, see :func:`kto_baseline`; None estimates it from the pairs.

        Returns:
            A scalar, or ``(batch,)`` with ``reduction="none"``.

        Raises:
            TypeError: If a log-probability is no floating-point tensor.
            ValueError: If shapes differ, a value is not finite, or the reference is missing.
        """
        pairs = PairLogProbabilities(
            logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, chosen_lengths, rejected_lengths
        )
        check_pairs(pairs, reference=True)
        return reduce(self.losses(pairs, baseline), self.reduction)

    def losses(
        self, pairs: PairLogProbabilities, baseline: Float[Tensor, ""] | float | None = None
    ) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        return kto_loss(
            pairs.chosen,
            pairs.rejected,
            *pairs.references(),
            baseline=baseline,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return (
            f"beta={self.beta}, desirable_weight={self.desirable_weight}, undesirable_weight={self.undesirable_weight}"
        )
