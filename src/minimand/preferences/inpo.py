r"""Iterative Nash policy optimisation: self-play by mirror descent, one squared loss on pairs a round.

Round t holds the reference :math:`\rho` and the last policy :math:`\pi_t` fixed. The step of mirror descent on the
regularised game (:mod:`minimand.preferences.preference_game`) is

.. math:: \pi_{t+1}(y) \propto \rho(y)^{\tau/\eta}\, \pi_t(y)^{1 - \tau/\eta} \exp(P(y \succ \pi_t) / \eta),

with :math:`\eta \ge \tau` one over its size. Its normaliser drops out of the log-ratio of two answers,

.. math:: h(w, l) = \log\frac{\pi(w)}{\pi(l)} - \frac\tau\eta \log\frac{\rho(w)}{\rho(l)}
                   - \Big(1 - \frac\tau\eta\Big) \log\frac{\pi_t(w)}{\pi_t(l)},

and no win rate is needed: over pairs drawn independently from :math:`\pi_t`, the better one called w,

.. math:: \ell = p \Big(h - \frac1{2\eta}\Big)^2 + (1 - p) \Big(h + \frac1{2\eta}\Big)^2,

with p = 1 for a label that was drawn, or the probability that w is better, has the step as its only minimiser: write
:math:`h = g(w) - g(l)`; the part of the mean loss that is linear in g is
:math:`-\frac4\eta E_y\, g(y) (P(y \succ \pi_t) - \frac12)` in either case, the same as that of regressing h on the
difference of win rates over :math:`\eta`.

It is IPO with :math:`\beta = \eta` against the geometric mixture of reference and last policy; in the first round,
where the last policy is the reference, it is IPO itself.

Source: Zhang, Yu, Peng, Song, Tian, Huo, Jiang, Mi and Yu, "Iterative Nash Policy Optimization: Aligning LLMs with
General Preferences via No-Regret Learning", ICLR 2025, arXiv 2407.00617, section 3.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..reduction import Reduction, reduce
from .pair_loss import PairLogProbabilities, PairLoss, check_pairs


def inpo_loss(
    logp_chosen: Float[Tensor, " batch"],
    logp_rejected: Float[Tensor, " batch"],
    ref_logp_chosen: Float[Tensor, " batch"],
    ref_logp_rejected: Float[Tensor, " batch"],
    *,
    prev_logp_chosen: Float[Tensor, " batch"] | None = None,
    prev_logp_rejected: Float[Tensor, " batch"] | None = None,
    preference: Float[Tensor, " batch"] | None = None,
    eta: float = 7.5e-3,
    tau: float | None = None,
) -> Float[Tensor, " batch"]:
    r"""Compute the INPO loss of each pair.

    :math:`p (h - \frac1{2\eta})^2 + (1 - p) (h + \frac1{2\eta})^2` with the log-ratio h of policy to mixture.

    Args:
        logp_chosen: Policy's log-probability of each chosen answer, summed over tokens, in nats.
        logp_rejected: The same for each rejected answer.
        ref_logp_chosen: The reference's.
        ref_logp_rejected: The reference's.
        prev_logp_chosen: Those of the policy that the round began with, which drew the answers; the reference's if
            None, as in the first round.
        prev_logp_rejected: The same for each rejected answer.
        preference: p, the probability that the chosen answer is better, in [0, 1]; 1 if None. A tie is 0.5.
        eta: One over the step size of mirror descent, above 0 and at least ``tau``. 7.5e-3 is what a public
            reimplementation gives as the paper's; the paper's own was not to be had.
        tau: Weight of the divergence to the reference, at least 0; a third of ``eta`` if None, from the same source.

    Returns:
        The losses, ``(batch,)``.

    Raises:
        TypeError: If a log-probability is no floating-point tensor.
        ValueError: If shapes differ, a value is not finite, what is held fixed requires a gradient, ``preference`` is
            no probability, or ``eta`` is below ``tau``.

    Example:
        >>> policy, reference = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -5.0])
        >>> inpo_loss(policy[:1], policy[1:], reference[:1], reference[1:], eta=0.5)
        tensor([16.])

    Source:
        Zhang et al. 2024, arXiv 2407.00617, section 3.
    """
    pairs = PairLogProbabilities(logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected)
    check_pairs(pairs, reference=True)
    return _losses(pairs, (prev_logp_chosen, prev_logp_rejected), preference, eta=eta, ratio=_ratio(eta, tau))


class INPOLoss(PairLoss):
    r"""One round of iterative Nash policy optimisation: a squared loss on pairs that the last policy drew.

    Its minimiser over all policies is the exact step of mirror descent towards the policy that no other beats,
    whatever the preferences. Without the last policy's log-probabilities it is the first round, where the last policy
    is the reference: IPO with ``beta=eta``. So it drops into any trainer on pairs; one that knows of a single reference
    runs the later rounds when it is handed :meth:`mixed_reference` in its place.

    Args:
        eta: One over the step size of mirror descent, above 0 and at least ``tau``. Log-ratios of whole answers
            are drawn to 1 / (2 eta) nats. See :func:`inpo_loss` for where the default comes from.
        tau: Weight of the divergence to the reference, at least 0; a third of ``eta`` if None.
        reduction: "mean", "sum", "none", or a risk.

    Example:
        >>> loss = INPOLoss(eta=0.5, tau=0.25)
        >>> policy, reference, previous = torch.tensor([[-3.0, -9.0], [-4.0, -5.0], [-3.0, -7.0]]).split(1)
        >>> fixed = {"prev_logp_chosen": previous[:, 0], "prev_logp_rejected": previous[:, 1]}
        >>> loss(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], **fixed)
        tensor(6.2500)

    Source:
        Zhang et al. 2024, arXiv 2407.00617, section 3.
    """

    def __init__(self, eta: float = 7.5e-3, *, tau: float | None = None, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        self.ratio = _ratio(eta, tau)
        self.eta = eta
        self.tau = eta / 3 if tau is None else tau

    def losses(self, pairs: PairLogProbabilities) -> Float[Tensor, " batch"]:
        """Compute the loss of each pair, as in the first round."""
        check_pairs(pairs, reference=True)
        return _losses(pairs, (None, None), None, eta=self.eta, ratio=self.ratio)

    def forward(
        self,
        logp_chosen: Float[Tensor, " batch"],
        logp_rejected: Float[Tensor, " batch"],
        ref_logp_chosen: Float[Tensor, " batch"] | None = None,
        ref_logp_rejected: Float[Tensor, " batch"] | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        prev_logp_chosen: Float[Tensor, " batch"] | None = None,
        prev_logp_rejected: Float[Tensor, " batch"] | None = None,
        preference: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "*reduced"]:
        """Compute the loss of a batch of pairs.

        Args:
            logp_chosen: Policy's log-probability of each chosen answer, summed over tokens, ``(batch,)``, in nats.
            logp_rejected: The same for each rejected answer.
            ref_logp_chosen: The frozen reference's.
            ref_logp_rejected: The same for each rejected answer.
            chosen_lengths: Not used; taken as all losses of pairs take them.
            rejected_lengths: Not used.
            prev_logp_chosen: Those of the policy that the round began with; the reference's if None.
            prev_logp_rejected: The same for each rejected answer.
            preference: Probability that the chosen answer is better; 1 if None.

        Returns:
            A scalar, or ``(batch,)`` with ``reduction="none"``.

        Raises:
            TypeError: If a log-probability is no floating-point tensor.
            ValueError: As :func:`inpo_loss`.
        """
        pairs = PairLogProbabilities(
            logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, chosen_lengths, rejected_lengths
        )
        check_pairs(pairs, reference=True)
        previous = prev_logp_chosen, prev_logp_rejected
        return reduce(_losses(pairs, previous, preference, eta=self.eta, ratio=self.ratio), self.reduction)

    def mixed_reference(
        self, ref_logp: Float[Tensor, "*shape"], prev_logp: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        r"""Return :math:`\frac\tau\eta \log\rho + (1 - \frac\tau\eta) \log\pi_t`, with which any round is a first.

        The loss depends on the two through this alone, so one cached number an answer (or a token, as sums are linear)
        is all that a trainer has to keep.

        Args:
            ref_logp: The reference's log-probabilities, of answers or of tokens.
            prev_logp: Those of the policy that the round began with.
        """
        return self.ratio * ref_logp + (1 - self.ratio) * prev_logp

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"eta={self.eta}, tau={self.tau}"


def _losses(
    pairs: PairLogProbabilities,
    previous: tuple[Tensor | None, Tensor | None],
    preference: Tensor | None,
    *,
    eta: float,
    ratio: float,
) -> Tensor:
    ref_chosen, ref_rejected = pairs.references()
    prev_chosen, prev_rejected = previous
    anchor = ref_chosen - ref_rejected
    if prev_chosen is not None and prev_rejected is not None:
        _check_fixed(prev_chosen, "prev_logp_chosen", pairs.chosen)
        _check_fixed(prev_rejected, "prev_logp_rejected", pairs.chosen)
        anchor = ratio * anchor + (1 - ratio) * (prev_chosen - prev_rejected)
    elif prev_chosen is not None or prev_rejected is not None:
        raise ValueError("prev_logp_chosen and prev_logp_rejected must be given together")
    h = pairs.chosen - pairs.rejected - anchor
    losses = (h - 0.5 / eta).square()
    if preference is None:
        return losses
    _check_fixed(preference, "preference", pairs.chosen)
    checks.require((preference >= 0) & (preference <= 1), lambda: "preference must hold probabilities, between 0 and 1")
    # (h + c)^2 = (h - c)^2 + 4 c h, and c = 1 / (2 eta).
    return losses + (1 - preference) * (2 / eta) * h


def _ratio(eta: float, tau: float | None) -> float:
    """Return tau / eta, the weight of the reference in the mixture, from checked settings."""
    checks.positive(eta, "eta")
    if tau is None:
        return 1 / 3
    checks.non_negative(tau, "tau")
    if eta < tau:
        raise ValueError(f"eta must be at least tau = {tau}, or the last policy gets a negative weight; got {eta}")
    return tau / eta


def _check_fixed(value: Tensor, name: str, beside: Tensor) -> None:
    checks.floating(value, name)
    if value.shape != beside.shape:
        raise ValueError(f"{name} must have shape {tuple(beside.shape)}, got {tuple(value.shape)}")
    checks.finite(value, name)
    if value.requires_grad:
        raise ValueError(f"{name} requires a gradient: compute it under torch.no_grad()")
