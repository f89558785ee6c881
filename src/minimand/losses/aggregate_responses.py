r"""Learning single rows from labels that are averages over bags: bag loss, instance loss and what lies between.

Rows come in bags :math:`B_a` of :math:`k_a` rows; only the bag's mean label :math:`\bar y_a` is known. With
:math:`\bar f_a` the bag's mean prediction and bag weights :math:`w_a` that add up to one,

.. math:: L_{bag} = \sum_a w_a\,\ell(\bar f_a, \bar y_a), \qquad
          L_{ins} = \sum_a \frac{w_a}{k_a} \sum_{i \in B_a} \ell(f_i, \bar y_a), \qquad
          L_\rho = (1 - \rho) L_{bag} + \rho L_{ins}.

For the squared loss :math:`L_{ins} = L_{bag} + R` with the within-bag variance

.. math:: R = \sum_a \frac{w_a}{k_a} \sum_{i \in B_a} (f_i - \bar f_a)^2
            = \sum_a \frac{w_a}{2 k_a^2} \sum_{i, j \in B_a} (f_i - f_j)^2,

so :math:`L_\rho = L_{bag} + \rho R`: rho buys less variance with a pull of the predictions of a bag towards each
other. For any convex loss whose second derivative lies in :math:`[c, C]`,
:math:`\frac c2 R \le L_{ins} - L_{bag} \le \frac C2 R`.

Source: Javanmard, Chen, Mirrokni, Badanidiyuru and Fu, "Learning from Aggregate responses: Instance Level versus
Bag Level Loss Functions", ICLR 2024, arXiv 2401.11081. The identity above carries the factor :math:`1/(2 m k^2)`
that the circulated Lemma 1 leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, check_reduction, reduce

Weighting = Literal["row", "bag"]
RowLoss = Literal["mse", "bce"] | Callable[[Tensor, Tensor], Tensor]


def aggregate_loss(
    input: Float[Tensor, " rows"] | Float[Tensor, "bags size"],
    target: Float[Tensor, " bags"],
    bag: Int[Tensor, " rows"] | None = None,
    *,
    rho: float = 0.1,
    loss: RowLoss = "mse",
    weighting: Weighting = "row",
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute (1 - rho) bag loss + rho instance loss.

    Args:
        input: One prediction a row, ``(rows,)`` with ``bag``, or ``(bags, size)`` without. For ``loss="bce"``
            they are logits.
        target: The mean label of each bag; a proportion in [0, 1] for ``loss="bce"``.
        bag: The bag of each row: an index into ``target``. Every bag needs a row, and must be whole: a part of
            a bag does not have the bag's mean.
        rho: Weight of the instance loss, at least 0. 0 is the bag loss, 1 the instance loss; above 1 shrinks
            within bags still more. 0.1 is near the optimum of :func:`minimand.bounds.best_rho` for bags of five
            at ten rows a feature; the paper gives no default.
        loss: ``"mse"``, ``"bce"`` (of the bag's mean probability, from logits), or a callable that maps
            predictions and targets of one shape to losses of that shape.
        weighting: ``"row"`` weighs a bag by its size, ``"bag"`` all bags alike. The same for bags of one size.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk over bags. Weights are scaled to mean 1, so the mean
            of what ``"none"`` returns is what ``"mean"`` returns.

    Returns:
        A scalar, or one loss a bag.

    Raises:
        ValueError: If shapes disagree, a bag has no row, an id or ``rho`` is out of range, or a proportion is none.

    Example:
        >>> aggregate_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([2.5]), rho=0.5)  # 0.25 + 0.5 * 1
        tensor(0.7500)

    Source:
        Javanmard et al. 2024, arXiv 2401.11081, the interpolating loss.
    """
    checks.non_negative(rho, "rho")
    checks.one_of(weighting, "weighting", ("row", "bag"))
    checks.floating(input, "input")
    checks.floating(target, "target")
    if target.dim() != 1:
        raise ValueError(f"target must have shape (bags,), got {tuple(target.shape)}")
    sizes = _bag_sizes(input, bag, len(target))
    checks.finite(target, "target")
    # Sums over a bag in half precision lose the digits that the within-bag variance is made of.
    precise = torch.promote_types(input.dtype, torch.float32)
    f, y = input.to(precise), target.to(precise)
    if loss == "mse":
        losses = _squared(f, y, bag, sizes, rho)
    elif loss == "bce":
        checks.require((y >= 0) & (y <= 1), lambda: "target must hold proportions in [0, 1] for loss='bce'")
        losses = _cross_entropy(f, y, bag, sizes, rho)
    elif callable(loss):
        losses = _any(f, y, bag, sizes, rho, loss)
    else:
        raise ValueError(f"loss must be 'mse', 'bce' or callable, got {loss!r}")
    if weighting == "row" and isinstance(sizes, Tensor):
        losses = losses * sizes.to(precise) * (len(target) / input.numel())
    return reduce(losses.to(input.dtype), reduction)


