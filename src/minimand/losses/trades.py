r"""TRADES: adversarial training that limits how far the class probabilities can be moved.

.. math:: L = -\log p_y(x) + \beta \sup_{x' \in B(x)} KL(p(x) \| p(x')).

Source: Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan, "Theoretically Principled Trade-off between Robustness and
Accuracy", ICML 2019, arXiv 1901.08573, equation 5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from ..numerics import categorical_kl
from ..reduction import Reduction, class_rows, reduce
from .pgd import Ball, Model, Norm, ascend, evaluating, step_length


def trades_loss(
    model: Model,
    inputs: Float[Tensor, "batch *features"],
    target: Int[Tensor, " batch"],
    *,
    eps: float,
    beta: float = 6.0,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the TRADES loss, moving the inputs by projected gradient ascent on the divergence.

    Args:
        model: Maps inputs to scores ``(batch, classes)``. Read in evaluation mode while the inputs are moved.
        inputs: Clean inputs.
        target: Class indices.
        eps: Radius of the ball, in the inputs' units.
        beta: The paper's 1 / lambda, at least 0: weight of the divergence. 6 as in the paper's best run.
        norm: Of the ball: ``"linf"`` or ``"l2"``.
        steps: Gradient steps; 10 as in the paper.
        step_size: Length of a step. None: 2.5 eps / steps.
        clip: Range of valid inputs, or None.
        generator: Source of the random starts.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Returns:
        A scalar, or the losses ``(batch,)``.

    Raises:
        ValueError: If a setting is out of range, or the batch is malformed.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> trades_loss(model, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1).shape
        torch.Size([])

    Source:
        Zhang et al. 2019, arXiv 1901.08573, equation 5.
    """
    checks.non_negative(beta, "beta")
    ball = Ball(eps, norm, clip)
    length = step_length(eps, steps, step_size)
    ball.check(inputs)
    with evaluating(model):
        with torch.no_grad():
            still = torch.log_softmax(model(inputs), dim=-1)

        def divergence(moved: Tensor) -> Tensor:
            return categorical_kl(still, torch.log_softmax(model(moved), dim=-1))

        start = ball.draw(inputs, generator)
        moved = ascend(divergence, inputs, start, ball=ball, steps=steps, step_size=length)
    scores = model(inputs)
    rows, labels, row_weight = class_rows(scores, target)
    penalty = categorical_kl(torch.log_softmax(rows, dim=-1), torch.log_softmax(model(moved), dim=-1))
    losses = F.cross_entropy(rows, labels, reduction="none") + beta * penalty
    return reduce(losses, reduction, row_weight=row_weight)
