r"""How good a set of trade-offs is: who dominates whom, and the measures of a front of several objectives.

Every objective is maximised, and a set of :math:`N` policies is the matrix of their expected returns
:math:`G \in R^{N \times n}`.

- *Hypervolume*: the volume between the front and a reference point. It grows whenever the front does.
- *Expected utility*: what the best policy is worth to a preference, on average over preferences.
- *Sparsity*: the mean squared gap between neighbours, objective by objective. Lower is denser.
- *Crowding distance* of each policy: how far its neighbours are. The ends of the front are infinitely far.

Source: Zitzler and Thiele, PPSN 1998 (hypervolume); While, Bradstreet and Barone, IEEE Trans. Evol. Comput. 16 (2012)
(limit sets); Zintgraf et al., Benelearn 2015 (expected utility); Xu et al., ICML 2020 (sparsity); Deb et al., IEEE
Trans. Evol. Comput. 6 (2002) (crowding distance).
"""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import checks

# Numbers that one step of a computation may hold at a time.
_MOST_NUMBERS = 2**22


def check_returns(returns: Tensor, name: str = "returns") -> None:
    """Raise unless ``returns`` is a finite floating-point matrix ``(policies, objectives)``."""
    checks.floating(returns, name)
    if returns.dim() != 2 or returns.shape[1] < 1:
        raise ValueError(f"{name} must have shape (policies, objectives), got {tuple(returns.shape)}")
    checks.finite(returns, name)


