r"""The spherical family: losses of the target's score, the sum of squares and the sum of all scores; and its Z-loss.

A loss belongs to the family if it sees the scores :math:`o \in R^D` only through

.. math:: o_c, \qquad q = \sum_k o_k^2, \qquad s = \sum_k o_k,

so that its gradient is :math:`\partial L/\partial o = \alpha 1 + 2\beta o + \gamma e_c` with
:math:`\alpha = \partial L/\partial s`, :math:`\beta = \partial L/\partial q`,
:math:`\gamma = \partial L/\partial o_c`. That is what
:class:`~minimand.losses.FactoredSphericalLinear` needs to train an output layer at a cost free of :math:`D`.

The Z-loss standardises the scores, :math:`z_k = (o_k - \mu)/\sigma` with :math:`\mu = s/D` and
:math:`\sigma^2 = q/D - \mu^2`, and asks the target's z-score to exceed :math:`b`:

.. math:: L = \frac1a \log\left(1 + e^{a (b - z_c)}\right), \qquad
          \frac{\partial L}{\partial o_k} = -\frac{\mathrm{sigmoid}(a(b - z_c))}{\sigma}
          \left([k = c] - \frac1D - \frac{z_c z_k}{D}\right).

It ignores any shift and any positive rescaling of the scores, as ranks do.

Source: de Brébisson and Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
Spherical Family", 2016, arXiv 1604.08859; de Brébisson and Vincent, "An Exploration of Softmax Alternatives
Belonging to the Spherical Loss Family", ICLR 2016, arXiv 1511.05042.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from ..reduction import Reduction, class_rows, reduce
from .loss import Loss

ValueAndPartials = tuple[
    Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]
]


@runtime_checkable
class SphericalLoss(Protocol):
    """What a member of the spherical family offers; any :class:`~minimand.losses.Loss` with these is one.

    It also has a Loss's ``weight`` and ``reduction``. A module keeps those among its buffers and submodules, where
    ``isinstance`` does not look from Python 3.12 on, so they are not listed here.
    """

    min_classes: int
    ignore_index: int

    def value_and_partials(
        self,
        target_score: Float[Tensor, " batch"],
        square_sum: Float[Tensor, " batch"],
        score_sum: Float[Tensor, " batch"],
        num_classes: int,
    ) -> ValueAndPartials:
        """Return the losses and their derivatives by ``target_score``, ``square_sum`` and ``score_sum``.

        Args:
            target_score: The paper's o_c: the score of each example's own class.
            square_sum: The paper's q: the sum of the squares of its scores.
            score_sum: The paper's s: the sum of its scores.
            num_classes: The paper's D.
        """
        ...

    def ranking(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Turn scores, one by one, into what classes are ranked by: the larger, the likelier."""
        ...