def within_bag_variance(
    input: Float[Tensor, " rows"] | Float[Tensor, "bags size"],
    bag: Int[Tensor, " rows"] | None = None,
    *,
    weighting: Weighting = "row",
) -> Float[Tensor, ""]:
    """Compute R, the mean square of predictions around the mean of their bag: the squared losses' difference.

    Args:
        input: One prediction a row, ``(rows,)`` with ``bag``, or ``(bags, size)`` without.
        bag: The bag of each row, ids 0 to the number of bags less one.
        weighting: ``"row"`` or ``"bag"``, as in :func:`aggregate_loss`.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes disagree or a bag has no row.

    Example:
        >>> within_bag_variance(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]))
        tensor(0.6667)

    Source:
        Javanmard et al. 2024, arXiv 2401.11081, Lemma 1 with its scaling repaired.
    """
    checks.floating(input, "input")
    checks.one_of(weighting, "weighting", ("row", "bag"))
    bags = _count_bags(bag) if bag is not None else len(input)
    sizes = _bag_sizes(input, bag, bags)
    f = input.to(torch.promote_types(input.dtype, torch.float32))
    squares = (f - _spread(_bag_mean(f, bag, sizes), bag)).square()
    value = squares.mean() if weighting == "row" else _bag_mean(squares, bag, sizes).mean()
    return value.to(input.dtype)


def private_bag_means(
    target: Float[Tensor, " rows"],
    bag: Int[Tensor, " rows"],
    *,
    epsilon: float,
    clip: float | tuple[float, float],
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, " bags"], Float[Tensor, " bags"]]:
    r"""Release bag means of labels with label differential privacy: clip, average, add Laplace noise.

    Changing one label moves one bag mean by at most (high - low) / k, so Laplace noise of scale
    :math:`(high - low) / (k \epsilon)` makes that mean :math:`\epsilon`-private, and, bags being disjoint, all of
    them together. Whatever is trained on the means is as private as they are. What is protected is the value of
    one label; rows, bags and their sizes are taken to be public.

    Warning:
        The proof is for real numbers. Laplace noise sampled in floating point leaves gaps and ties in the low bits
        of the result from which the exact mean can at times be told (Mironov 2012), and its sampling time is not
        constant: this function suits research on what privacy costs. To publish means of labels that matter,
        take a mechanism hardened for it (discrete noise on a grid, as in OpenDP). The noise is only secret if
        the generator's seed is, and each further release of the same labels spends epsilon again.

    Args:
        target: One label a row.
        bag: The bag of each row, ids 0 to the number of bags less one. Bags formed by looking at the labels void
            the guarantee.
        epsilon: The privacy budget, above 0; smaller is stricter.
        clip: Labels are clipped to [-clip, clip] (the paper's b), or to the pair (low, high): (0, 1) for labels
            0 and 1. Choose it without looking at the labels.
        generator: Source of the noise, on the device of ``target``. None: torch's global one.

    Returns:
        The noisy means, and the scale of the noise on each; its variance is twice the square of the scale.

    Raises:
        ValueError: If ``epsilon`` or ``clip`` is out of range, a label is not finite, or a bag has no row.

    Example:
        >>> labels, bag = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> means, scale = private_bag_means(labels, bag, epsilon=1.0, clip=(0.0, 1.0))
        >>> scale
        tensor([0.5000, 0.5000])

    Source:
        Javanmard et al. 2024, arXiv 2401.11081, the label-private mechanism; Dwork et al. 2006 for Laplace noise.
    """
    checks.positive(epsilon, "epsilon")
    low, high = clip if isinstance(clip, tuple) else (-clip, clip)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"clip must be a finite number above 0 or a pair (low, high) with low < high, got {clip}")
    checks.floating(target, "target")
    checks.finite(target, "target")
    sizes = _bag_sizes(target, bag, _count_bags(bag))
    assert isinstance(sizes, Tensor)
    precise = torch.promote_types(target.dtype, torch.float32)
    means = _bag_mean(target.to(precise).clamp(low, high), bag, sizes)
    scale = (high - low) / (epsilon * sizes.to(precise))
    # The difference of two standard exponential numbers is a standard Laplace number.
    noise = torch.empty_like(means).exponential_(generator=generator)
    noise = noise - torch.empty_like(means).exponential_(generator=generator)
    return (means + scale * noise).to(target.dtype), scale.to(target.dtype)


