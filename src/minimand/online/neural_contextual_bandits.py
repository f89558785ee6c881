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
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from .bandit_agents import Decision, RandomDraws, check_unit
from .online_regression import OnlineRegressor, Regression

Weighting = Literal["fast", "square"]


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
        check_unit(predicted, "predicted")
        # Equals of a best action without loss have no gap, which 0 / 0 would not tell; the others have an infinite one.
        gap = torch.where(gap > 0, gap / least, gap).clamp_max(torch.finfo(gap.dtype).max)
    others = torch.reciprocal(predicted.shape[-1] + gamma * gap).scatter(-1, best, 0.0)
    return others.scatter(-1, best, 1 - others.sum(-1, keepdim=True))


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
        checks.one_of(weighting, "weighting", (None, "fast", "square"))
        if gamma is not None and not callable(gamma):
            checks.non_negative(gamma, "gamma")
        self.regressor = OnlineRegressor(network, loss=loss, optimizer=optimizer, lr=lr, radius=radius)
        self.weighting: Weighting = weighting or ("fast" if loss == "kl" else "square")
        self.gamma = gamma
        self.draws = RandomDraws(seed)

    def forward(self, contexts: Tensor) -> Float[Tensor, "batch actions"]:
        """Predict the loss of every action.

        Args:
            contexts: ``(batch, *)``, as the network takes them.

        Returns:
            Predicted losses: in [0, 1] for ``"kl"``, unbounded for ``"square"``.

        Raises:
            ValueError: If the network's output has another shape or is not finite.
        """
        predicted: Tensor = self.regressor(contexts)
        return predicted

    @torch.no_grad()
    def probabilities(self, contexts: Tensor) -> Float[Tensor, "batch actions"]:
        """Return the probabilities that :meth:`act` would draw actions by in the present round.

        Args:
            contexts: ``(batch, *)``, as the network takes them.
        """
        # Only here: clipped outputs would have no gradient to come back by.
        predicted = self(contexts).clamp(0, 1)
        return inverse_gap_weights(predicted, gamma=self._gamma(predicted.shape[-1]), kind=self.weighting)

    def act(self, contexts: Tensor) -> Decision:
        """Draw an action for each context.

        Args:
            contexts: ``(batch, *)``, as the network takes them.
        """
        return self.draws.actions(self.probabilities(contexts))

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
        return self.regressor.update(contexts, action, loss)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weighting={self.weighting!r}, gamma={self.gamma}"

    def _gamma(self, actions: int) -> float:
        number = self.regressor.next_round
        if callable(self.gamma):
            return float(self.gamma(number))
        if self.gamma is not None:
            return float(self.gamma)
        growing = math.sqrt(actions * number)
        return max(10.0 * actions, growing) if self.weighting == "fast" else growing
