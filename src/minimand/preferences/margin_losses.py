r"""The field's objectives on pairs of answers that new ones are measured against.

With :math:`u_w = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}`, :math:`u_l` for the rejected answer and the margin
:math:`m = u_w - u_l`, each objective is a function of :math:`m` or of :math:`u_w` and :math:`u_l`; those without a
reference use the log-probabilities themselves. All functions here take ``(batch,)`` tensors and return the loss of
each pair.

Source: named at each function.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .. import checks
from ..reduction import Reduction
from .pair_loss import PairLogProbabilities, PairLoss, check_pairs


def dpo_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    ref_logp_chosen: Float[Tensor, " batch"],
    ref_logp_rejected: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    r"""Compute the DPO loss of each pair.

    :math:`-(1 - \epsilon) \log\sigma(\beta m) - \epsilon \log\sigma(-\beta m)`.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        ref_logp_chosen: The reference's.
        ref_logp_rejected: The reference's.
        beta: Strength of the KL divergence to the reference, above 0; 0.1 is the paper's.
        label_smoothing: epsilon, the share of pairs assumed to be labelled the wrong way, in [0, 0.5).

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or a setting is out of range.

    Example:
        >>> dpo_loss(torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-5.0]))
        tensor([0.4741])

    Source:
        Rafailov et al. 2023, arXiv 2305.18290, equation 7; label smoothing: Mitchell 2023, "A note on DPO with noisy
        preferences".
    """
    checks.positive(beta, "beta")
    checks.between(label_smoothing, "label_smoothing", 0.0, 0.5, high_open=True)
    check_pairs(PairLogProbabilities(logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected), reference=True)
    scaled = beta * ((logp_chosen - ref_logp_chosen) - (logp_rejected - ref_logp_rejected))
    losses = -functional.logsigmoid(scaled)
    # -log sigma(-z) = -log sigma(z) + z, so the smoothed loss needs one logarithm, not two.
    return losses if label_smoothing == 0 else losses + label_smoothing * scaled


class DPOLoss(PairLoss):
    r"""Direct preference optimisation: logistic regression on the margin of implicit rewards.

    Args:
        beta: Strength of the KL divergence to the reference, above 0; 0.1 is the paper's.
        label_smoothing: The share of pairs assumed to be labelled the wrong way, in [0, 0.5).
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> loss = DPOLoss(beta=0.5)
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> loss(policy[:1], policy[1:], reference[:1], reference[1:])
        tensor(0.0789)

    Source:
        Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """

    def __init__(self, beta: float = 0.1, *, label_smoothing: float = 0.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        checks.between(label_smoothing, "label_smoothing", 0.0, 0.5, high_open=True)
        self.beta = beta
        self.label_smoothing = label_smoothing

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair from checked log-probabilities."""
        return dpo_loss(
            pairs.chosen, pairs.rejected, *pairs.references(), beta=self.beta, label_smoothing=self.label_smoothing
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}, label_smoothing={self.label_smoothing}"
