"""Epsilon-greedy: mostly the action of least predicted loss, now and then any.

Source: Sutton and Barto, "Reinforcement Learning: An Introduction", 1998, section 2.2; with a network, as in Riquelme,
Tucker and Snoek 2018, arXiv 1802.09127.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from .bandit_agents import Decision, RandomDraws
from .online_regression import OnlineRegressor, Regression


class EpsilonGreedy(nn.Module):
    r"""A contextual bandit that takes the best action but for a share of rounds, in which it takes any.

    .. math:: p_a = \frac{\varepsilon}{K} \ (a \ne b), \qquad p_b = 1 - \varepsilon + \frac{\varepsilon}{K},

    with b the action of least predicted loss. The network learns exactly as that of :class:`NeuralCB`, so the two
    differ in how they explore alone.

    Args:
        network: As :class:`NeuralCB` takes it.
        epsilon: The share :math:`\varepsilon` of rounds that explore, in [0, 1], or a function from the round (1, 2,
            ...) to it. 0.1 is the field's habit; 0 is greedy.
        loss: What the network is trained by: ``"kl"`` or ``"square"``.
        optimizer: Of the network's parameters; plain SGD at ``lr`` by default.
        lr: Learning rate of the default optimizer.
        seed: Of the generator that draws actions.

    Raises:
        ValueError: If a setting is out of range, or the network has no parameter that needs a gradient.

    Example:
        >>> agent = EpsilonGreedy(nn.Linear(2, 3), epsilon=0.3)
        >>> contexts = torch.eye(2)
        >>> decision = agent.act(contexts)
        >>> loss = agent.update(contexts, decision.action, torch.tensor([0.0, 1.0]))
        >>> sorted(set(agent.probabilities(contexts).flatten().tolist()))
        [0.10000000149011612, 0.800000011920929]

    Source:
        Riquelme et al. 2018, arXiv 1802.09127, section 3.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        epsilon: float | Callable[[int], float] = 0.1,
        loss: Regression = "square",
        optimizer: torch.optim.Optimizer | None = None,
        lr: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not callable(epsilon):
            checks.between(epsilon, "epsilon", 0.0, 1.0)
        self.regressor = OnlineRegressor(network, loss=loss, optimizer=optimizer, lr=lr)
        self.epsilon = epsilon
        self.draws = RandomDraws(seed)

    def forward(self, contexts: Tensor) -> Float[Tensor, "batch actions"]:
        """Predict the loss of every action, as :class:`OnlineRegressor` does.

        Args:
            contexts: ``(batch, *)``, as the network takes them.
        """
        predicted: Tensor = self.regressor(contexts)
        return predicted

    @torch.no_grad()
    def probabilities(self, contexts: Tensor) -> Float[Tensor, "batch actions"]:
        """Return the probabilities that :meth:`act` would draw actions by in the present round.

        Args:
            contexts: ``(batch, *)``, as the network takes them.

        Raises:
            ValueError: If a function ``epsilon`` returns a number outside [0, 1].
        """
        predicted = self(contexts)
        epsilon = self.epsilon(self.regressor.next_round) if callable(self.epsilon) else self.epsilon
        checks.between(epsilon, "epsilon", 0.0, 1.0)
        even = epsilon / predicted.shape[-1]
        best = predicted.argmin(-1, keepdim=True)
        return torch.full_like(predicted, even).scatter(-1, best, 1 - epsilon + even)

    def act(self, contexts: Tensor) -> Decision:
        """Draw an action for each context.

        Args:
            contexts: ``(batch, *)``, as the network takes them.
        """
        return self.draws.actions(self.probabilities(contexts))

    def update(
        self, contexts: Tensor, action: Int[Tensor, " batch"], loss: Float[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Take one gradient step on the losses of the actions taken, as :meth:`OnlineRegressor.update` does.

        Args:
            contexts: ``(batch, *)``, as given to :meth:`act`.
            action: The actions taken.
            loss: The losses they brought, in [0, 1].
        """
        return self.regressor.update(contexts, action, loss)

    def extra_repr(self) -> str:
        """Show the setting."""
        return f"epsilon={self.epsilon}"
