"""Scores of survival: how well risks rank times, whether groups differ, and the curve of who is left."""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from . import checks

__all__ = ["LogRank", "SurvivalCurve", "check_survival", "concordance_index", "kaplan_meier", "log_rank_test"]


def check_survival(time: Tensor, event: Tensor, count: int) -> Bool[Tensor, " batch"]:
    """Check ``count`` times and event indicators, and return the latter as booleans.

    Raises:
        ValueError: If shapes differ, there are none, a time is not finite, or an event is neither 0 nor 1.
    """
    checks.tensor(time, "time")
    checks.tensor(event, "event")
    for value, name in ((time, "time"), (event, "event")):
        if tuple(value.shape) != (count,):
            raise ValueError(f"{name} must have shape ({count},), got {tuple(value.shape)}")
    checks.not_empty(time, "time")
    checks.finite(time, "time")
    if event.dtype == torch.bool:
        return event
    checks.require((event == 0) | (event == 1), lambda: "event must hold booleans, or 0 and 1")
    return event == 1


def concordance_index(
    log_risk: Float[Tensor, " batch"],
    time: Num[Tensor, " batch"],
    event: Bool[Tensor, " batch"] | Num[Tensor, " batch"],
) -> Float[Tensor, ""]:
    r"""Compute Harrell's concordance index: of pairs whose order in time is known, the share that risks order alike.

    A pair is comparable if the one with the earlier time had the event, or if at the same time one had it and the
    other was censored. Equal risks count one half. It takes :math:`O(n \log^2 n)` by merging instead of the usual
    :math:`n^2` pairs.

    Args:
        log_risk: The higher, the sooner the event is expected. Any increasing function of the risk gives the same.
        time: When the event happened, or until when there was none.
        event: Whether the event was seen: booleans, or 0 and 1.

    Returns:
        Between 0 and 1; 0.5 is chance.

    Raises:
        ValueError: If shapes differ, a number is not finite, or no pair is comparable.

    Example:
        >>> risk, time = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
        >>> concordance_index(risk, time, torch.tensor([True, True, False]))  # 1-2 and 1-3 agree, 2-3 does not
        tensor(0.6667)

    Source:
        Harrell, Califf, Pryor, Lee and Rosati, "Evaluating the yield of medical tests", JAMA 1982.
    """
    checks.floating(log_risk, "log_risk")
    if log_risk.dim() != 1:
        raise ValueError(f"log_risk must have shape (batch,), got {tuple(log_risk.shape)}")
    checks.finite(log_risk, "log_risk")
    seen = check_survival(time, event, len(log_risk))
    count, device = len(log_risk), log_risk.device
    rank = torch.unique(log_risk.detach(), return_inverse=True)[1]
    moment = 2 * torch.unique(time, return_inverse=True)[1] + (~seen).long()  # of one time, events first
    # By time, and of tied events by risk: then no pair of them looks concordant, and equal ones are taken off below.
    order = torch.argsort(moment * count + rank)
    moment, rank, seen = moment[order], rank[order], seen[order]
    later = count - torch.searchsorted(moment, moment, right=True)
    comparable = int(later[seen].sum())
    if comparable == 0:
        raise ValueError("no pair is comparable: there is no event before another time")
    concordant = int(_smaller_behind(rank)[seen].sum())
    by_rank = torch.argsort(rank, stable=True)
    _, group, sizes = torch.unique_consecutive(rank[by_rank], return_inverse=True, return_counts=True)
    place = torch.arange(count, device=device) - (sizes.cumsum(0) - sizes)[group]
    equal = int((sizes[group] - 1 - place)[seen[by_rank]].sum())
    twins = torch.unique((moment * count + rank)[seen], return_counts=True)[1]
    equal -= int((twins * (twins - 1)).sum()) // 2
    dtype = torch.promote_types(log_risk.dtype, torch.float32)
    return torch.tensor((concordant + 0.5 * equal) / comparable, dtype=dtype, device=device)


