r"""Online regression of a bandit's losses: one gradient step a round, on the action that was taken.

Actions are not weighed by their probabilities: the regression is of the losses, not of the policy.

Source: Deb, Ban, Zuo, He and Banerjee, "Contextual Bandits with Online Neural Regression", ICLR 2024,
arXiv 2312.07145, section 3; Foster and Rakhlin 2020, arXiv 2002.04926, which reduces bandits to it.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..projections import project_ball
from ..reduction import Reduction, check_reduction, reduce
from .bandit_agents import check_feedback, check_unit
from .perturbed_output import PerturbedOutput

Regression = Literal["kl", "square"]


def online_regression_loss(
    input: Float[Tensor, "copies *batch"],
    target: Float[Tensor, "*batch"],
    *,
    kind: Regression = "kl",
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    r"""Compute the regression loss of observed losses, averaged over the perturbed copies of the output.

    .. math:: \ell = \tfrac12 (y - \tilde f)^2 \ \text{(square)}, \qquad
              \ell = y \ln\frac{y}{\sigma(\tilde f)} + (1 - y) \ln\frac{1 - y}{1 - \sigma(\tilde f)} \ \text{(KL)},

    both with the gradient (prediction - y) with respect to :math:`\tilde f`. The second is the binary cross-entropy
    less the entropy of y, so it is 0 where :math:`\sigma(\tilde f) = y`.

    Args:
        input: Outputs :math:`\tilde f` of the network, one copy a row; logits for ``"kl"``.
        target: Observed losses y, in [0, 1].
        kind: ``"kl"`` (NeuFastCB) or ``"square"`` (NeuSquareCB).
        reduction: Over the batch: ``"mean"``, ``"sum"``, ``"none"``, or a risk.

    Returns:
        A scalar, or a tensor of the target's shape for ``"none"``.

    Raises:
        TypeError: If an input is not of a floating-point dtype.
        ValueError: If shapes do not match, or a target lies outside [0, 1].

    Example:
        >>> online_regression_loss(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([0.5, 1.0]))
        tensor(0.0635)

    Source:
        Deb et al. 2024, arXiv 2312.07145, section 3.
    """
    checks.floating(input, "input")
    checks.floating(target, "target")
    checks.one_of(kind, "kind", ("kl", "square"))
    check_reduction(reduction)
    if input.dim() == 0 or input.shape[1:] != target.shape:
        raise ValueError(
            f"input must have shape (copies, *batch) with the batch of target {tuple(target.shape)}, "
            f"got {tuple(input.shape)}"
        )
    checks.not_empty(input, "input")
    check_unit(target, "target")
    if kind == "square":
        losses = (input - target).square() / 2
    else:
        entropy = -torch.xlogy(target, target) - torch.xlogy(1 - target, 1 - target)
        losses = nn.functional.softplus(input) - target * input - entropy
    return reduce(losses.mean(0).flatten(), reduction, shape=target.shape)


class OnlineRegressor(nn.Module):
    r"""A network that predicts the losses of actions, and learns from those of the actions taken.

    It is what the neural agents of this room have in common, and the place to start from for another one. Weights,
    round count and, of a :class:`PerturbedOutput`, signs travel in the ``state_dict``; the state of an optimizer of
    yours is yours to save.

    Args:
        network: Maps contexts ``(batch, *)`` to one output an action, ``(batch, actions)`` or ``(batch, actions, 1)``:
            one context for all actions (with a network of K outputs, or one that starts with
            :class:`DisjointLinear`), or contexts ``(batch, actions, dims)`` with a network of a single output. Logits
            of losses for ``"kl"``, losses for ``"square"``.
        loss: What the network is trained by: ``"kl"`` or ``"square"``.
        optimizer: Of the network's parameters; plain SGD at ``lr`` by default, the paper's online gradient descent.
            Put a scheduler on your own for the theory's step :math:`4 / (\mu t)`.
        lr: Learning rate of the default optimizer.
        radius: Radius of the ball around its initial value that each parameter is projected on after a step; None for
            no projection.

    Raises:
        ValueError: If a setting is out of range, or the network has no parameter that needs a gradient.

    Example:
        >>> regressor = OnlineRegressor(nn.Linear(2, 3), lr=1.0)
        >>> contexts = torch.eye(2)
        >>> first = regressor.update(contexts, torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
        >>> second = regressor.update(contexts, torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
        >>> bool(second < first), int(regressor.rounds)
        (True, 4)

    Source:
        Deb et al. 2024, arXiv 2312.07145, section 3 and algorithms 1 and 2, their regression.
    """

    rounds: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: Regression = "kl",
        optimizer: torch.optim.Optimizer | None = None,
        lr: float = 0.1,
        radius: float | None = None,
    ) -> None:
        super().__init__()
        checks.one_of(loss, "loss", ("kl", "square"))
        checks.positive(lr, "lr")
        if radius is not None:
            checks.positive(radius, "radius")
        learnt = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        if not learnt:
            raise ValueError("network must have a parameter that needs a gradient: there is nothing to learn")
        self.network = network
        self.loss = loss
        self.radius = radius
        self.optimizer = optimizer if optimizer is not None else torch.optim.SGD(learnt.values(), lr=lr)
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64))
        self._projected = [] if radius is None else list(learnt)
        for number, name in enumerate(self._projected):
            self.register_buffer(f"centre_{number}", learnt[name].detach().clone())

    @property
    def next_round(self) -> int:
        """The number of the round to come, from 1: a batch counts as many as it has contexts."""
        return int(self.rounds) + 1

    def forward(self, contexts: Tensor) -> Float[Tensor, "batch actions"]:
        """Predict the loss of every action.

        Args:
            contexts: ``(batch, *)``, as the network takes them.

        Returns:
            Predicted losses: in [0, 1] for ``"kl"``, unbounded for ``"square"``.

        Raises:
            ValueError: If the network's output has another shape or is not finite.
        """
        outputs = self._outputs(contexts)
        return (outputs.sigmoid() if self.loss == "kl" else outputs).mean(0)

    @torch.enable_grad()
    def update(
        self, contexts: Tensor, action: Int[Tensor, " batch"], loss: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Take one gradient step on the losses of the actions taken, and project.

        Args:
            contexts: ``(batch, *)``, as the network takes them.
            action: The actions taken.
            loss: The losses they brought, in [0, 1].

        Returns:
            The regression loss before the step, detached.

        Raises:
            TypeError: If ``action`` holds no integers, or ``loss`` no floating-point numbers.
            ValueError: If shapes do not match, an action does not exist, or a loss lies outside [0, 1].
        """
        outputs = self._outputs(contexts)
        check_feedback(action, loss, batch=len(contexts), num_actions=outputs.shape[-1])
        taken = outputs.gather(-1, action.long().expand(len(outputs), -1)[..., None]).squeeze(-1)
        objective = online_regression_loss(taken, loss.to(taken), kind=self.loss)
        if isinstance(self.network, PerturbedOutput) and self.network.signs is None:
            # Of the second order in the perturbation, which for the square loss, of curvature 1, is all.
            curvature = 1.0 if self.loss == "square" else (taken.sigmoid() * (-taken).sigmoid()).mean()
            objective = objective + curvature * self.network.penalty()
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        self.optimizer.step()
        self._project()
        self.rounds += len(loss)
        return objective.detach()

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"loss={self.loss!r}, radius={self.radius}"

    def _outputs(self, contexts: Tensor) -> Float[Tensor, "copies batch actions"]:
        outputs: Tensor = self.network(contexts)
        if not isinstance(self.network, PerturbedOutput):
            outputs = outputs[None]
        return action_outputs(outputs, batch=len(contexts))

    @torch.no_grad()
    def _project(self) -> None:
        if self.radius is None:
            return
        for number, name in enumerate(self._projected):
            parameter, centre = self.network.get_parameter(name), self.get_buffer(f"centre_{number}")
            parameter.copy_(centre + project_ball(parameter - centre, radius=self.radius))


def action_outputs(outputs: Tensor, *, batch: int) -> Float[Tensor, "copies batch actions"]:
    """Return a network's outputs, checked, without the last dimension of a network of a single output.

    Args:
        outputs: ``(copies, batch, actions)`` or ``(copies, batch, actions, 1)``.
        batch: The number of contexts.

    Raises:
        ValueError: If the shape is another, there are fewer than two actions, or an output is not finite.
    """
    if outputs.dim() == 4 and outputs.shape[-1] == 1:
        outputs = outputs.squeeze(-1)
    if outputs.dim() != 3 or outputs.shape[1] != batch or outputs.shape[2] < 2:
        raise ValueError(
            f"network must give one output for each of at least 2 actions, (batch, actions) with the "
            f"batch of {batch} contexts, got {tuple(outputs.shape[1:])}"
        )
    checks.finite(outputs.detach(), "the network's output")
    return outputs
