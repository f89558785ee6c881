"""From a batch of scores to rows of examples, and from per-example losses to a scalar.

torch.nn's conventions for ``(batch, classes, *)`` scores, ``weight``, ``ignore_index`` and ``reduction``,
written once. ``reduction`` may also be a callable: a risk, which maps losses ``(batch,)`` to a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import checks

Reduction = Literal["mean", "sum", "none"] | Callable[[Tensor], Tensor]


def check_reduction(reduction: Reduction) -> None:
    """Raise unless ``reduction`` is ``"mean"``, ``"sum"``, ``"none"`` or callable."""
    if not callable(reduction) and reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum', 'none' or a risk, got {reduction!r}")


def class_rows(
    input: Float[Tensor, "batch classes *spatial"],
    target: Int[Tensor, "batch *spatial"],
    *,
    weight: Float[Tensor, " classes"] | None = None,
    ignore_index: int = -100,
    min_classes: int = 2,
) -> tuple[Float[Tensor, "rows classes"], Int[Tensor, " rows"], Float[Tensor, " rows"] | None]:
    """Check scores and class indices and lay them out one example a row.

    Args:
        input: Scores ``(batch, classes)`` or ``(batch, classes, *)``.
        target: Class indices ``(batch,)`` or ``(batch, *)``.
        weight: One non-negative weight a class, or None.
        ignore_index: Examples with this target count for nothing.
        min_classes: The fewest classes that the loss is defined for.

    Returns:
        Scores ``(rows, classes)``; class indices ``(rows,)``, 0 where ignored; and each row's weight, 0 where
        ignored, or None when every row weighs 1.
    """
    checks.class_scores(input, target, ignore_index=ignore_index, min_classes=min_classes)
    rows = input if input.dim() == 2 else input.movedim(1, -1).reshape(-1, input.shape[1])
    labels = target.reshape(-1)
    # A negative ignore_index (torch's default) can only occur where the check above let it through, so one
    # comparison serves; eager code leaves the common case without weights at no cost.
    ignored = labels == ignore_index
    readable = checks.values_readable(labels) and labels.device.type == "cpu"
    if weight is None and readable and not bool(ignored.any()):
        return rows, labels, None
    labels = torch.where(ignored, torch.zeros_like(labels), labels)
    if weight is None:
        row_weight = torch.ones_like(rows[:, 0]).detach()
    else:
        if tuple(weight.shape) != (input.shape[1],):
            raise ValueError(f"weight must have shape ({input.shape[1]},), got {tuple(weight.shape)}")
        row_weight = weight.to(rows)[labels]
    return rows, labels, torch.where(ignored, torch.zeros_like(row_weight), row_weight)


def reduce(
    losses: Float[Tensor, " rows"],
    reduction: Reduction,
    *,
    row_weight: Float[Tensor, " rows"] | None = None,
    shape: tuple[int, ...] | torch.Size | None = None,
) -> Tensor:
    """Reduce per-example losses as torch.nn does, or by a risk.

    Args:
        losses: One loss a row.
        reduction: ``"mean"`` (weighted mean), ``"sum"``, ``"none"``, or a risk. A risk is given the weighted
            losses of the rows whose weight is above zero.
        row_weight: Weights from :func:`class_rows`, or None.
        shape: For ``"none"``: the shape of the target, restored.

    Raises:
        ValueError: If a loss is NaN or infinite, which means that the input is.
    """
    check_reduction(reduction)
    if row_weight is not None:
        # where, not only a product: an ignored row may hold any number, and 0 * inf is NaN.
        losses = torch.where(row_weight > 0, losses * row_weight, torch.zeros_like(losses))
    checks.require(
        torch.isfinite(losses.detach()), lambda: "input contains NaN or infinity: a loss of the batch is not finite"
    )
    if callable(reduction):
        if row_weight is not None and checks.values_readable(losses):
            losses = losses[row_weight > 0]
        return reduction(losses)
    if reduction == "none":
        return losses if shape is None else losses.reshape(shape)
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if row_weight is None else losses.sum() / row_weight.sum()