def _smaller_behind(rank: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Count, for each number, the smaller ones behind it, block by block of a merge sort."""
    count = len(rank)
    size = 1 << max(count - 1, 1).bit_length()
    padded = rank.new_full((size,), count)  # behind all and larger than all: never counted
    padded[:count] = rank
    places = torch.arange(size, device=rank.device)
    found = torch.zeros_like(padded)
    width = 1
    while width < size:
        pairs = padded.view(-1, 2, width)
        smaller = torch.searchsorted(pairs[:, 1].contiguous(), pairs[:, 0].contiguous())
        ahead = places.view(-1, 2, width)[:, 0]
        found[ahead] += smaller
        padded, moves = padded.view(-1, 2 * width).sort(dim=1)
        places = places.view(-1, 2 * width).gather(1, moves).flatten()
        padded = padded.flatten()
        width *= 2
    return found[:count]


@dataclasses.dataclass(frozen=True)
class LogRank:
    """What :func:`log_rank_test` found.

    Args:
        statistic: Chi-square.
        p: Chance of one as large if all groups had the same hazards.
        groups: The groups' numbers, rising.
        observed: Events seen in each group.
        expected: Events expected in each if all had the same hazards.
    """

    statistic: float
    p: float
    groups: Tensor
    observed: Tensor
    expected: Tensor


def log_rank_test(
    time: Num[Tensor, " batch"],
    event: Bool[Tensor, " batch"] | Num[Tensor, " batch"],
    group: Bool[Tensor, " batch"] | Int[Tensor, " batch"],
) -> LogRank:
    r"""Test whether two or more groups have the same hazards.

    With d events among n at risk at each time, of whom :math:`n_g` are of group g,
    :math:`E_g = \sum d\,n_g / n` events are expected there and the observed ones vary as
    :math:`V_{gh} = \sum d \frac{n - d}{n - 1} \frac{n_g}{n} (\delta_{gh} - \frac{n_h}{n})`; the statistic
    :math:`(O - E)^\top V^+ (O - E)` is chi-square with one degree of freedom less than there are groups.

    Args:
        time: When the event happened, or until when there was none.
        event: Whether the event was seen: booleans, or 0 and 1.
        group: The group of each example: booleans or integers.

    Returns:
        The statistic and its p-value.

    Raises:
        ValueError: If shapes differ, a time is not finite, there are fewer than two groups, or there is no event.

    Example:
        >>> time, group = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> round(log_rank_test(time, torch.ones(6, dtype=torch.bool), group).p, 4)
        0.0246

    Source:
        Mantel 1966; Peto and Peto, "Asymptotically Efficient Rank Invariant Test Procedures", JRSS A 1972.
    """
    checks.tensor(time, "time")
    seen = check_survival(time, event, len(time))
    checks.tensor(group, "group")
    if group.is_floating_point() or group.shape != time.shape:
        raise ValueError(
            f"group must hold booleans or integers of shape {tuple(time.shape)}, "
            f"got {group.dtype} of shape {tuple(group.shape)}"
        )
    names, member = torch.unique(group, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"group must hold at least two groups, got {len(names)}")
    if not bool(seen.any()):
        raise ValueError("event holds no event: there is nothing to test")
    at_risk, events = _table(time, torch.nn.functional.one_hot(member), seen)
    n, d = at_risk.sum(1), events.sum(1)
    share = at_risk / n[:, None]
    expected = (d[:, None] * share).sum(0)
    observed = events.sum(0)
    spread = d * (n - d) / (n - 1).clamp_min(1)
    variance = torch.diag((spread[:, None] * share).sum(0)) - share.mT @ (spread[:, None] * share)
    gap = observed - expected
    # Any one group follows from the others; a group never at risk with another has no variance and says nothing.
    statistic = float(gap @ torch.linalg.pinv(variance, hermitian=True) @ gap)
    freedom = torch.tensor((len(names) - 1) / 2, dtype=gap.dtype)
    p = float(torch.special.gammaincc(freedom, torch.tensor(max(statistic, 0.0) / 2, dtype=gap.dtype)))
    return LogRank(statistic, p, names, observed, expected)


@dataclasses.dataclass(frozen=True)
class SurvivalCurve:
    """What :func:`kaplan_meier` found, one number for each distinct time.

    Args:
        time: Distinct times, rising.
        survival: Estimated chance to be without event after each.
        low: Lower end of its interval.
        high: Upper end.
        at_risk: How many were followed until each or longer.
        events: How many events were seen at each.
    """

    time: Tensor
    survival: Tensor
    low: Tensor
    high: Tensor
    at_risk: Tensor
    events: Tensor


def kaplan_meier(
    time: Num[Tensor, " batch"],
    event: Bool[Tensor, " batch"] | Num[Tensor, " batch"],
    *,
    level: float = 0.95,
) -> SurvivalCurve:
    r"""Estimate the chance to be without event, :math:`S(t) = \prod_{t_j \le t} (1 - d_j / n_j)`.

    Its intervals are Greenwood's on the scale of :math:`\log(-\log S)`, which keeps them in [0, 1].

    Args:
        time: When the event happened, or until when there was none.
        event: Whether the event was seen: booleans, or 0 and 1.
        level: Of the pointwise intervals, in (0, 1). Where S is 1 or 0 there is no variance to estimate, and both
            ends are S.

    Returns:
        The curve at each distinct time; it is 1 before the first.

    Raises:
        ValueError: If shapes differ, a time is not finite, or ``level`` is out of range.

    Example:
        >>> curve = kaplan_meier(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([True, True, False, True]))
        >>> curve.time, curve.survival
        (tensor([1., 2., 3.]), tensor([0.7500, 0.5000, 0.0000], dtype=torch.float64))

    Source:
        Kaplan and Meier, JASA 1958; Greenwood 1926; Kalbfleisch and Prentice 1980 for the scale of the intervals.
    """
    checks.tensor(time, "time")
    seen = check_survival(time, event, len(time))
    checks.between(level, "level", 0.0, 1.0, low_open=True, high_open=True)
    everyone = torch.ones(len(time), 1, dtype=torch.long, device=time.device)
    at_risk, events = (column[:, 0] for column in _table(time, everyone, seen))
    survival = (1 - events / at_risk).cumprod(0)
    greenwood = (events / (at_risk * (at_risk - events))).cumsum(0)
    log_survival = survival.log()
    inside = (survival > 0) & (survival < 1)
    normal = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
    half = normal * greenwood.sqrt() / log_survival
    low = torch.where(inside, survival ** torch.exp(-half), survival)
    high = torch.where(inside, survival ** torch.exp(half), survival)
    return SurvivalCurve(torch.unique(time), survival, low, high, at_risk.long(), events.long())


def _table(time: Tensor, member: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Count who is at risk and who has the event, at each distinct time and in each group."""
    wide = torch.float32 if time.device.type == "mps" else torch.float64
    times, place = torch.unique(time, return_inverse=True)
    member = member.to(wide)
    leaving = member.new_zeros(len(times), member.shape[1]).index_add_(0, place, member)
    events = torch.zeros_like(leaving).index_add_(0, place[seen], member[seen])
    return leaving.flip(0).cumsum(0).flip(0), events