@torch.no_grad()
def ols(
    input: Float[Tensor, "rows features"],
    target: Float[Tensor, " bags"],
    bag: Int[Tensor, " rows"],
    *,
    rho: float = 0.1,
    weighting: Weighting = "row",
) -> Float[Tensor, " features"]:
    r"""Solve the linear model that minimises the interpolated squared loss, in closed form.

    :math:`\theta_\rho = (A + \rho B)^{-1} X^\top P y` with :math:`P` the projection onto bag means,
    :math:`A = X^\top P X` and :math:`B = X^\top (I - P) X`, by orthogonal factorisation of the rows
    :math:`\sqrt{w_a}\,\bar x_a` and :math:`\sqrt{\rho w_a / k_a}\,(x_i - \bar x_a)`. The solution of least norm
    where there are many, as for ``rho=0`` with fewer bags than features.

    Args:
        input: One row of features each. A column of ones gives an intercept; it is constant within bags, so no
            rho shrinks it.
        target: The mean label of each bag.
        bag: The bag of each row: an index into ``target``.
        rho: Weight of the instance loss, at least 0.
        weighting: ``"row"`` or ``"bag"``, as in :func:`aggregate_loss`.

    Returns:
        The coefficients.

    Raises:
        ValueError: If shapes disagree, a bag has no row, or the data hold NaN or infinity.

    Example:
        >>> x, bag = torch.tensor([[1.0], [3.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1])
        >>> ols(x, torch.tensor([4.0, 6.0]), bag, rho=0.0)
        tensor([2.])

    Source:
        Javanmard et al. 2024, arXiv 2401.11081, the linear model.
    """
    checks.non_negative(rho, "rho")
    checks.one_of(weighting, "weighting", ("row", "bag"))
    for value, name in ((input, "input"), (target, "target")):
        checks.floating(value, name)
        checks.finite(value, name)
    sizes = _bag_sizes(input[:, 0], bag, len(target))
    assert isinstance(sizes, Tensor)
    counts = sizes.to(input.dtype)[:, None]
    means = input.new_zeros(len(target), input.shape[1]).index_add(0, bag, input) / counts
    weight = counts if weighting == "row" else torch.ones_like(counts)
    spread = (input - means[bag]) * (rho * weight / counts).sqrt()[bag]
    answers = torch.cat([target.to(input.dtype)[:, None] * weight.sqrt(), torch.zeros_like(input[:, :1])])
    design = torch.cat([means * weight.sqrt(), spread])
    # R of [design | answers] holds all that least squares needs, in at most features + 1 rows.
    triangle = torch.linalg.qr(torch.cat([design, answers], dim=1), mode="r").R
    return torch.linalg.pinv(triangle[:, :-1]) @ triangle[:, -1]


