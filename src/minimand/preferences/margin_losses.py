r"""The field's objectives on the margin between a pair's implicit rewards, that new ones are measured against.

With :math:`u_w = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}`, :math:`u_l` for the rejected answer and the margin
:math:`m = u_w - u_l`, each objective is a function of :math:`m`, some with a term in :math:`u_w` or in the lengths
:math:`|y_w|, |y_l|`. Objectives that judge each answer by itself are in ``pointwise_losses``, those without a
reference in ``reference_free_losses``. All functions take ``(batch,)`` tensors and return the loss of each pair.

Source: named at each function.
"""

from __future__ import annotations

from jaxtyping import Float, Num
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
        """Compute the loss of each pair."""
        return dpo_loss(
            pairs.chosen, pairs.rejected, *pairs.references(), beta=self.beta, label_smoothing=self.label_smoothing
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}, label_smoothing={self.label_smoothing}"


def ipo_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    ref_logp_chosen: Float[Tensor, " batch"],
    ref_logp_rejected: Float[Tensor, " batch"],
    *,
    chosen_lengths: Num[Tensor, " batch"] | None = None,
    rejected_lengths: Num[Tensor, " batch"] | None = None,
    beta: float = 0.1,
    length_normalized: bool = False,
) -> Float[Tensor, " batch"]:
    r"""Compute the IPO loss of each pair.

    :math:`(m - \frac{1}{2\beta})^2`, or with :math:`m = u_w / |y_w| - u_l / |y_l|` where ``length_normalized``.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        ref_logp_chosen: The reference's.
        ref_logp_rejected: The reference's.
        chosen_lengths: Tokens in each chosen answer; needed where ``length_normalized``.
        rejected_lengths: Tokens in each rejected answer.
        beta: Strength of the KL divergence to the reference, the paper's tau, above 0; the margin is pulled to
            ``1 / (2 beta)`` nats, in all or per token. 0.1 is among the paper's.
        length_normalized: False is the paper's equation; True divides each log-ratio by its answer's length, as the
            paper's experiments did by its authors' later word, and as TRL does.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, lengths are missing, or a setting is out of range.

    Example:
        >>> ipo_loss(torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-5.0]))
        tensor([0.])

    Source:
        Azar et al. 2023, arXiv 2310.12036, equation 17.
    """
    checks.positive(beta, "beta")
    check_pairs(
        PairLogProbabilities(
            logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, chosen_lengths, rejected_lengths
        ),
        reference=True,
        lengths=length_normalized,
    )
    chosen, rejected = logp_chosen - ref_logp_chosen, logp_rejected - ref_logp_rejected
    if length_normalized and chosen_lengths is not None and rejected_lengths is not None:
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    return (chosen - rejected - 1 / (2 * beta)).square()


class IPOLoss(PairLoss):
    r"""Identity preference optimisation: the margin of implicit rewards is pulled to a finite target.

    Args:
        beta: Strength of the KL divergence to the reference, the paper's tau, above 0.
        length_normalized: Whether each log-ratio is divided by its answer's length: False is the paper's equation,
            True what TRL computes.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> loss = IPOLoss(beta=0.5)
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> loss(policy[:1], policy[1:], reference[:1], reference[1:])
        tensor(16.)

    Source:
        Azar et al. 2023, arXiv 2310.12036, equation 17.
    """

    def __init__(self, beta: float = 0.1, *, length_normalized: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        self.beta = beta
        self.length_normalized = length_normalized
        self.needs_lengths = length_normalized

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        return ipo_loss(
            pairs.chosen,
            pairs.rejected,
            *pairs.references(),
            chosen_lengths=pairs.chosen_lengths,
            rejected_lengths=pairs.rejected_lengths,
            beta=self.beta,
            length_normalized=self.length_normalized,
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}, length_normalized={self.length_normalized}"


def hinge_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    ref_logp_chosen: Float[Tensor, " batch"],
    ref_logp_rejected: Float[Tensor, " batch"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " batch"]:
    r"""Compute the hinge loss of each pair's margin.

    :math:`\max(0, 1 - \beta m)`. The hinge on the policy alone, with an SFT term, is :func:`slic_loss`.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        ref_logp_chosen: The reference's.
        ref_logp_rejected: The reference's.
        beta: Weight of a nat of margin, the paper's gamma, above 0; 0.1 is DPO's.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or ``beta`` is out of range.

    Example:
        >>> hinge_loss(torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-5.0]))
        tensor([0.5000])

    Source:
        Liu et al. 2023, "Statistical rejection sampling improves preference optimization", arXiv 2309.06657, the loss
        they call hinge-norm.
    """
    checks.positive(beta, "beta")
    check_pairs(PairLogProbabilities(logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected), reference=True)
    return (1 - beta * ((logp_chosen - ref_logp_chosen) - (logp_rejected - ref_logp_rejected))).relu()


class HingeLoss(PairLoss):
    r"""A support vector machine on the margin of implicit rewards: no gradient once the margin is ``1 / beta``.

    Args:
        beta: Weight of a nat of margin, above 0; 0.1 is DPO's.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> HingeLoss()(policy[:1], policy[1:], reference[:1], reference[1:])
        tensor(0.5000)

    Source:
        Liu et al. 2023, arXiv 2309.06657.
    """

    def __init__(self, beta: float = 0.1, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        self.beta = beta

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        return hinge_loss(pairs.chosen, pairs.rejected, *pairs.references(), beta=self.beta)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}"


def dpop_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    ref_logp_chosen: Float[Tensor, " batch"],
    ref_logp_rejected: Float[Tensor, " batch"],
    *,
    beta: float = 0.3,
    penalty: float = 50.0,
) -> Float[Tensor, " batch"]:
    r"""Compute the DPO-positive loss of each pair.

    :math:`-\log\sigma(\beta (m - \lambda \max(0, -u_w)))`: a chosen answer that has become less likely than under the
    reference counts against the margin.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        ref_logp_chosen: The reference's.
        ref_logp_rejected: The reference's.
        beta: Strength of the KL divergence to the reference, above 0; 0.3 is the paper's.
        penalty: lambda, nats of margin that a nat lost by the chosen answer costs, at least 0; 50 is the paper's,
            and 0 is DPO.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or a setting is out of range.

    Example:
        >>> dpop_loss(torch.tensor([-5.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-5.0]))
        tensor([14.1000])

    Source:
        Pal et al. 2024, "Smaug: fixing failure modes of preference optimisation with DPO-positive", arXiv 2402.13228,
        equation 3.
    """
    checks.positive(beta, "beta")
    checks.non_negative(penalty, "penalty")
    check_pairs(PairLogProbabilities(logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected), reference=True)
    chosen = logp_chosen - ref_logp_chosen
    margin = chosen - (logp_rejected - ref_logp_rejected)
    return -functional.logsigmoid(beta * (margin - penalty * (-chosen).relu()))


