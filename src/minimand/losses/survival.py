r"""Losses of times that may be censored: Cox's partial likelihood, and hazards of discrete time intervals.

An example comes with a time and with whether its event was seen then (otherwise it was only followed until then).

- Cox: a log-risk :math:`r_i` an example; an event at :math:`t_i` competes with all who are still at risk then,

  .. math:: \ell_i = \log \sum_{j: t_j \ge t_i} e^{r_j} - r_i .

- Discrete hazards: a logit :math:`x_{ik}` an interval, whose sigmoid is the chance of an event there if there was none
  before. An example of interval y with indicator e costs :math:`\sum_{k \le y} \log(1 + e^{x_{ik}}) - e\, x_{iy}`.

Source: Cox, "Regression Models and Life-Tables", JRSS B 1972, and "Partial likelihood", Biometrika 1975; Breslow,
JRSS B 1972, and Efron, JASA 1977, for tied times; Gensheimer and Narasimhan, "A scalable discrete-time survival model
for neural networks", PeerJ 2019, arXiv 1805.00917, and Kvamme and Borgan 2021, arXiv 1910.06724, for discrete hazards.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, check_reduction, reduce
from ..survival import check_survival

Ties = Literal["none", "breslow", "efron"]


def cox_ph_loss(
    log_risk: Float[Tensor, " batch"],
    time: Num[Tensor, " batch"],
    event: Bool[Tensor, " batch"] | Num[Tensor, " batch"],
    *,
    ties: Ties = "efron",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the negative log partial likelihood of Cox's proportional hazards.

    Args:
        log_risk: A log-risk an example: the higher, the sooner the event is expected. Only differences count.
        time: When the event happened, or until when there was none.
        event: Whether the event was seen: booleans, or 0 and 1.
        ties: What events at one time compete with. ``"breslow"``: with each other and all who are at risk.
            ``"efron"``: likewise, but the k-th of d counts the d of them only as :math:`1 - (k - 1) / d` each; close
            to the likelihood of not knowing their order. ``"none"``: with those behind them in the batch and all
            later ones, as if order in the batch told them apart; what much published code does.
        reduction: ``"mean"`` or ``"sum"`` over events; ``"none"``, one loss an example, 0 where censored, events at
            one time sharing their mean under ``"efron"``; or a risk, which is given the losses of events.

    Returns:
        A scalar, or one loss an example. Without any event it is 0 with a gradient of zero, and a warning is given.

    Raises:
        ValueError: If shapes differ, a number is not finite, or an event is neither 0 nor 1.

    Example:
        >>> cox_ph_loss(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))  # log(3) / 2
        tensor(0.5493)

    Source:
        Cox 1972 and 1975; Breslow 1972; Efron 1977.
    """
    checks.floating(log_risk, "log_risk")
    if log_risk.dim() != 1:
        raise ValueError(f"log_risk must have shape (batch,), got {tuple(log_risk.shape)}")
    checks.one_of(ties, "ties", ("none", "breslow", "efron"))
    check_reduction(reduction)
    seen = check_survival(time, event, len(log_risk))
    checks.finite(log_risk.detach(), "log_risk")
    r = log_risk.to(torch.promote_types(log_risk.dtype, torch.float32))
    # Signed numbers, so that minus a time is one.
    sorted_times, order = torch.sort(time if time.is_floating_point() else time.long(), descending=True, stable=True)
    terms = _competition(r[order], -sorted_times, seen[order].to(r), ties)
    losses = torch.zeros_like(r).scatter(0, order, terms) - r
    if checks.values_readable(seen) and not bool(seen.any()):
        warnings.warn("the batch has no event, so its Cox loss is 0: use larger batches", stacklevel=2)
        nothing = 0 * log_risk
        return nothing if isinstance(reduction, str) and reduction == "none" else nothing.sum()
    return reduce(losses, reduction, row_weight=seen.to(r)).to(log_risk.dtype)


def _competition(r: Tensor, falling: Tensor, events: Tensor, ties: Ties) -> Tensor:
    """Return the log of what each example competes with, all sorted by falling time; ``falling`` is minus the time."""
    at_risk = torch.logcumsumexp(r, 0)
    if ties == "none":
        return at_risk
    first = torch.searchsorted(falling, falling)
    last = torch.searchsorted(falling, falling, right=True) - 1
    at_risk = at_risk[last]  # all of one time are at risk together
    if ties == "breslow":
        return at_risk
    # The events of one time, as shares of all at risk: each number is at most 1, whatever the log-risks are.
    shares = torch.zeros_like(r).index_add(0, first, events * (r - at_risk).exp())[first]
    counted = events.cumsum(0)
    before = (counted - events)[first]
    tied = (counted[last] - before).clamp_min(1)
    place = counted - events - before
    terms = torch.log1p(-(events * place / tied) * shares.clamp_max(1))
    # Which of them is the k-th is nobody's knowledge: all of one time get the mean.
    return at_risk + torch.zeros_like(r).index_add(0, first, terms)[first] / tied


class CoxPHLoss(nn.Module):
    """Cox's negative log partial likelihood as a module; :func:`cox_ph_loss` has the formula.

    Args:
        ties: ``"efron"``, ``"breslow"`` or ``"none"``.
        reduction: ``"mean"`` or ``"sum"`` over events, ``"none"``, or a risk.

    Example:
        >>> loss = CoxPHLoss()
        >>> loss(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))
        tensor(0.5493)

    Source:
        Cox 1972 and 1975; Breslow 1972; Efron 1977.
    """

    def __init__(self, ties: Ties = "efron", *, reduction: Reduction = "mean") -> None:
        super().__init__()
        checks.one_of(ties, "ties", ("none", "breslow", "efron"))
        check_reduction(reduction)
        self.ties = ties
        self.reduction = reduction

    def forward(
        self,
        log_risk: Float[Tensor, " batch"],
        time: Num[Tensor, " batch"],
        event: Bool[Tensor, " batch"] | Num[Tensor, " batch"],
    ) -> Tensor:
        """Compute the loss of log-risks ``(batch,)`` for times and whether events were seen, ``(batch,)``."""
        return cox_ph_loss(log_risk, time, event, ties=self.ties, reduction=self.reduction)


