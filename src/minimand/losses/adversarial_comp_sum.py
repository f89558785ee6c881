r"""Smooth adversarial comp-sum loss: adversarial training that limits how far the vector of margins can be moved.

With the margins :math:`\bar\Delta(x) = (o_y(x) - o_k(x))_{k \ne y}`, a ball :math:`B(x)` of inputs and the comp-sum
function :math:`\Phi^\tau`,

.. math:: L = \Phi^\tau\Big(\sum_{k \ne y} e^{-\Delta_k(x) / \rho}\Big)
              + \nu \sup_{x' \in B(x)} \|\bar\Delta(x') - \bar\Delta(x)\|_2.

For :math:`\nu \ge \sqrt{K - 1} / \rho` it is at least
:math:`\sup_{x'} \Phi^\tau(\sum_{k \ne y} \Phi_\rho(\Delta_k(x')))` with the ramp
:math:`\Phi_\rho(u) = \min(\max(0, 1 - u/\rho), 1)`, hence at least :math:`\Phi^\tau(1)` times the adversarial zero-one
loss. Smaller :math:`\nu` is common in practice, and trades that promise for clean accuracy.

The supremum is sought by gradient steps on the squared norm from a random point: the norm has no slope at x itself.

Source: Mao, Mohri and Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
arXiv 2304.07288, the smooth adversarial comp-sum losses.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..reduction import Reduction, check_reduction, class_rows, reduce
from .comp_sum import comp_sum_loss
from .pgd import Ball, Model, Norm, ascend, evaluating, step_length


def smooth_adversarial_comp_sum_loss(
    input: Float[Tensor, "batch classes"],
    moved: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the comp-sum loss of clean scores plus nu times how far the margins moved.

    Args:
        input: Scores of the clean inputs.
        moved: Scores of the inputs that were moved.
        target: Class indices.
        tau: Of the comp-sum loss, at least 0; 1 is cross-entropy.
        rho: Divides the clean scores, above 0; the scores that the penalty compares stay as they are.
        nu: Weight of the penalty, at least 0.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Returns:
        A scalar, or the losses ``(batch,)``.

    Raises:
        ValueError: If a setting is out of range, or the batch is malformed.

    Example:
        >>> clean, moved = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]])
        >>> smooth_adversarial_comp_sum_loss(clean, moved, torch.tensor([0]))  # log(1 + 1/e) + 0.5
        tensor(0.8133)

    Source:
        Mao, Mohri and Zhong 2023, arXiv 2304.07288.
    """
    checks.non_negative(nu, "nu")
    if moved.shape != input.shape:
        raise ValueError(f"moved must have the shape of input {tuple(input.shape)}, got {tuple(moved.shape)}")
    _, labels, row_weight = class_rows(input, target)
    losses = comp_sum_loss(input, target, tau=tau, rho=rho, reduction="none")
    # The target's own coordinate is zero in both. vector_norm has subgradient zero where nothing moved.
    movement = torch.linalg.vector_norm(margins(moved, labels) - margins(input, labels), dim=1)
    return reduce(losses + nu * movement, reduction, row_weight=row_weight)


def margins(scores: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
    """Compute how far the true class leads each class: zero at the true one."""
    return scores.gather(1, target[:, None]) - scores


class SmoothAdversarialCompSumLoss(nn.Module):
    """Adversarial training by the smooth adversarial comp-sum loss; called with the model and the inputs.

    Each call costs ``steps`` forward and backward passes to move the inputs, and one more on the inputs as moved.

    Args:
        tau: Of the comp-sum loss, at least 0; the paper reports 1.
        eps: Radius of the ball, in the inputs' units; 8/255 in the maximum norm is usual for images.
        rho: Divides the scores in the first term, above 0.
        nu: Weight of the penalty, at least 0. Both are tuned: a small network on small images did best with
            ``rho=0.3, nu=0.7``, and collapsed with 1 and 1.
        norm: Of the ball: ``"linf"`` or ``"l2"``.
        steps: Gradient steps that move the inputs; 10 as is usual in training.
        step_size: Length of a step. None: 2.5 eps / steps.
        clip: Range of valid inputs, or None.
        generator: Source of the random starts, or None for torch's own.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or a risk.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> loss = SmoothAdversarialCompSumLoss(eps=0.1, rho=0.3, nu=0.7)
        >>> loss(model, torch.rand(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])).shape
        torch.Size([])

    Source:
        Mao, Mohri and Zhong 2023, arXiv 2304.07288, ADV-COMP-SUM.
    """

    def __init__(
        self,
        tau: float = 1.0,
        *,
        eps: float,
        rho: float = 1.0,
        nu: float = 1.0,
        norm: Norm = "linf",
        steps: int = 10,
        step_size: float | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
        generator: torch.Generator | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        checks.non_negative(tau, "tau")
        checks.positive(rho, "rho")
        checks.non_negative(nu, "nu")
        check_reduction(reduction)
        self.tau = tau
        self.rho = rho
        self.nu = nu
        self.ball = Ball(eps, norm, clip)
        self.steps = steps
        self.step_size = step_length(eps, steps, step_size)
        self.generator = generator
        self.reduction = reduction

    def forward(self, model: Model, inputs: Float[Tensor, "batch *features"], target: Int[Tensor, " batch"]) -> Tensor:
        """Compute the loss; gradients reach the model through both the clean and the moved inputs."""
        moved = self.attack(model, inputs, target)
        return smooth_adversarial_comp_sum_loss(
            model(inputs), model(moved), target, tau=self.tau, rho=self.rho, nu=self.nu, reduction=self.reduction
        )

    def attack(
        self, model: Model, inputs: Float[Tensor, "batch *features"], target: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch *features"]:
        """Move each input within its ball so that the margins move farthest.

        The model is read in evaluation mode and left as it was: modes, parameters and their gradients.

        Returns:
            The moved inputs, detached.
        """
        self.ball.check(inputs)
        with evaluating(model):
            with torch.no_grad():
                scores = model(inputs)
            _, labels, _ = class_rows(scores, target)
            still = margins(scores, labels)

            def squared_movement(moved: Tensor) -> Tensor:
                return (margins(model(moved), labels) - still).square().sum(1)

            start = self.ball.draw(inputs, self.generator)
            return ascend(squared_movement, inputs, start, ball=self.ball, steps=self.steps, step_size=self.step_size)