def zloss(
    input: Float[Tensor, "batch classes *spatial"],
    target: Int[Tensor, "batch *spatial"],
    *,
    sharpness: float = 1.0,
    margin: float = 10.0,
    eps: float = 1e-12,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the Z-loss, :math:`\frac1a \log(1 + e^{a (b - z_c)})` of the target's z-score among all scores.

    Args:
        input: Scores ``(batch, classes)`` or ``(batch, classes, *)``, of at least 3 classes: of two, one
            z-score is always 1 and the other -1.
        target: Class indices ``(batch,)`` or ``(batch, *)``.
        sharpness: The paper's a, above 0: large makes a hinge :math:`\max(0, b - z_c)`, small a straight line.
            The official timing script uses 1.
        margin: The paper's b: the z-score asked of the target, which cannot exceed sqrt(classes - 1). The
            paper tunes it for each k of its top-k errors; 10 is this library's default.
        eps: Added to the variance of the scores.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Returns:
        A scalar, or the losses in the shape of ``target``.

    Raises:
        ValueError: If there are fewer than 3 classes, a setting is out of range, or the batch is malformed.

    Example:
        >>> scores = torch.tensor([[3.0, 0.0, 0.0]])  # z-scores sqrt(2), -1/sqrt(2), -1/sqrt(2)
        >>> zloss(scores, torch.tensor([0]), margin=2**0.5)  # log 2
        tensor(0.6931)

    Source:
        de Brébisson and Vincent 2016, arXiv 1604.08859.
    """
    _check_z_settings(sharpness, margin, eps)
    rows, labels, row_weight = class_rows(input, target, weight=weight, ignore_index=ignore_index, min_classes=3)
    # The loss ignores a shift, so a constant one leaves the gradient exact and keeps q/D - mu^2 from cancelling.
    centred = rows - rows.detach().mean(1, keepdim=True)
    losses = _z_value_and_partials(*_statistics(centred, labels), sharpness, margin, eps)[0]
    return reduce(losses, reduction, row_weight=row_weight, shape=target.shape)


def _standardise(scores: Float[Tensor, "rows classes"], eps: float = 1e-12) -> Float[Tensor, "rows classes"]:
    """Turn each row of scores into z-scores: mean 0, population variance 1."""
    variance, mean = torch.var_mean(scores, dim=1, correction=0, keepdim=True)
    return (scores - mean) / (variance + eps).sqrt()


class ZLoss(Loss):
    """The Z-loss: a soft hinge on the z-score of the target, blind to the shift and the scale of the scores.

    Args:
        sharpness: The paper's a, above 0.
        margin: The paper's b: the z-score asked of the target.
        eps: Added to the variance of the scores; 1e-12 in the official code, there added to the deviation.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> loss = ZLoss(0.5, margin=10.0)
        >>> loss(torch.eye(4), torch.arange(4)).shape
        torch.Size([])

    Source:
        de Brébisson and Vincent 2016, arXiv 1604.08859.
    """

    min_classes = 3
    weight: Tensor | None

    def __init__(
        self,
        sharpness: float = 1.0,
        *,
        margin: float = 10.0,
        eps: float = 1e-12,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        _check_z_settings(sharpness, margin, eps)
        self.sharpness = sharpness
        self.margin = margin
        self.eps = eps
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        return zloss(
            input,
            target,
            sharpness=self.sharpness,
            margin=self.margin,
            eps=self.eps,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def value_and_partials(
        self,
        target_score: Float[Tensor, " batch"],
        square_sum: Float[Tensor, " batch"],
        score_sum: Float[Tensor, " batch"],
        num_classes: int,
    ) -> ValueAndPartials:
        """Return the losses and their derivatives by o_c, q and s (see :class:`SphericalLoss`)."""
        return _z_value_and_partials(
            target_score, square_sum, score_sum, num_classes, self.sharpness, self.margin, self.eps
        )

    def ranking(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the scores: the z-scores keep their order."""
        return input

    def link(self, input: Tensor) -> Tensor:
        """Return the softmax of the z-scores. The Z-loss fits no probabilities: only the order has a meaning."""
        return torch.softmax(_standardise(input, self.eps), dim=-1)


class SquaredErrorLoss(Loss):
    r"""The squared distance from the scores to the one-hot target: :math:`\|o - e_c\|^2 = q - 2 o_c + 1`.

    Args:
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> SquaredErrorLoss()(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0]))
        tensor(4.)

    Source:
        Vincent, de Brébisson and Bouthillier, NIPS 2015, arXiv 1412.7091.
    """

    min_classes = 2
    weight: Tensor | None

    def __init__(
        self, *, weight: Tensor | None = None, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction=reduction)
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        return _loss_of_scores(self, input, target)

    def value_and_partials(
        self,
        target_score: Float[Tensor, " batch"],
        square_sum: Float[Tensor, " batch"],
        score_sum: Float[Tensor, " batch"],
        num_classes: int,
    ) -> ValueAndPartials:
        """Return the losses and their derivatives by o_c, q and s (see :class:`SphericalLoss`)."""
        one = torch.ones_like(target_score)
        return square_sum - 2 * target_score + 1, -2 * one, one, torch.zeros_like(one)

    def ranking(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the scores: they estimate the probabilities themselves."""
        return input

    def link(self, input: Tensor) -> Tensor:
        """Return the probabilities nearest to the scores: their projection onto the simplex."""
        ordered = input.sort(dim=-1, descending=True).values
        excess = ordered.cumsum(-1) - 1
        place = torch.arange(1, input.shape[-1] + 1, device=input.device, dtype=input.dtype)
        kept = (ordered * place > excess).sum(-1, keepdim=True).clamp_min(1)
        return (input - excess.gather(-1, kept - 1) / kept).clamp_min(0)


class TaylorSoftmaxLoss(Loss):
    r"""Minus the log of the Taylor softmax, whose :math:`e^{o}` is replaced by :math:`1 + o + o^2/2`.

    .. math:: L = \log\left(D + s + q/2\right) - \log\left(1 + o_c + o_c^2/2\right).

    The numerator is even about -1 and at least 1/2: a score far below -1 counts as one far above.

    Args:
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> TaylorSoftmaxLoss()(torch.zeros(1, 4), torch.tensor([0]))  # log 4
        tensor(1.3863)

    Source:
        de Brébisson and Vincent, ICLR 2016, arXiv 1511.05042.
    """

    min_classes = 2
    weight: Tensor | None

    def __init__(
        self, *, weight: Tensor | None = None, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction=reduction)
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        return _loss_of_scores(self, input, target)

    def value_and_partials(
        self,
        target_score: Float[Tensor, " batch"],
        square_sum: Float[Tensor, " batch"],
        score_sum: Float[Tensor, " batch"],
        num_classes: int,
    ) -> ValueAndPartials:
        """Return the losses and their derivatives by o_c, q and s (see :class:`SphericalLoss`)."""
        total = num_classes + score_sum + square_sum / 2
        own = 1 + target_score + target_score.square() / 2
        return total.log() - own.log(), -(1 + target_score) / own, 0.5 / total, 1 / total

    def ranking(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the distance of each score from -1, of which the Taylor softmax is a rising function."""
        return (1 + input).abs()

    def link(self, input: Tensor) -> Tensor:
        """Return the Taylor softmax of the scores. It may rank the classes otherwise than the scores do."""
        masses = 1 + input + input.square() / 2
        return masses / masses.sum(-1, keepdim=True)


class SphericalSoftmaxLoss(Loss):
    r"""Minus the log of the spherical softmax, whose :math:`e^{o}` is replaced by :math:`o^2 + \epsilon`.

    .. math:: L = \log\left(q + D \epsilon\right) - \log\left(o_c^2 + \epsilon\right).

    Args:
        eps: Added to each square, above 0: every class keeps some probability. The paper calls for a small
            constant; 0.01 is this library's choice.
        weight: One weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> SphericalSoftmaxLoss()(torch.ones(1, 4), torch.tensor([0]))  # log 4
        tensor(1.3863)

    Source:
        de Brébisson and Vincent, ICLR 2016, arXiv 1511.05042.
    """

    min_classes = 2
    weight: Tensor | None

    def __init__(
        self,
        eps: float = 1e-2,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        checks.positive(eps, "eps")
        self.eps = eps
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the loss of scores ``(batch, classes, *)`` and class indices ``(batch, *)``."""
        return _loss_of_scores(self, input, target)

    def value_and_partials(
        self,
        target_score: Float[Tensor, " batch"],
        square_sum: Float[Tensor, " batch"],
        score_sum: Float[Tensor, " batch"],
        num_classes: int,
    ) -> ValueAndPartials:
        """Return the losses and their derivatives by o_c, q and s (see :class:`SphericalLoss`)."""
        total = square_sum + num_classes * self.eps
        own = target_score.square() + self.eps
        return total.log() - own.log(), -2 * target_score / own, 1 / total, torch.zeros_like(total)

    def ranking(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the size of each score, of which the spherical softmax is a rising function."""
        return input.abs()

    def link(self, input: Tensor) -> Tensor:
        """Return the spherical softmax of the scores. It ranks the classes by the size of their scores."""
        masses = input.square() + self.eps
        return masses / masses.sum(-1, keepdim=True)


def _check_z_settings(sharpness: float, margin: float, eps: float) -> None:
    checks.positive(sharpness, "sharpness")
    checks.between(margin, "margin", -float("inf"), float("inf"), low_open=True, high_open=True)
    checks.positive(eps, "eps")


def _z_value_and_partials(
    target_score: Tensor,
    square_sum: Tensor,
    score_sum: Tensor,
    num_classes: int,
    sharpness: float,
    margin: float,
    eps: float,
) -> ValueAndPartials:
    mean = score_sum / num_classes
    deviation = ((square_sum / num_classes - mean.square()).clamp_min(0) + eps).sqrt()
    z = (target_score - mean) / deviation
    gap = sharpness * (margin - z)
    slope = -torch.sigmoid(gap)
    by_square = -slope * z / (2 * num_classes * deviation.square())
    by_sum = -slope / (num_classes * deviation) - 2 * mean * by_square
    # -logsigmoid(-x) is softplus(x) without torch's cut to a straight line above 20.
    return -F.logsigmoid(-gap) / sharpness, slope / deviation, by_square, by_sum


def _statistics(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    own = rows.gather(1, labels[:, None])[:, 0]
    return own, rows.square().sum(1), rows.sum(1), rows.shape[1]


def _loss_of_scores(loss: Any, input: Tensor, target: Tensor) -> Tensor:
    """Compute a member's loss from all the scores, for the classes that still fit."""
    rows, labels, row_weight = class_rows(
        input, target, weight=loss.weight, ignore_index=loss.ignore_index, min_classes=loss.min_classes
    )
    losses = loss.value_and_partials(*_statistics(rows, labels))[0]
    return reduce(losses, loss.reduction, row_weight=row_weight, shape=target.shape)
