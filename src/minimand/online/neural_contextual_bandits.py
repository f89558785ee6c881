r"""NeuSquareCB and NeuFastCB: contextual bandits that regress losses online with a network and weigh actions by gaps.

In each round a context is shown, one of :math:`K` actions is taken, and its loss :math:`y \in [0, 1]` alone is seen. A
network predicts the losses, :math:`\hat y_a`; with the best action :math:`b = \arg\min_a \hat y_a`, any other is taken
with probability

.. math:: p_a = \frac{1}{K + \gamma (\hat y_a - \hat y_b)} \ \text{(NeuSquareCB)}, \qquad
          p_a = \frac{\hat y_b}{K \hat y_b + \gamma (\hat y_a - \hat y_b)} \ \text{(NeuFastCB)},

and :math:`b` with the rest. The first trains the network by the square loss; the second by the divergence
:math:`KL(y \| \sigma(f))`, and explores by relative gaps, so little where the best action has almost no loss. One
gradient step is taken a round, on the action that was taken, without importance weights: the regression is of the
losses, not of the policy.

The theory perturbs the network's output, with fair signs :math:`\epsilon` that are drawn once and kept:

.. math:: \tilde f(\theta; x, \epsilon) = f(\theta; x)
          + c_p m^{-1/4} \sum_j (\theta - \theta_0)_j\, \epsilon_j .

In the mean over signs the square loss gains the pull :math:`\frac{c_p^2}{2 \sqrt m} \|\theta - \theta_0\|^2` to the
initial weights, whose curvature outweighs the network's negative one as the width :math:`m` grows.

Source: Deb, Ban, Zuo, He and Banerjee, "Contextual Bandits with Online Neural Regression", ICLR 2024,
arXiv 2312.07145; the weights are those of Abe and Long 1999, of Foster and Rakhlin 2020, arXiv 2002.04926 (square),
and of Foster and Krishnamurthy 2021, arXiv 2107.02237 (fast).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from ..projections import project_ball
from ..reduction import Reduction, check_reduction, reduce

Regression = Literal["kl", "square"]
Weighting = Literal["fast", "square"]


class Decision(NamedTuple):
    """What :meth:`NeuralCB.act` chose.

    Args:
        action: The actions taken, ``(batch,)``.
        probability: The probability that each was taken with, ``(batch,)``: what off-policy evaluation asks for.
    """

    action: Tensor
    probability: Tensor


def inverse_gap_weights(
    predicted: Float[Tensor, "*batch actions"], *, gamma: float, kind: Weighting = "square"
) -> Float[Tensor, "*batch actions"]:
    r"""Compute the probabilities of actions from their predicted losses, by inverse gap weighting.

    .. math:: p_a = \frac{1}{K + \gamma g_a} \ (a \ne b), \qquad p_b = 1 - \sum_{a \ne b} p_a,

    with the gap :math:`g_a = \hat y_a - \hat y_b` (``"square"``) or the relative gap
    :math:`(\hat y_a - \hat y_b) / \hat y_b` (``"fast"``) to the least predicted loss.

    Args:
        predicted: Predicted losses :math:`\hat y`, the smaller the better; in [0, 1] for ``"fast"``. Where rewards in
            [0, 1] are predicted, give one minus these: the fast weights tell a small loss from a large one.
        gamma: The rate of exploitation :math:`\gamma`, at least 0: at 0 all actions are equally likely, and as it
            grows the best takes all.
        kind: ``"square"`` (NeuSquareCB) or ``"fast"`` (NeuFastCB). The fast weights of a best action with a predicted
            loss of exactly 0 do not explore but among its equals.

    Returns:
        Probabilities that add up to 1 along the last dimension; the best action has at least 1/K.

    Raises:
        TypeError: If ``predicted`` is not of a floating-point dtype.
        ValueError: If there are fewer than two actions, a prediction is not finite or, for ``"fast"``, not in [0, 1],
            or ``gamma`` is negative.

    Example:
        >>> predicted = torch.tensor([0.1, 0.3, 0.9])
        >>> inverse_gap_weights(predicted, gamma=10.0)
        tensor([0.7091, 0.2000, 0.0909])
        >>> inverse_gap_weights(predicted, gamma=10.0, kind="fast")
        tensor([0.9445, 0.0435, 0.0120])

    Source:
        Deb et al. 2024, arXiv 2312.07145, algorithms 1 and 2.
    """
    checks.floating(predicted, "predicted")
    checks.one_of(kind, "kind", ("square", "fast"))
    checks.non_negative(gamma, "gamma")
    if predicted.dim() == 0 or predicted.shape[-1] < 2:
        raise ValueError(f"predicted must score at least 2 actions, got shape {tuple(predicted.shape)}")
    checks.finite(predicted, "predicted")
    least, best = predicted.min(-1, keepdim=True)
    gap = predicted - least
    if kind == "fast":
        _check_unit(predicted, "predicted")
        # Equals of a best action without loss have no gap, which 0 / 0 would not tell; the others have an infinite one.
        gap = torch.where(gap > 0, gap / least, gap).clamp_max(torch.finfo(gap.dtype).max)
    others = torch.reciprocal(predicted.shape[-1] + gamma * gap).scatter(-1, best, 0.0)
    return others.scatter(-1, best, 1 - others.sum(-1, keepdim=True))


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
    _check_unit(target, "target")
    if kind == "square":
        losses = (input - target).square() / 2
    else:
        entropy = -torch.xlogy(target, target) - torch.xlogy(1 - target, 1 - target)
        losses = nn.functional.softplus(input) - target * input - entropy
    return reduce(losses.mean(0).flatten(), reduction, shape=target.shape)


class PerturbedOutput(nn.Module):
    r"""A network whose output feels the distance from the initial weights, through fixed random signs.

    .. math:: \tilde f(\theta; x, \epsilon^s) = f(\theta; x) + c \sum_j (\theta - \theta_0)_j\, \epsilon^s_j,
              \qquad s = 1 \dots S .

    All parameters that need a gradient when this is built take part, and their values are :math:`\theta_0`, where
    there is no perturbation. The mean over all signs has a closed form, see :meth:`penalty`; ``copies=None`` takes it
    in place of drawn signs, and then the penalty must be added to the loss, as :class:`NeuralCB` does.

    Args:
        network: Any network f; moved to its device and dtype beforehand.
        strength: :math:`c = c_p m^{-1/4}`, at least 0: the paper's constant over the fourth root of the width m. The
            theory asks for a :math:`c_p` with :math:`c_p^2` of the order of the network's curvature.
        copies: How many sign vectors S; the theory asks for the order of log m. They take one byte an entry and
            travel in the state. None for the mean over all.
        seed: Of the signs.

    Raises:
        ValueError: If ``strength`` is negative, ``copies`` below 1, or no parameter needs a gradient.

    Example:
        >>> network = PerturbedOutput(nn.Linear(2, 3), strength=0.1, copies=4)
        >>> network(torch.ones(5, 2)).shape
        torch.Size([4, 5, 3])

    Source:
        Deb et al. 2024, arXiv 2312.07145, section 3; that the signs are kept for all rounds is our reading, the mean
        over signs our derivation.
    """

    initial: Tensor
    signs: Tensor | None

    def __init__(self, network: nn.Module, *, strength: float, copies: int | None = 5, seed: int = 0) -> None:
        super().__init__()
        checks.non_negative(strength, "strength")
        if copies is not None and copies < 1:
            raise ValueError(f"copies must be at least 1, or None for the mean over all signs, got {copies}")
        self.network = network
        self.strength = float(strength)
        self._names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        if not self._names:
            raise ValueError("network must have a parameter that needs a gradient: there is nothing to perturb")
        start = self._weights().detach().clone()
        self.register_buffer("initial", start)
        signs = None
        if copies is not None:
            generator = torch.Generator().manual_seed(seed)
            fair = torch.randint(2, (copies, start.numel()), generator=generator, dtype=torch.int8)
            signs = (2 * fair - 1).to(start.device)
        self.register_buffer("signs", signs)

    def forward(self, contexts: Tensor) -> Tensor:
        """Return the perturbed outputs, ``(copies, *)`` for outputs ``(*)``; one copy, plain, if ``copies`` is None.

        Args:
            contexts: What the network takes.

        Raises:
            ValueError: If the network's output is not finite.
        """
        output: Tensor = self.network(contexts)
        checks.finite(output.detach(), "the network's output")
        if self.signs is None or self.strength == 0:
            return output[None].expand(1 if self.signs is None else len(self.signs), *output.shape)
        offset = self._weights() - self.initial
        shift = self.strength * (self.signs.to(offset) @ offset)
        return output + shift.to(output).view(-1, *[1] * output.dim())

    def penalty(self) -> Float[Tensor, ""]:
        r"""Return :math:`\frac{c^2}{2} \|\theta - \theta_0\|^2`: half of the variance of the perturbation.

        It is, exactly, by how much the perturbation raises the mean of the square loss over all signs; to second order
        in c, times :math:`\sigma'(f)`, by how much it raises that of the KL loss.
        """
        return self.strength**2 / 2 * (self._weights() - self.initial).square().sum()

    def _weights(self) -> Tensor:
        return torch.cat([self.network.get_parameter(name).flatten() for name in self._names])

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"strength={self.strength}, copies={None if self.signs is None else len(self.signs)}"


class NeuralCB(nn.Module):
    r"""A contextual bandit on any network: NeuFastCB (``loss="kl"``) and NeuSquareCB (``loss="square"``).

    Each round calls :meth:`act` on the contexts, then :meth:`update` with what was seen. Called as a module it gives
    the predicted losses. A round of the paper is a batch of one; a batch is decided with the same weights and learnt
    from in one step. Round count, weights, signs and the state of the generator travel in the ``state_dict``; that of
    an optimizer of yours is yours to save.

    Args:
        network: Maps contexts ``(batch, *)`` to one output an action, ``(batch, actions)`` or ``(batch, actions, 1)``:
            one context for all actions with a network of K outputs, or contexts ``(batch, actions, dims)`` with one of
            a single output. Logits of losses for ``"kl"``, losses for ``"square"``. A :class:`PerturbedOutput` gives
            the theory's algorithm; without it is the practical default, as perturbing bought nothing where we measured.
        loss: What the network is trained by: ``"kl"`` or ``"square"``.
        weighting: How actions are weighed: ``"fast"`` or ``"square"``; by default ``"fast"`` for ``"kl"`` and
            ``"square"`` for ``"square"``, as in the paper.
        gamma: The rate of exploitation, or a function from the round (1, 2, ...) to it. By default
            :math:`\sqrt{K t}` for the square weights, the order of the theory's without its unknown regret of
            regression, and never under its floor of 10 K for the fast ones.
        optimizer: Of the network's parameters; plain SGD at ``lr`` by default, the paper's online gradient descent.
            Put a scheduler on your own for the theory's step :math:`4 / (\mu t)`.
        lr: Learning rate of the default optimizer.
        radius: Radius of the ball around its initial value that each parameter is projected on after a step; None for
            no projection.
        seed: Of the generator that draws actions.

    Raises:
        ValueError: If a setting is out of range, or the network has no parameter that needs a gradient.

    Example:
        >>> agent = NeuralCB(nn.Linear(2, 3), lr=0.5)
        >>> contexts = torch.eye(2)
        >>> decision = agent.act(contexts)
        >>> loss = agent.update(contexts, decision.action, torch.tensor([0.0, 1.0]))
        >>> agent(contexts).shape
        torch.Size([2, 3])

    Source:
        Deb et al. 2024, arXiv 2312.07145, algorithms 1 and 2.
    """

    rounds: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        loss: Regression = "kl",
        weighting: Weighting | None = None,
        gamma: float | Callable[[int], float] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr: float = 0.1,
        radius: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.one_of(loss, "loss", ("kl", "square"))
        checks.one_of(weighting, "weighting", (None, "fast", "square"))
        checks.positive(lr, "lr")
        if radius is not None:
            checks.positive(radius, "radius")
        if gamma is not None and not callable(gamma):
            checks.non_negative(gamma, "gamma")
        learnt = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        if not learnt:
            raise ValueError("network must have a parameter that needs a gradient: there is nothing to learn")
        self.network = network
        self.loss = loss
        self.weighting = weighting or ("fast" if loss == "kl" else "square")
        self.gamma = gamma
        self.radius = radius
        self.optimizer = optimizer if optimizer is not None else torch.optim.SGD(learnt.values(), lr=lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64))
        self._projected = [] if radius is None else list(learnt)
        for number, name in enumerate(self._projected):
            self.register_buffer(f"centre_{number}", learnt[name].detach().clone())

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

    @torch.no_grad()
    def probabilities(self, contexts: Tensor) -> Float[Tensor, "batch actions"]:
        """Return the probabilities that :meth:`act` would draw actions by in the present round.

        Args:
            contexts: ``(batch, *)``, as the network takes them.
        """
        # Only here: clipped outputs would have no gradient to come back by.
        predicted = self(contexts).clamp(0, 1)
        return inverse_gap_weights(predicted, gamma=self._gamma(predicted.shape[-1]), kind=self.weighting)

    @torch.no_grad()
    def act(self, contexts: Tensor) -> Decision:
        """Draw an action for each context.

        Args:
            contexts: ``(batch, *)``, as the network takes them.
        """
        probabilities = self.probabilities(contexts)
        uniform = torch.rand(len(probabilities), 1, generator=self.generator, dtype=probabilities.dtype)
        total = probabilities.cumsum(-1)
        # Scaled to end at exactly 1, so that rounding never draws an action of probability 0.
        action = (total / total[:, -1:] <= uniform.to(total.device)).sum(-1)
        return Decision(action, probabilities.gather(-1, action[:, None]).squeeze(-1))

    @torch.enable_grad()
    def update(
        self, contexts: Tensor, action: Int[Tensor, " batch"], loss: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Take one gradient step on the losses of the actions taken, and project.

        Args:
            contexts: ``(batch, *)``, as given to :meth:`act`.
            action: The actions taken.
            loss: The losses they brought, in [0, 1].

        Returns:
            The regression loss before the step, detached.

        Raises:
            TypeError: If ``action`` holds no integers, or ``loss`` no floating-point numbers.
            ValueError: If shapes do not match, an action does not exist, or a loss lies outside [0, 1].
        """
        checks.tensor(action, "action")
        checks.floating(loss, "loss")
        if action.is_floating_point() or action.dtype == torch.bool:
            raise TypeError(f"action must have an integer dtype, got {action.dtype}")
        batch = (len(contexts),)
        if action.shape != batch or loss.shape != batch:
            raise ValueError(
                f"action and loss must have shape {batch}, as the batch of contexts; "
                f"got {tuple(action.shape)} and {tuple(loss.shape)}"
            )
        _check_unit(loss, "loss")
        outputs = self._outputs(contexts)
        actions = outputs.shape[-1]
        checks.require(
            (action >= 0) & (action < actions),
            lambda: f"action must lie in [0, {actions - 1}], got {int(action.min())} to {int(action.max())}",
        )
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

    def get_extra_state(self) -> Tensor:
        """Return the state of the generator, for ``state_dict``."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of the generator, for ``load_state_dict``.

        Args:
            state: What :meth:`get_extra_state` returned.
        """
        self.generator.set_state(state.cpu())

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"loss={self.loss!r}, weighting={self.weighting!r}, gamma={self.gamma}, radius={self.radius}"

    def _outputs(self, contexts: Tensor) -> Float[Tensor, "copies batch actions"]:
        outputs: Tensor = self.network(contexts)
        if not isinstance(self.network, PerturbedOutput):
            outputs = outputs[None]
        if outputs.dim() == 4 and outputs.shape[-1] == 1:
            outputs = outputs.squeeze(-1)
        if outputs.dim() != 3 or outputs.shape[1] != len(contexts) or outputs.shape[2] < 2:
            raise ValueError(
                f"network must give one output for each of at least 2 actions, (batch, actions) with the "
                f"batch of {len(contexts)} contexts, got {tuple(outputs.shape[1:])}"
            )
        checks.finite(outputs.detach(), "the network's output")
        return outputs

    def _gamma(self, actions: int) -> float:
        number = int(self.rounds) + 1
        if callable(self.gamma):
            return float(self.gamma(number))
        if self.gamma is not None:
            return float(self.gamma)
        growing = math.sqrt(actions * number)
        return max(10.0 * actions, growing) if self.weighting == "fast" else growing

    @torch.no_grad()
    def _project(self) -> None:
        if self.radius is None:
            return
        for number, name in enumerate(self._projected):
            parameter, centre = self.network.get_parameter(name), self.get_buffer(f"centre_{number}")
            parameter.copy_(centre + project_ball(parameter - centre, radius=self.radius))


def _check_unit(value: Tensor, name: str) -> None:
    checks.finite(value, name)
    checks.require(
        (value >= 0) & (value <= 1),
        lambda: f"{name} must lie in [0, 1], got values from {float(value.min())} to {float(value.max())}",
    )