class DPOPLoss(PairLoss):
    r"""DPO-positive: DPO that pays when the chosen answer becomes less likely than under the reference.

    Args:
        beta: Strength of the KL divergence to the reference, above 0; 0.3 is the paper's.
        penalty: Nats of margin that a nat lost by the chosen answer costs; 50 is the paper's.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> policy, reference = torch.tensor([-5.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> DPOPLoss()(policy[:1], policy[1:], reference[:1], reference[1:])
        tensor(14.1000)

    Source:
        Pal et al. 2024, arXiv 2402.13228, equation 3.
    """

    def __init__(self, beta: float = 0.3, *, penalty: float = 50.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        checks.non_negative(penalty, "penalty")
        self.beta = beta
        self.penalty = penalty

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        return dpop_loss(pairs.chosen, pairs.rejected, *pairs.references(), beta=self.beta, penalty=self.penalty)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}, penalty={self.penalty}"


def rdpo_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    ref_logp_chosen: Float[Tensor, " batch"],
    ref_logp_rejected: Float[Tensor, " batch"],
    *,
    chosen_lengths: Num[Tensor, " batch"],
    rejected_lengths: Num[Tensor, " batch"],
    beta: float = 0.1,
    length_penalty: float = 0.2,
) -> Float[Tensor, " batch"]:
    r"""Compute the length-regularised DPO loss of each pair.

    :math:`-\log\sigma(\beta m + \alpha (|y_w| - |y_l|))`. A policy that maximises reward less :math:`\alpha` a token
    has the implicit reward :math:`\beta u + \alpha |y|`: what length explains of a preference need not be learnt.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        ref_logp_chosen: The reference's.
        ref_logp_rejected: The reference's.
        chosen_lengths: Tokens in each chosen answer.
        rejected_lengths: Tokens in each rejected answer.
        beta: Strength of the KL divergence to the reference, above 0; 0.1 is DPO's.
        length_penalty: alpha, the reward that a token costs, at least 0; 0.2 is that of Yuan et al. 2024, arXiv
            2410.13828, and 0 is DPO.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or a setting is out of range.

    Example:
        >>> rows = torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([-4.0]), torch.tensor([-5.0])
        >>> rdpo_loss(*rows, chosen_lengths=torch.tensor([4]), rejected_lengths=torch.tensor([6]))
        tensor([0.6444])

    Source:
        Park et al. 2024, "Disentangling length from quality in direct preference optimization", arXiv 2403.19159.
    """
    checks.positive(beta, "beta")
    checks.non_negative(length_penalty, "length_penalty")
    check_pairs(
        PairLogProbabilities(
            logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, chosen_lengths, rejected_lengths
        ),
        reference=True,
        lengths=True,
    )
    margin = (logp_chosen - ref_logp_chosen) - (logp_rejected - ref_logp_rejected)
    # A float times whole numbers would be float32, whatever the margin is.
    longer = (chosen_lengths - rejected_lengths).to(margin.dtype)
    return -functional.logsigmoid(beta * margin + length_penalty * longer)


class RDPOLoss(PairLoss):
    r"""DPO with a price on every token, so that length is not learnt as quality.

    Args:
        beta: Strength of the KL divergence to the reference, above 0; 0.1 is DPO's.
        length_penalty: The reward that a token costs, at least 0.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([6])}
        >>> RDPOLoss()(policy[:1], policy[1:], reference[:1], reference[1:], **lengths)
        tensor(0.6444)

    Source:
        Park et al. 2024, arXiv 2403.19159.
    """

    needs_lengths = True

    def __init__(self, beta: float = 0.1, *, length_penalty: float = 0.2, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        checks.non_negative(length_penalty, "length_penalty")
        self.beta = beta
        self.length_penalty = length_penalty

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        chosen_lengths, rejected_lengths = pairs.lengths()
        return rdpo_loss(
            pairs.chosen,
            pairs.rejected,
            *pairs.references(),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            beta=self.beta,
            length_penalty=self.length_penalty,
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}, length_penalty={self.length_penalty}"
