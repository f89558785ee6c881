r"""The field's objectives on pairs that need no reference model: the log-probabilities of the policy say it all.

Written with :math:`\log\pi_w = \log\pi(y_w|x)`, :math:`\log\pi_l` for the rejected answer, and the answers' lengths
in tokens :math:`|y_w|` and :math:`|y_l|`.

Source: named at each function.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional

from .. import checks
from ..reduction import Reduction
from .pair_loss import PairLogProbabilities, PairLoss, check_pairs

Normalization = Literal["none", "length", "batch"]


def sft_loss(
    logp_chosen: Float[Tensor, " batch"],
    *,
    chosen_lengths: Num[Tensor, " batch"] | None = None,
    normalization: Normalization = "none",
) -> Float[Tensor, " batch"]:
    r"""Compute the negative log-likelihood of each chosen answer: supervised fine-tuning.

    :math:`-\log\pi_w / n_w` where :math:`n_w` is 1, the answer's length, or the mean length of the batch.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        chosen_lengths: Tokens in each chosen answer; needed unless ``normalization`` is "none".
        normalization: "none" makes answers count by their probability; "length" makes every answer count alike;
            "batch" makes every token count alike, so that the mean of the losses is the mean over the batch's
            tokens, as trainers of language models have it.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If ``logp_chosen`` is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or lengths are missing.

    Example:
        >>> rows, lengths = torch.tensor([-3.0, -9.0]), torch.tensor([2, 4])
        >>> sft_loss(rows, chosen_lengths=lengths, normalization="length")
        tensor([1.5000, 2.2500])
        >>> sft_loss(rows, chosen_lengths=lengths, normalization="batch").mean()
        tensor(2.)

    Source:
        The principle of maximum likelihood.
    """
    checks.one_of(normalization, "normalization", ("none", "length", "batch"))
    check_pairs(
        PairLogProbabilities(logp_chosen, logp_chosen, chosen_lengths=chosen_lengths, rejected_lengths=chosen_lengths),
        reference=False,
        lengths=normalization != "none",
    )
    if normalization == "none" or chosen_lengths is None:
        return -logp_chosen
    lengths = chosen_lengths.to(logp_chosen.dtype)
    return -logp_chosen / (lengths if normalization == "length" else lengths.mean())


class SFTLoss(PairLoss):
    r"""Supervised fine-tuning on the chosen answers; the rejected ones are not looked at.

    Args:
        normalization: "none", "length" (every answer counts alike) or "batch" (every token counts alike).
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> SFTLoss()(torch.tensor([-3.0]), torch.tensor([-9.0]))
        tensor(3.)

    Source:
        The principle of maximum likelihood.
    """

    needs_reference = False

    def __init__(self, normalization: Normalization = "none", *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.one_of(normalization, "normalization", ("none", "length", "batch"))
        self.normalization = normalization
        self.needs_lengths = normalization != "none"

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        check_pairs(pairs, reference=False)  # a rejected answer that is no number is a mistake all the same
        return sft_loss(pairs.chosen, chosen_lengths=pairs.chosen_lengths, normalization=self.normalization)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"normalization={self.normalization!r}"


def slic_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    *,
    margin: float = 1.0,
    sft_weight: float = 0.1,
) -> Float[Tensor, " batch"]:
    r"""Compute the SLiC loss of each pair.

    :math:`\max(0, \delta - \log\pi_w + \log\pi_l) - \lambda \log\pi_w`.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        margin: delta, the nats by which the chosen answer must be the likelier one, at least 0; 1 is the paper's.
        sft_weight: lambda, weight of the supervised term, at least 0; the paper takes its targets from the data of
            supervised fine-tuning, here they are the chosen answers. 0.1 is a choice of this library.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or a setting is out of range.

    Example:
        >>> slic_loss(torch.tensor([-3.0]), torch.tensor([-3.5]))
        tensor([0.8000])

    Source:
        Zhao et al. 2023, "SLiC-HF: sequence likelihood calibration with human feedback", arXiv 2305.10425.
    """
    checks.non_negative(margin, "margin")
    checks.non_negative(sft_weight, "sft_weight")
    check_pairs(PairLogProbabilities(logp_chosen, logp_rejected), reference=False)
    return (margin - logp_chosen + logp_rejected).relu() - sft_weight * logp_chosen


class SLiCLoss(PairLoss):
    r"""Sequence likelihood calibration: a hinge on the log-probabilities themselves, and supervised fine-tuning.

    Args:
        margin: Nats by which the chosen answer must be the likelier one, at least 0.
        sft_weight: Weight of the supervised term, at least 0.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> SLiCLoss()(torch.tensor([-3.0]), torch.tensor([-3.5]))
        tensor(0.8000)

    Source:
        Zhao et al. 2023, arXiv 2305.10425.
    """

    needs_reference = False

    def __init__(self, margin: float = 1.0, *, sft_weight: float = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.non_negative(margin, "margin")
        checks.non_negative(sft_weight, "sft_weight")
        self.margin = margin
        self.sft_weight = sft_weight

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        return slic_loss(pairs.chosen, pairs.rejected, margin=self.margin, sft_weight=self.sft_weight)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"margin={self.margin}, sft_weight={self.sft_weight}"


def cpo_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    *,
    chosen_lengths: Num[Tensor, " batch"] | None = None,
    beta: float = 0.1,
    sft_weight: float = 1.0,
    normalization: Normalization = "none",
) -> Float[Tensor, " batch"]:
    r"""Compute the contrastive (CPO) loss of each pair.

    :math:`-\log\sigma(\beta (\log\pi_w - \log\pi_l)) - \lambda \log\pi_w / n_w`: DPO with a uniform reference, held
    to the chosen answers by supervised fine-tuning.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        chosen_lengths: Tokens in each chosen answer; needed unless ``normalization`` is "none".
        beta: Weight of a nat of difference, above 0; 0.1 is the paper's.
        sft_weight: lambda, weight of the supervised term, at least 0; 1 is the paper's.
        normalization: What the supervised term is divided by, see :func:`sft_loss`: "none" is the paper's equation,
            "batch" what TRL computes.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, lengths are missing, or a setting is out of range.

    Example:
        >>> cpo_loss(torch.tensor([-3.0]), torch.tensor([-9.0]))
        tensor([3.4375])

    Source:
        Xu et al. 2024, "Contrastive preference optimization", arXiv 2401.08417, equations 3 to 5.
    """
    checks.positive(beta, "beta")
    checks.non_negative(sft_weight, "sft_weight")
    check_pairs(PairLogProbabilities(logp_chosen, logp_rejected), reference=False)
    supervised = sft_loss(logp_chosen, chosen_lengths=chosen_lengths, normalization=normalization)
    return sft_weight * supervised - functional.logsigmoid(beta * (logp_chosen - logp_rejected))


class CPOLoss(PairLoss):
    r"""Contrastive preference optimisation: logistic regression on log-probabilities, and supervised fine-tuning.

    Args:
        beta: Weight of a nat of difference, above 0; 0.1 is the paper's.
        sft_weight: Weight of the supervised term, at least 0; 1 is the paper's.
        normalization: What the supervised term is divided by: "none" (the paper), "length" or "batch" (TRL).
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> CPOLoss()(torch.tensor([-3.0]), torch.tensor([-9.0]))
        tensor(3.4375)

    Source:
        Xu et al. 2024, arXiv 2401.08417, equations 3 to 5.
    """

    needs_reference = False

    def __init__(
        self,
        beta: float = 0.1,
        *,
        sft_weight: float = 1.0,
        normalization: Normalization = "none",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        checks.non_negative(sft_weight, "sft_weight")
        checks.one_of(normalization, "normalization", ("none", "length", "batch"))
        self.beta = beta
        self.sft_weight = sft_weight
        self.normalization = normalization
        self.needs_lengths = normalization != "none"

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        return cpo_loss(
            pairs.chosen,
            pairs.rejected,
            chosen_lengths=pairs.chosen_lengths,
            beta=self.beta,
            sft_weight=self.sft_weight,
            normalization=self.normalization,
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}, sft_weight={self.sft_weight}, normalization={self.normalization!r}"


def simpo_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    *,
    chosen_lengths: Num[Tensor, " batch"],
    rejected_lengths: Num[Tensor, " batch"],
    beta: float = 2.0,
    target_margin: float = 1.0,
) -> Float[Tensor, " batch"]:
    r"""Compute the SimPO loss of each pair.

    :math:`-\log\sigma(\beta \log\pi_w / |y_w| - \beta \log\pi_l / |y_l| - \gamma)`.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        chosen_lengths: Tokens in each chosen answer.
        rejected_lengths: Tokens in each rejected answer.
        beta: Weight of a nat per token, above 0; 2 is the paper's.
        target_margin: gamma, by how much the chosen answer's reward should be the higher one; the paper's values
            lie between 0.3 and 1.6, and 1 is its choice for Llama 3.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or a setting is out of range.

    Example:
        >>> lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
        >>> simpo_loss(torch.tensor([-3.0]), torch.tensor([-9.0]), **lengths)
        tensor([0.4741])

    Source:
        Meng, Xia and Chen 2024, "SimPO: simple preference optimization with a reference-free reward",
        arXiv 2405.14734, equation 6.
    """
    checks.positive(beta, "beta")
    checks.non_negative(target_margin, "target_margin")
    check_pairs(
        PairLogProbabilities(
            logp_chosen, logp_rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
        ),
        reference=False,
        lengths=True,
    )
    difference = logp_chosen / chosen_lengths - logp_rejected / rejected_lengths
    return -functional.logsigmoid(beta * difference - target_margin)


class SimPOLoss(PairLoss):
    r"""Simple preference optimisation: logistic regression on log-probabilities per token, with a margin to reach.

    Args:
        beta: Weight of a nat per token, above 0; 2 is the paper's.
        target_margin: By how much the chosen answer's reward should be the higher one, at least 0.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
        >>> SimPOLoss()(torch.tensor([-3.0]), torch.tensor([-9.0]), **lengths)
        tensor(0.4741)

    Source:
        Meng, Xia and Chen 2024, arXiv 2405.14734, equation 6.
    """

    needs_reference = False
    needs_lengths = True

    def __init__(self, beta: float = 2.0, *, target_margin: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.positive(beta, "beta")
        checks.non_negative(target_margin, "target_margin")
        self.beta = beta
        self.target_margin = target_margin

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        chosen_lengths, rejected_lengths = pairs.lengths()
        return simpo_loss(
            pairs.chosen,
            pairs.rejected,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            beta=self.beta,
            target_margin=self.target_margin,
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"beta={self.beta}, target_margin={self.target_margin}"


def _log_odds(logp_per_token: Tensor) -> Tensor:
    """Compute log(p / (1 - p)) from log p, which a policy that is certain would send to infinity."""
    logp = logp_per_token.clamp_max(-torch.finfo(logp_per_token.dtype).eps)
    # log(1 - p) from whichever form does not cancel; either is finite on the whole range, so no gradient is NaN.
    log_complement = torch.where(logp < -0.6931, torch.log1p(-logp.exp()), torch.log(-torch.expm1(logp)))
    return logp - log_complement


def orpo_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    *,
    chosen_lengths: Num[Tensor, " batch"],
    rejected_lengths: Num[Tensor, " batch"],
    odds_weight: float = 0.1,
    normalization: Normalization = "length",
) -> Float[Tensor, " batch"]:
    r"""Compute the ORPO loss of each pair: supervised fine-tuning and the ratio of the answers' odds.

    :math:`-\log\pi_w / n_w - \lambda \log\sigma(\log\frac{o_w}{o_l})` with the odds :math:`o = p / (1 - p)` of the
    mean probability of a token, :math:`p = \pi(y|x)^{1/|y|}`.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        chosen_lengths: Tokens in each chosen answer.
        rejected_lengths: Tokens in each rejected answer.
        odds_weight: lambda, weight of the odds ratio, at least 0; 0.1 is the paper's.
        normalization: What the supervised term is divided by, see :func:`sft_loss`: "length" is the paper's, "batch"
            is TRL's, which also counts the tokens of the prompt.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or a setting is out of range.

    Example:
        >>> lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
        >>> orpo_loss(torch.tensor([-3.0]), torch.tensor([-9.0]), **lengths)
        tensor([1.5344])

    Source:
        Hong, Lee and Thorne 2024, "ORPO: monolithic preference optimization without reference model",
        arXiv 2403.07691, equations 4 to 7.
    """
    checks.non_negative(odds_weight, "odds_weight")
    check_pairs(
        PairLogProbabilities(
            logp_chosen, logp_rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
        ),
        reference=False,
        lengths=True,
    )
    supervised = sft_loss(logp_chosen, chosen_lengths=chosen_lengths, normalization=normalization)
    ratio = _log_odds(logp_chosen / chosen_lengths) - _log_odds(logp_rejected / rejected_lengths)
    return supervised - odds_weight * functional.logsigmoid(ratio)


class ORPOLoss(PairLoss):
    r"""Odds ratio preference optimisation: supervised fine-tuning that pushes the rejected answer's odds down.

    Args:
        odds_weight: Weight of the odds ratio, at least 0; 0.1 is the paper's.
        normalization: What the supervised term is divided by: "none", "length" (the paper) or "batch" (TRL).
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
        >>> ORPOLoss()(torch.tensor([-3.0]), torch.tensor([-9.0]), **lengths)
        tensor(1.5344)

    Source:
        Hong, Lee and Thorne 2024, arXiv 2403.07691, equations 4 to 7.
    """

    needs_reference = False
    needs_lengths = True

    def __init__(
        self, odds_weight: float = 0.1, *, normalization: Normalization = "length", reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction=reduction)
        checks.non_negative(odds_weight, "odds_weight")
        checks.one_of(normalization, "normalization", ("none", "length", "batch"))
        self.odds_weight = odds_weight
        self.normalization = normalization

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        chosen_lengths, rejected_lengths = pairs.lengths()
        return orpo_loss(
            pairs.chosen,
            pairs.rejected,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            odds_weight=self.odds_weight,
            normalization=self.normalization,
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"odds_weight={self.odds_weight}, normalization={self.normalization!r}"


def rrhf_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    *,
    chosen_lengths: Num[Tensor, " batch"],
    rejected_lengths: Num[Tensor, " batch"],
    sft_weight: float = 1.0,
) -> Float[Tensor, " batch"]:
    r"""Compute the RRHF loss of each pair: a ranking of answers by log-probability per token.

    :math:`\max(0, \log\pi_l / |y_l| - \log\pi_w / |y_w|) - \lambda \log\pi_w`.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, in nats.
        logp_rejected: The same for each rejected answer.
        chosen_lengths: Tokens in each chosen answer.
        rejected_lengths: Tokens in each rejected answer.
        sft_weight: lambda, weight of the supervised term, at least 0; 1 is the paper's.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, or ``sft_weight`` is out of range.

    Example:
        >>> lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([9])}
        >>> rrhf_loss(torch.tensor([-3.0]), torch.tensor([-9.0]), **lengths)
        tensor([3.5000])

    Source:
        Yuan et al. 2023, "RRHF: rank responses to align language models with human feedback without tears",
        arXiv 2304.05302, equations 1 to 4.
    """
    checks.non_negative(sft_weight, "sft_weight")
    check_pairs(
        PairLogProbabilities(
            logp_chosen, logp_rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
        ),
        reference=False,
        lengths=True,
    )
    return (logp_rejected / rejected_lengths - logp_chosen / chosen_lengths).relu() - sft_weight * logp_chosen


class RRHFLoss(PairLoss):
    r"""Rank responses by log-probability per token, with supervised fine-tuning on the better one.

    Args:
        sft_weight: Weight of the supervised term, at least 0; 1 is the paper's.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([9])}
        >>> RRHFLoss()(torch.tensor([-3.0]), torch.tensor([-9.0]), **lengths)
        tensor(3.5000)

    Source:
        Yuan et al. 2023, arXiv 2304.05302, equations 1 to 4.
    """

    needs_reference = False
    needs_lengths = True

    def __init__(self, sft_weight: float = 1.0, *, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        checks.non_negative(sft_weight, "sft_weight")
        self.sft_weight = sft_weight

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair."""
        chosen_lengths, rejected_lengths = pairs.lengths()
        return rrhf_loss(
            pairs.chosen,
            pairs.rejected,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            sft_weight=self.sft_weight,
        )

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"sft_weight={self.sft_weight}"
