r"""Group distributionally robust optimisation: the worst group counts, found online by exponentiated weights.

With :math:`L_g` the mean loss of the batch's examples of group :math:`g`, each step takes

.. math:: q_g \leftarrow \frac{q_g\,e^{\eta L_g}}{\sum_{g'} q_{g'}\,e^{\eta L_{g'}}}, \qquad
          \text{risk} = \sum_g q_g L_g,

mirror ascent on :math:`\max_{q \in \Delta} \sum_g q_g L_g`. A group without examples in the batch has :math:`L_g = 0`
in both, as in the official code: its weight waits for it.

Source: Sagawa, Koh, Hashimoto and Liang, "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020,
arXiv 1911.08731, Algorithm 1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import checks
from .risk import Risk, check_losses


class GroupDRO(Risk):
    """The mean losses of groups, weighted by how bad each has been.

    In training mode each call first moves the weights, then uses them; in evaluation mode it uses those stored. A
    plain ``reduction`` cannot be told groups: call it on unreduced losses.

    Args:
        num_groups: How many groups there are.
        step_size: The paper's eta_q, above 0; 0.01 as in the official code. Large ones jump to the worst group of
            each batch.

    Example:
        >>> risk = GroupDRO(2, step_size=math.log(3.0))
        >>> risk(torch.tensor([1.0, 0.0, 0.0]), group=torch.tensor([0, 1, 1]))
        tensor(0.7500)

    Source:
        Sagawa et al. 2020, arXiv 1911.08731, Algorithm 1.
    """

    needs = ("group",)
    log_weights: Tensor

    def __init__(self, num_groups: int, *, step_size: float = 0.01) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
        checks.positive(step_size, "step_size")
        self.num_groups = num_groups
        self.step_size = step_size
        # Logarithms: a product of many exponentials leaves the range of floating point, their sum does not.
        self.register_buffer("log_weights", torch.full((num_groups,), -math.log(num_groups)))

    @property
    def weights(self) -> Float[Tensor, " groups"]:
        """The weight of each group; they add up to one."""
        return torch.softmax(self.log_weights, dim=-1)

    def forward(  # type: ignore[override]
        self, losses: Float[Tensor, " batch"], group: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, ""]:
        """Weigh the mean loss of each group; ``group`` ``(batch,)`` gives each example's, from 0."""
        check_losses(losses)
        group = self._checked(group, len(losses))
        exact = losses.to(torch.promote_types(losses.dtype, torch.float32))
        zeros = torch.zeros_like(exact[:1]).expand(self.num_groups)
        counts = zeros.scatter_add(0, group, torch.ones_like(exact))
        means = zeros.scatter_add(0, group, exact) / counts.clamp_min(1)
        log_weights = self.log_weights.to(means.dtype)
        if self.training:
            log_weights = torch.log_softmax(log_weights + self.step_size * means.detach(), dim=-1)
            self.log_weights.copy_(log_weights)
        # Stored in low precision, the weights may have lost their total of one.
        return (torch.softmax(log_weights, dim=-1) * means).sum().to(losses.dtype)

    def _checked(self, group: Tensor | None, batch: int) -> Tensor:
        if group is None:
            raise ValueError("group is required: the group of every example, as risk(losses, group=...)")
        checks.tensor(group, "group")
        if group.is_floating_point() or group.dtype == torch.bool:
            raise TypeError(f"group must have an integer dtype, got {group.dtype}")
        if tuple(group.shape) != (batch,):
            raise ValueError(f"group must have shape ({batch},), got {tuple(group.shape)}")
        checks.require(
            (group >= 0) & (group < self.num_groups),
            lambda: (
                f"group must lie in [0, {self.num_groups - 1}], "
                f"got values from {int(group.min())} to {int(group.max())}"
            ),
        )
        return group