def discrete_hazard_loss(
    input: Float[Tensor, "batch bins"],
    interval: Int[Tensor, " batch"],
    event: Bool[Tensor, " batch"] | Num[Tensor, " batch"],
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the negative log-likelihood of hazards of discrete time intervals.

    Args:
        input: The logit of each interval's hazard.
        interval: The interval of each example's time, from 0: ``torch.bucketize(time, edges, right=True)`` with the
            edges of :func:`event_time_edges`. A censored example counts as having survived it.
        event: Whether the event was seen: booleans, or 0 and 1.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk, over examples.

    Returns:
        A scalar, or one loss an example.

    Raises:
        ValueError: If shapes differ, an interval is none, an event is neither 0 nor 1, or a logit is not finite.

    Example:
        >>> discrete_hazard_loss(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([True, False]))  # 1.5 log 2
        tensor(1.0397)

    Source:
        Gensheimer and Narasimhan 2019, arXiv 1805.00917, eq. 1 to 4; Kvamme and Borgan 2021, arXiv 1910.06724.
    """
    checks.floating(input, "input")
    checks.tensor(interval, "interval")
    if input.dim() != 2 or interval.dtype == torch.bool or interval.is_floating_point():
        raise ValueError(
            f"input must have shape (batch, bins) and interval hold integers, "
            f"got {tuple(input.shape)} and {interval.dtype}"
        )
    checks.not_empty(input, "input")
    bins = input.shape[1]
    seen = check_survival(interval, event, len(input))
    checks.require(
        (interval >= 0) & (interval < bins),
        lambda: f"interval must lie in [0, {bins - 1}], got values from {int(interval.min())} to {int(interval.max())}",
    )
    checks.finite(input.detach(), "input")  # of all intervals, also of those not lived to
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    lived = torch.arange(bins, device=x.device) <= interval[:, None]
    survived = torch.where(lived, F.softplus(x), 0.0).sum(1)
    at_event = x.gather(1, interval[:, None])[:, 0]
    losses = survived - torch.where(seen, at_event, 0.0)
    return reduce(losses, reduction).to(input.dtype)


class DiscreteHazardLoss(nn.Module):
    """The likelihood of discrete hazards as a module; :func:`discrete_hazard_loss` has the formula.

    Args:
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> DiscreteHazardLoss()(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([True, False]))
        tensor(1.0397)

    Source:
        Gensheimer and Narasimhan 2019, arXiv 1805.00917; Kvamme and Borgan 2021, arXiv 1910.06724.
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(
        self,
        input: Float[Tensor, "batch bins"],
        interval: Int[Tensor, " batch"],
        event: Bool[Tensor, " batch"] | Num[Tensor, " batch"],
    ) -> Tensor:
        """Compute the loss of logits ``(batch, bins)`` for intervals and whether events were seen, ``(batch,)``."""
        return discrete_hazard_loss(input, interval, event, reduction=self.reduction)


def hazard_survival(input: Float[Tensor, "batch bins"]) -> Float[Tensor, "batch bins"]:
    r"""Compute the chance to survive each interval from the logits of hazards, :math:`\prod_{k \le t} (1 - h_k)`.

    Minus its sum over intervals is a risk score to rank examples by.

    Args:
        input: The logit of each interval's hazard.

    Returns:
        ``(batch, bins)``, falling along bins.

    Raises:
        ValueError: If a logit is not finite.

    Example:
        >>> hazard_survival(torch.zeros(1, 3))
        tensor([[0.5000, 0.2500, 0.1250]])

    Source:
        Gensheimer and Narasimhan 2019, arXiv 1805.00917, eq. 2.
    """
    checks.floating(input, "input")
    checks.finite(input.detach(), "input")
    return F.softplus(input).cumsum(-1).neg().exp()


def event_time_edges(
    time: Num[Tensor, " batch"], event: Bool[Tensor, " batch"] | Num[Tensor, " batch"], *, num_bins: int = 4
) -> Float[Tensor, " edges"]:
    """Cut time into intervals that hold alike many of the events seen.

    Args:
        time: Times of the training examples.
        event: Whether each event was seen.
        num_bins: Number of intervals; 4 is usual for survival from slides. Fewer come back where times are tied.

    Returns:
        Inner edges, rising, at most ``num_bins - 1``; ``torch.bucketize(time, edges, right=True)`` gives intervals.

    Raises:
        ValueError: If there is no event, or an argument is out of range.

    Example:
        >>> event_time_edges(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4, dtype=torch.bool), num_bins=2)
        tensor([2.5000])

    Source:
        The binning of discrete hazards in Zadeh and Schmid, "Bias in Cross-Entropy-Based Training of Deep Survival
        Networks", TPAMI 2020, and in pathology code since.
    """
    checks.positive(num_bins, "num_bins")
    seen = check_survival(time, event, len(time))
    if not bool(seen.any()):
        raise ValueError("event holds no event: there is nothing to cut time by")
    precise = time.to(torch.promote_types(time.dtype, torch.float32))
    levels = torch.arange(1, num_bins, dtype=precise.dtype, device=precise.device) / num_bins
    return torch.quantile(precise[seen], levels).unique()