class AggregateLoss(nn.Module):
    """Bag loss, instance loss, or a mix of the two, for labels that are known only as means over bags.

    Unlike the losses of classes it maps predictions of rows and targets of bags, so it is no
    :class:`~minimand.losses.Loss`. Batch whole bags.

    Args:
        rho: Weight of the instance loss, at least 0: 0 is the bag loss, 1 the instance loss. Choose it on held-out
            bags from a grid with small values, or by :func:`minimand.bounds.best_rho`.
        loss: ``"mse"``, ``"bce"`` (predictions are logits, targets proportions), or a callable that maps
            predictions and targets of one shape to losses of that shape.
        weighting: ``"row"`` weighs a bag by its size, ``"bag"`` all bags alike.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` (one loss a bag), or a risk over bags.

    Example:
        >>> loss = AggregateLoss(0.05)
        >>> predictions, bag = torch.zeros(5), torch.tensor([0, 0, 0, 1, 1])
        >>> loss(predictions, torch.tensor([1.0, 2.0]), bag)  # (3 * 1 + 2 * 4) / 5
        tensor(2.2000)

    Source:
        Javanmard et al. 2024, arXiv 2401.11081.
    """

    def __init__(
        self,
        rho: float = 0.1,
        *,
        loss: RowLoss = "mse",
        weighting: Weighting = "row",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        checks.non_negative(rho, "rho")
        checks.one_of(weighting, "weighting", ("row", "bag"))
        if not callable(loss):
            checks.one_of(loss, "loss", ("mse", "bce"))
        check_reduction(reduction)
        self.rho = rho
        self.loss = loss
        self.weighting = weighting
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor, bag: Tensor | None = None) -> Tensor:
        """Compute the loss of predictions ``(rows,)`` with ``bag``, or ``(bags, size)``, and targets ``(bags,)``."""
        return aggregate_loss(
            input,
            target,
            bag,
            rho=self.rho,
            loss=self.loss,
            weighting=self.weighting,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"rho={self.rho}, loss={self.loss!r}, weighting={self.weighting!r}"


def _squared(f: Tensor, y: Tensor, bag: Tensor | None, sizes: Tensor | int, rho: float) -> Tensor:
    # In gaps to the bag's label, so that no gradient has to go through a bag's mean and be spread over it again.
    gaps = f - _spread(y, bag)
    whole = _bag_mean(gaps, bag, sizes).square()
    return whole if rho == 0 else (1 - rho) * whole + rho * _bag_mean(gaps.square(), bag, sizes)


def _cross_entropy(z: Tensor, y: Tensor, bag: Tensor | None, sizes: Tensor | int, rho: float) -> Tensor:
    # log of the mean probability straight from logits: finite where the probability itself is 0 or 1.
    losses = -y * _log_mean_exp(F.logsigmoid(z), bag, sizes)
    losses = losses - (1 - y) * _log_mean_exp(F.logsigmoid(-z), bag, sizes)
    if rho > 0:
        # The mean over a bag of softplus(z) - y z, the cross-entropy of each row.
        instance = _bag_mean(F.softplus(z) - _spread(y, bag) * z, bag, sizes)
        losses = (1 - rho) * losses + rho * instance
    return losses


def _any(
    f: Tensor,
    y: Tensor,
    bag: Tensor | None,
    sizes: Tensor | int,
    rho: float,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    losses = loss(_bag_mean(f, bag, sizes), y)
    if losses.shape != y.shape:
        raise ValueError(f"loss must return one number a prediction: {tuple(y.shape)} in, {tuple(losses.shape)} out")
    if rho > 0:
        instance = loss(f, _spread(y, bag).expand_as(f))
        losses = (1 - rho) * losses + rho * _bag_mean(instance, bag, sizes)
    return losses


def _bag_mean(values: Tensor, bag: Tensor | None, sizes: Tensor | int) -> Tensor:
    """Average over each bag."""
    if bag is None:
        # Divided after the sum: the backward of mean would divide every row.
        return values.sum(1) / values.shape[1]
    assert isinstance(sizes, Tensor)
    return values.new_zeros(len(sizes)).index_add(0, bag, values) / sizes.to(values.dtype)


def _log_mean_exp(values: Tensor, bag: Tensor | None, sizes: Tensor | int) -> Tensor:
    """Compute the logarithm of each bag's mean of exp(values)."""
    if bag is None:
        return torch.logsumexp(values, 1) - math.log(values.shape[1])
    assert isinstance(sizes, Tensor)
    lowest = torch.full_like(values[:1], -math.inf).expand(len(sizes))
    peak = lowest.scatter_reduce(0, bag, values.detach(), "amax")
    return _bag_mean((values - _spread(peak, bag)).exp(), bag, sizes).log() + peak


def _spread(per_bag: Tensor, bag: Tensor | None) -> Tensor:
    """Give each row its bag's number."""
    # index_select: its backward adds rows up, where that of per_bag[bag] sorts them first.
    return per_bag[:, None] if bag is None else per_bag.index_select(0, bag)


def _count_bags(bag: Tensor) -> int:
    checks.tensor(bag, "bag")
    checks.not_empty(bag, "bag")
    return int(bag.max()) + 1


def _bag_sizes(input: Tensor, bag: Tensor | None, bags: int) -> Tensor | int:
    """Check that rows, bags and targets fit together, and count the rows of each bag."""
    checks.not_empty(input, "input")
    if bag is None:
        if input.dim() != 2:
            raise ValueError(f"input must have shape (bags, size) without bag ids, got {tuple(input.shape)}")
        if len(input) != bags:
            raise ValueError(f"target must hold one number for each of the {len(input)} bags of input, got {bags}")
        return input.shape[1]
    checks.tensor(bag, "bag")
    if bag.is_floating_point() or bag.dtype == torch.bool:
        raise TypeError(f"bag must have an integer dtype, got {bag.dtype}")
    if input.dim() != 1 or bag.shape != input.shape:
        raise ValueError(f"input and bag must both have shape (rows,), got {tuple(input.shape)} and {tuple(bag.shape)}")
    low, high = torch.aminmax(bag)
    checks.require(
        (low >= 0) & (high < bags),
        lambda: f"bag must hold ids in [0, {bags - 1}], got values from {int(low)} to {int(high)}",
    )
    one = torch.ones(1, dtype=torch.float64, device=bag.device)
    sizes = torch.zeros(bags, dtype=torch.float64, device=bag.device).index_add(0, bag, one.expand(len(bag)))
    checks.require(sizes > 0, lambda: f"every bag needs a row: bag {int((sizes == 0).nonzero()[0])} of {bags} has none")
    return sizes
