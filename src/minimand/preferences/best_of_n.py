r"""Best-of-n: of n answers the one that a proxy scores best, what it is truly worth, and how far it is from the policy.

From :math:`N \ge n` scored answers the true (gold) score of best-of-n is estimated without bias, over all subsets of
size n at once. With answers in ascending order of the proxy, answer i is the best of

.. math:: \binom{i - 1}{n - 1} \text{ of the } \binom{N}{n} \text{ subsets}, \qquad
          E_n = \sum_{i = n}^N \binom{i - 1}{n - 1} \binom{N}{n}^{-1} g_{(i)}.

Source: Coste et al. 2024, arXiv 2310.02743; the estimator is that of Nakano et al. 2021, arXiv 2112.09332, appendix I;
the KL divergence: Stiennon et al. 2020, arXiv 2009.01325, appendix G.3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from .. import checks


@dataclasses.dataclass(frozen=True)
class BestOfNCurve:
    """True and proxy score of best-of-n, for several n: where the first falls and the second rises is overoptimisation.

    Args:
        n: How many answers the best is chosen from.
        kl: Divergence from the policy that answers are drawn from, in nats.
        proxy: Mean proxy score of the chosen answers.
        gold: Their mean gold score.
    """

    n: tuple[int, ...]
    kl: Float[Tensor, " sizes"]
    proxy: Float[Tensor, " sizes"]
    gold: Float[Tensor, " sizes"]


def best_of_n(proxy: Float[Tensor, "*prompts answers"], n: int | None = None) -> Int[Tensor, "*prompts"]:
    """Choose the answer with the highest score among the first n of each prompt.

    Args:
        proxy: Scores, one row a prompt, such as :class:`RewardEnsemble` gives them.
        n: How many answers to look at; None for all.

    Returns:
        Index of the chosen answer; of equal ones the first.

    Raises:
        TypeError: If scores are no floating-point tensor.
        ValueError: If a score is not finite, or n is not between 1 and the number of answers.

    Example:
        >>> best_of_n(torch.tensor([[0.1, 0.7, 0.9], [0.3, 0.2, 0.1]]), 2)
        tensor([1, 0])

    Source:
        Coste et al. 2024, arXiv 2310.02743, section 2.
    """
    _check_table(proxy, "proxy")
    size = proxy.shape[-1] if n is None else n
    _check_size(size, proxy.shape[-1])
    return proxy[..., :size].argmax(-1)


def best_of_n_weights(num_answers: int, n: int) -> Float[Tensor, " answers"]:
    r"""Compute the share of subsets of size n whose best answer has each rank.

    :math:`\binom{i-1}{n-1} / \binom{N}{n}` for :math:`i = 1, \dots, N`, by a recurrence, so that no factorial
    overflows or loses digits.

    Args:
        num_answers: N.
        n: Size of the subsets, from 1 to N.

    Returns:
        Weights in ascending order of the rank, in double precision; they add up to one.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If n is not between 1 and N.

    Example:
        >>> best_of_n_weights(4, 2)  # of six pairs
        tensor([0.0000, 0.1667, 0.3333, 0.5000], dtype=torch.float64)

    Source:
        Nakano et al. 2021, arXiv 2112.09332, appendix I.
    """
    _check_size(n, num_answers)
    later = torch.arange(n + 1, num_answers + 1, dtype=torch.float64)
    # All n within the i lowest: C(i, n) / C(N, n) is the product of (j - n) / j over the ranks j above i.
    within = torch.log1p(-n / later).flip(0).cumsum(0).flip(0).exp()
    weights = torch.zeros(num_answers, dtype=torch.float64)
    weights[n - 1 :] = n / torch.arange(n, num_answers + 1, dtype=torch.float64)
    weights[n - 1 : -1] *= within
    return weights


def expected_best_of_n(
    proxy: Float[Tensor, "*prompts answers"], gold: Float[Tensor, "*prompts answers"], n: int
) -> Float[Tensor, "*prompts"]:
    """Estimate the gold score of best-of-n without bias, from N scored answers a prompt.

    It is the mean over all subsets of n answers; answers of equal proxy score share their mean gold score, as if ties
    were broken by lot.

    Args:
        proxy: What decides, one row a prompt.
        gold: What is measured, of the same shape.
        n: How many answers the best is chosen from, from 1 to N. As it nears N, the estimate rests on few answers.

    Returns:
        One estimate a prompt.

    Raises:
        TypeError: If scores are no floating-point tensors, or n is no integer.
        ValueError: If shapes differ, a score is not finite, or n is not between 1 and N.

    Example:
        >>> expected_best_of_n(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([3.0, 6.0, 0.0]), 2)  # (6 + 0 + 0) / 3
        tensor(2.)

    Source:
        Nakano et al. 2021, arXiv 2112.09332, appendix I; Coste et al. 2024, arXiv 2310.02743. Ties are ours.
    """
    _, values = _sorted(proxy, gold)
    return values @ best_of_n_weights(proxy.shape[-1], n).to(values)


def best_of_n_curve(
    proxy: Float[Tensor, "*prompts answers"], gold: Float[Tensor, "*prompts answers"], n: Sequence[int]
) -> BestOfNCurve:
    """Estimate what best-of-n gains in proxy and gold score, and its divergence from the policy, for several n.

    Args:
        proxy: What decides, one row a prompt.
        gold: What is measured, of the same shape.
        n: Sizes, each from 1 to the number of answers.

    Returns:
        The curve, its scores means over prompts.

    Raises:
        TypeError: If scores are no floating-point tensors, or a size is no integer.
        ValueError: If shapes differ, a score is not finite, or a size is out of range.

    Example:
        >>> proxy = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
        >>> best_of_n_curve(proxy, -proxy, [1, 4, 16]).kl
        tensor([0.0000, 0.6363, 1.8351])

    Source:
        Coste et al. 2024, arXiv 2310.02743, figure 3.
    """
    sizes = tuple(n)
    if not sizes:
        raise ValueError("n must name at least one size, got none")
    scores = torch.stack(_sorted(proxy, gold))
    # The mean over prompts first: the estimates are linear in the sorted scores.
    ranked = scores.reshape(2, -1, proxy.shape[-1]).mean(1)
    weights = torch.stack([best_of_n_weights(proxy.shape[-1], size) for size in sizes])
    proxies, golds = (weights.to(ranked) @ ranked.T).unbind(1)
    kl = torch.tensor([best_of_n_kl(size) for size in sizes], dtype=proxy.dtype, device=proxy.device)
    return BestOfNCurve(sizes, kl, proxies, golds)


def best_of_n_kl(n: int) -> float:
    r"""Compute the divergence of best-of-n from the policy that answers are drawn from, in nats.

    :math:`\log n - (n - 1) / n`: exact where scores are continuous, so that no two answers tie; an upper bound
    otherwise.

    Args:
        n: How many answers the best is chosen from, at least 1.

    Returns:
        KL(best-of-n || policy).

    Raises:
        TypeError: If n is no integer.
        ValueError: If n is below 1.

    Example:
        >>> round(best_of_n_kl(16), 4)
        1.8351

    Source:
        Stiennon et al. 2020, arXiv 2009.01325, appendix G.3; the bound: Beirami et al. 2024, arXiv 2401.01879.
    """
    _check_size(n, None)
    return math.log(n) - (n - 1) / n


def _sorted(proxy: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Return proxy scores in ascending order and the gold scores beside them, those of equal ones averaged."""
    _check_table(proxy, "proxy")
    _check_table(gold, "gold")
    if gold.shape != proxy.shape:
        raise ValueError(f"gold must have the shape of proxy, {tuple(proxy.shape)}, got {tuple(gold.shape)}")
    ascending, order = proxy.sort(-1)
    values = gold.gather(-1, order)
    # Number the groups of equal proxy scores, and give every answer its group's mean.
    group = functional.pad(ascending.diff() != 0, (1, 0)).cumsum(-1)
    means = torch.zeros_like(values).scatter_reduce(-1, group, values, "mean", include_self=False)
    return ascending, means.gather(-1, group)


def _check_table(value: Tensor, name: str) -> None:
    checks.floating(value, name)
    if value.dim() < 1:
        raise ValueError(f"{name} must have shape (*prompts, answers), got a scalar")
    checks.not_empty(value, name)
    checks.finite(value.detach(), name)


def _check_size(n: int, largest: int | None) -> None:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an integer, got {n!r}")
    if n < 1 or (largest is not None and n > largest):
        wanted = "at least 1" if largest is None else f"between 1 and the number of answers, {largest}"
        raise ValueError(f"n must be {wanted}, got {n}")