def non_dominated(returns: Float[Tensor, "policies objectives"]) -> Bool[Tensor, " policies"]:
    r"""Tell which policies no other dominates: is at least as good in every objective and better in one.

    Args:
        returns: G. Policies with equal returns do not dominate each other.

    Returns:
        True for those on the front.

    Raises:
        TypeError: If ``returns`` is no floating-point tensor.
        ValueError: If it is not finite or no matrix.

    Example:
        >>> non_dominated(torch.tensor([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0]]))
        tensor([ True,  True, False])

    Source:
        Pareto dominance.
    """
    check_returns(returns)
    chunk = max(1, _MOST_NUMBERS // max(returns.numel(), 1))
    parts = [
        ((returns >= each[:, None]).all(-1) & (returns > each[:, None]).any(-1)).any(-1)
        for each in returns.split(chunk)
    ]
    return ~torch.cat(parts) if parts else torch.ones(0, dtype=torch.bool, device=returns.device)


def crowding_distance(returns: Float[Tensor, "policies objectives"]) -> Float[Tensor, " policies"]:
    r"""Compute how far the neighbours of each policy on the front are from each other.

    :math:`\sum_i (G_i^{next} - G_i^{previous}) / (G_i^{max} - G_i^{min})` with neighbours in the order of objective i,
    and infinity at both ends of any objective.

    Args:
        returns: G, of policies none of which dominates another. An objective in which all agree does not count.

    Returns:
        The distances.

    Raises:
        TypeError: If ``returns`` is no floating-point tensor.
        ValueError: If it is not finite or no matrix.

    Example:
        >>> crowding_distance(torch.tensor([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0]]))
        tensor([inf, 2., inf])

    Source:
        Deb et al., IEEE Trans. Evol. Comput. 6 (2002), section III.B.
    """
    check_returns(returns)
    if len(returns) < 3:
        return torch.full_like(returns[:, 0], math.inf)
    ordered, order = returns.sort(dim=0, stable=True)
    spread = ordered[-1] - ordered[0]
    gaps = torch.full_like(ordered, math.inf)
    gaps[1:-1] = (ordered[2:] - ordered[:-2]) / torch.where(spread > 0, spread, 1)
    gaps = torch.where(spread > 0, gaps, 0)
    return torch.zeros_like(gaps).scatter(0, order, gaps).sum(1)


def hypervolume(
    returns: Float[Tensor, "policies objectives"], reference: Float[Tensor, " objectives"]
) -> Float[Tensor, ""]:
    r"""Compute the volume of what lies above the reference and below at least one policy, exactly.

    In the order of the last objective, falling, policy k adds the box below it less what those before it cover of
    that box, all of which reach up to its last objective, so that a front of one objective fewer remains:

    .. math:: V(G) = \sum_k G_{kn} \Big(\prod_{i<n} G_{ki} - V\big(\{\min(G_j, G_k)_{<n} : j < k\}\big)\Big).

    Only what is not dominated is followed. All sets of a level are computed together, in float64. The time is that of a
    sort for two objectives and quadratic for three; beyond it grows with the number of objectives, as that of any
    exact algorithm must.

    Args:
        returns: G. Policies that do not exceed the reference in every objective add nothing.
        reference: z, which every policy of interest exceeds.

    Returns:
        The volume, in the dtype of ``returns``.

    Raises:
        TypeError: If ``returns`` is no floating-point tensor.
        ValueError: If shapes do not fit or a number is not finite.

    Example:
        >>> hypervolume(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.zeros(2))
        tensor(5.)

    Source:
        While, Bradstreet and Barone, IEEE Trans. Evol. Comput. 16 (2012), for limit sets; by levels: ours.
    """
    check_returns(returns)
    checks.finite(reference, "reference")
    if reference.shape != returns.shape[1:]:
        raise ValueError(f"reference must have shape ({returns.shape[1]},), got {tuple(reference.shape)}")
    boxes = returns.double() - reference.double()
    boxes = boxes[(boxes > 0).all(1)]
    boxes = boxes[non_dominated(boxes)]
    return _volumes(boxes[None])[0].to(returns.dtype)


def _volumes(boxes: Tensor) -> Tensor:
    """Return the volume of each set of boxes ``(sets, boxes, dims)`` from the origin; a box of zeros is none."""
    sets, count, dims = boxes.shape
    if count == 0:
        return boxes.new_zeros(sets)
    if count == 1:
        return boxes[:, 0].prod(-1)
    if dims == 1:
        return boxes[..., 0].amax(1)
    order = boxes[..., -1].argsort(1, descending=True)
    boxes = boxes.gather(1, order[..., None].expand_as(boxes))
    if dims == 2:
        heights = boxes[..., 0].cummax(1).values
        depths = torch.cat([boxes[:, 1:, 1], boxes.new_zeros(sets, 1)], 1)
        return (heights * (boxes[..., 1] - depths)).sum(1)
    chunk = max(1, _MOST_NUMBERS // (count**2 * dims))
    if sets > chunk:
        return torch.cat([_volumes(part) for part in boxes.split(chunk)])
    base = boxes[..., :-1]
    limits = torch.minimum(base[:, :, None], base[:, None, :])
    earlier = torch.ones(count, count, dtype=torch.bool, device=boxes.device).tril(-1)
    covered = _sparse_volumes((limits * earlier[..., None]).flatten(0, 1)).view(sets, count)
    return (boxes[..., -1] * (base.prod(-1) - covered)).sum(1)


def _sparse_volumes(boxes: Tensor) -> Tensor:
    """Drop the boxes that others cover, then take sets of like size together."""
    if boxes.shape[-1] == 2:
        return _volumes(boxes)
    chunk = max(1, _MOST_NUMBERS // (boxes.shape[1] ** 2 * boxes.shape[2]))
    left = torch.cat([_uncovered(part) for part in boxes.split(chunk)])
    sizes, order = left.sum(1).sort()
    volumes = boxes.new_zeros(len(boxes))
    start = int((sizes == 0).sum())
    while start < len(boxes):
        # Sizes grow geometrically, so that few sets are padded much.
        most = max(int(sizes[start] * 1.25), 1)
        end = int(torch.searchsorted(sizes, most, right=True))
        index = order[start:end]
        keep = left[index].long().argsort(1, descending=True)[:, :most]
        chosen = (boxes[index] * left[index][..., None]).gather(1, keep[..., None].expand(-1, -1, boxes.shape[2]))
        volumes[index] = _volumes(chosen)
        start = end
    return volumes


def _uncovered(boxes: Tensor) -> Tensor:
    """Tell which boxes of each set no other covers; of equal ones the first stays."""
    covers = (boxes[:, None, :, :] >= boxes[:, :, None, :]).all(-1)  # [set, box, by]
    # Each box covers itself, and an equal one that comes later does not count.
    ignored = torch.ones(covers.shape[1:], dtype=torch.bool, device=boxes.device).triu()
    return ~(covers & ~(covers.mT & ignored)).any(-1) & (boxes > 0).all(-1)


def expected_utility(
    returns: Float[Tensor, "policies objectives"], weights: Float[Tensor, "preferences objectives"]
) -> Float[Tensor, ""]:
    r"""Compute what the best policy for a preference is worth, on average over preferences.

    :math:`\frac1{|W|} \sum_{w \in W} \max_k w^T G_k`.

    Args:
        returns: G.
        weights: Preferences w, by rows; see :func:`weight_grid`.

    Returns:
        The utility.

    Raises:
        TypeError: If a tensor is of no floating-point dtype.
        ValueError: If shapes do not fit, a number is not finite or a set is empty.

    Example:
        >>> expected_utility(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.eye(2))
        tensor(2.5000)

    Source:
        Zintgraf et al., "Quality Assessment of MORL Algorithms: A Utility-Based Approach", Benelearn 2015.
    """
    for value, name in ((returns, "returns"), (weights, "weights")):
        check_returns(value, name)
        checks.not_empty(value, name)
    if weights.shape[1] != returns.shape[1]:
        raise ValueError(f"weights must have {returns.shape[1]} columns, got {weights.shape[1]}")
    return (weights.to(returns) @ returns.T).amax(1).mean()


def sparsity(returns: Float[Tensor, "policies objectives"]) -> Float[Tensor, ""]:
    r"""Compute the mean squared gap between neighbours on the front; lower is denser.

    :math:`\frac1{N-1} \sum_i \sum_k (G_{i,(k+1)} - G_{i,(k)})^2`, each objective in its own order. A front of one
    policy has sparsity 0, so look at the hypervolume beside it.

    Args:
        returns: G, of policies none of which dominates another.

    Returns:
        The sparsity.

    Raises:
        TypeError: If ``returns`` is no floating-point tensor.
        ValueError: If it is not finite or no matrix.

    Example:
        >>> sparsity(torch.tensor([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0]]))
        tensor(9.)

    Source:
        Xu et al., "Prediction-Guided Multi-Objective Reinforcement Learning", ICML 2020, equation 3.
    """
    check_returns(returns)
    gaps = returns.sort(0).values.diff(dim=0)
    return gaps.square().sum() / max(len(returns) - 1, 1)


def weight_grid(num_objectives: int, *, divisions: int) -> Float[Tensor, "weights objectives"]:
    r"""Return all preferences whose entries are multiples of one over ``divisions`` and add up to one.

    They are counted in integers, so none is lost to rounding.

    Args:
        num_objectives: n.
        divisions: One over the paper's step; 5 gives six preferences between two objectives.

    Returns:
        :math:`\binom{d + n - 1}{n - 1}` rows, float32.

    Raises:
        ValueError: If a number is below 1 or there would be more than a million rows.

    Example:
        >>> weight_grid(2, divisions=2)
        tensor([[0.0000, 1.0000],
                [0.5000, 0.5000],
                [1.0000, 0.0000]])

    Source:
        Das and Dennis, SIAM J. Optim. 8 (1998).
    """
    for value, name in ((num_objectives, "num_objectives"), (divisions, "divisions")):
        if not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if math.comb(divisions + num_objectives - 1, num_objectives - 1) > 10**6:
        raise ValueError(f"divisions must be fewer for {num_objectives} objectives, got {divisions}")
    bars = itertools.combinations(range(divisions + num_objectives - 1), num_objectives - 1)
    edges = torch.tensor([(-1, *bar, divisions + num_objectives - 1) for bar in bars])
    return (edges.diff(dim=1) - 1).float() / divisions
