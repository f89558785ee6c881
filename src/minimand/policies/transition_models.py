r"""Models of what follows a state and an action, learnt from logged transitions, to plan in.

- Nearest neighbour: what followed the logged pair :math:`(s_i, a_i)` nearest to :math:`(s, a)`, each feature scaled to
  [-1, 1]. It only ever answers what was lived, and says of pairs far away that they are like the nearest.
- Regression: ridge regression of :math:`s' - s`, rewards and costs on the monomials of :math:`(s, a)` up to a degree.
  It goes on beyond the log, right or wrong.

Both take any :math:`(s, a)` and never say that they do not know; that is what a guardian is for.

Source: Yan, Shen, Wachi, Gros, Zhao and Hu 2025, arXiv 2505.16242, whose official code plans in a nearest-neighbour
model; Hoerl and Kennard 1970 (ridge regression).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checks
from .features import feature_limits, monomials, pair_rows
from .transitions import Transitions

# From observation, action and next observation to rewards ``(batch,)`` or costs ``(batch, costs)``.
Known = Callable[[Tensor, Tensor, Tensor], Tensor]

_PAIRS_AT_ONCE = 2**22


class Predicted(NamedTuple):
    """What a model says follows.

    Args:
        next_observation: ``(batch, n)``.
        reward: ``(batch,)``.
        cost: ``(batch, costs)``, with no columns where nothing is constrained.
        terminated: Whether the process ends there, ``(batch,)``.
    """

    next_observation: Tensor
    reward: Tensor
    cost: Tensor
    terminated: Tensor


class TransitionModel(nn.Module, abc.ABC):
    """What every model of transitions answers: ``model(observation, action)`` is a :class:`Predicted`."""

    @abc.abstractmethod
    def fit(self, transitions: Transitions) -> TransitionModel:
        """Learn from logged transitions.

        Args:
            transitions: The log; its actions vectors, or numbers of choices.
        """

    @abc.abstractmethod
    def forward(
        self, observation: Float[Tensor, "batch n"], action: Float[Tensor, "batch m"] | Int[Tensor, " batch"]
    ) -> Predicted:
        """Predict what follows.

        Args:
            observation: Of the states.
            action: Of the kind that was logged.
        """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The buffers' sizes are the log's: an unfitted model takes those of the checkpoint.
        for name, buffer in self.named_buffers(recurse=False):
            if isinstance(saved := state_dict.get(prefix + name), Tensor):
                setattr(self, name, torch.empty_like(saved, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class NearestNeighborModel(TransitionModel):
    """Predict what followed the nearest logged state and action.

    A prediction is a row of the log as it is: next observation, reward, costs and end belong together. There is no
    gradient. A choice of k is one feature a choice, so that another choice is farther than half of any range.

    Args:
        num_actions: How many choices there are; None where actions are vectors.

    Example:
        >>> from minimand.policies import Transitions
        >>> end = torch.tensor([False, True])
        >>> log = Transitions(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]), torch.tensor([3.0, 4.0]),
        ...                   torch.tensor([[1.0], [2.0]]), end, torch.zeros(2, dtype=torch.bool))
        >>> model = NearestNeighborModel().fit(log)
        >>> model(torch.tensor([[0.2]]), torch.tensor([[0.1]])).next_observation
        tensor([[1.]])

    Source:
        Yan et al. 2025, arXiv 2505.16242: the official code's model, with its rows kept in step.
    """

    keys: Tensor
    center: Tensor
    half_range: Tensor
    next_observation: Tensor
    reward: Tensor
    cost: Tensor
    terminated: Tensor

    def __init__(self, *, num_actions: int | None = None) -> None:
        super().__init__()
        _check_choices(num_actions)
        self.num_actions = num_actions
        for name in ("keys", "next_observation", "cost"):
            self.register_buffer(name, torch.empty(0, 0))
        for name in ("center", "half_range", "reward"):
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("terminated", torch.empty(0, dtype=torch.bool))

    @torch.no_grad()
    def fit(self, transitions: Transitions) -> NearestNeighborModel:
        """Keep the log.

        Args:
            transitions: The log.
        """
        rows = pair_rows(transitions.observation, transitions.action, num_actions=self.num_actions)
        self.center, self.half_range = feature_limits(rows)
        self.keys = (rows - self.center) / self.half_range
        self.next_observation, self.reward = transitions.next_observation, transitions.reward
        self.cost, self.terminated = _costs(transitions), transitions.terminated
        return self

    @torch.no_grad()
    def nearest(
        self, observation: Float[Tensor, "batch n"], action: Float[Tensor, "batch m"] | Int[Tensor, " batch"]
    ) -> Int[Tensor, " batch"]:
        """Return which logged transitions are nearest.

        Args:
            observation: Of the states.
            action: Of the kind that was logged.
        """
        rows = pair_rows(observation, action, num_actions=self.num_actions)
        _check_width(rows, len(self.center))
        scaled = (rows.to(self.keys) - self.center) / self.half_range
        offset = 0.5 * self.keys.square().sum(1)
        chunks = scaled.split(max(_PAIRS_AT_ONCE // len(self.keys), 1))
        return torch.cat([torch.addmm(offset, part, self.keys.mT, alpha=-1).argmin(1) for part in chunks])

    def forward(
        self, observation: Float[Tensor, "batch n"], action: Float[Tensor, "batch m"] | Int[Tensor, " batch"]
    ) -> Predicted:
        """Predict what follows.

        Args:
            observation: Of the states.
            action: Of the kind that was logged.
        """
        index = self.nearest(observation, action)
        return Predicted(self.next_observation[index], self.reward[index], self.cost[index], self.terminated[index])

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"num_actions={self.num_actions}"


class RegressionModel(TransitionModel):
    r"""Predict changes of the state, rewards and costs by ridge regression on monomials.

    Predictions are means, and the process never ends in them: for tasks of a fixed horizon.

    Args:
        degree: Of the monomials, at least 1; 2 in our study.
        regularization: Of the weights of all monomials but the constant, at least 0, per logged transition.
        reward: Rewards as a function of observation, action and next observation where it is known; None to learn it.
        cost: Costs ``(batch, costs)`` likewise: limits of what is observed are known, and hardly learnt by monomials.
        num_actions: How many choices there are; None where actions are vectors.

    Example:
        >>> from minimand.policies import Transitions
        >>> state = torch.linspace(-1, 1, 9)[:, None]
        >>> log = Transitions(state, state.cos(), state[:, 0], 2 * state, torch.zeros(9, dtype=torch.bool),
        ...                   torch.ones(9, dtype=torch.bool))
        >>> model = RegressionModel(1, regularization=0.0).fit(log)
        >>> round(model(torch.tensor([[5.0]]), torch.tensor([[0.3]])).next_observation.item(), 4)
        10.0

    Source:
        Hoerl and Kennard, "Ridge regression", Technometrics 12, 1970.
    """

    weight: Tensor
    center: Tensor
    half_range: Tensor

    def __init__(
        self,
        degree: int = 2,
        *,
        regularization: float = 1e-6,
        reward: Known | None = None,
        cost: Known | None = None,
        num_actions: int | None = None,
    ) -> None:
        super().__init__()
        if degree < 1:
            raise ValueError(f"degree must be at least 1, got {degree}")
        checks.non_negative(regularization, "regularization")
        _check_choices(num_actions)
        self.degree, self.regularization, self.num_actions = degree, regularization, num_actions
        self.known_reward, self.known_cost = reward, cost
        self.register_buffer("weight", torch.empty(0, 0))
        self.register_buffer("center", torch.empty(0))
        self.register_buffer("half_range", torch.empty(0))

    @torch.no_grad()
    def fit(self, transitions: Transitions) -> RegressionModel:
        """Fit the weights.

        Args:
            transitions: The log.

        Raises:
            ValueError: If an episode of it terminates, which this model cannot foresee, or there are fewer
                transitions than monomials and nothing regularises.
        """
        if bool(transitions.terminated.any()):
            raise ValueError(
                "transitions must be of a fixed horizon: some are terminated, which this model cannot foresee"
            )
        rows = pair_rows(transitions.observation, transitions.action, num_actions=self.num_actions)
        self.center, self.half_range = feature_limits(rows)
        # In double precision, as normal equations square the condition number.
        z = monomials((rows.double() - self.center) / self.half_range, degree=self.degree)
        change = transitions.next_observation - transitions.observation
        targets = torch.cat([change, transitions.reward[:, None], _costs(transitions)], 1).double()
        penalty = torch.full_like(z[0], self.regularization * len(z))
        penalty[0] = 0
        factor, failed = torch.linalg.cholesky_ex(z.mT @ z + penalty.diag())
        if bool(failed) or float(factor.diagonal().min()) < 1e-7 * float(factor.diagonal().max()):
            raise ValueError(
                f"regularization {self.regularization} leaves the weights of {z.shape[1]} monomials undetermined by "
                f"{len(z)} transitions: raise it, or lower the degree"
            )
        self.weight = torch.cholesky_solve(z.mT @ targets, factor).to(rows)
        return self

    def forward(
        self, observation: Float[Tensor, "batch n"], action: Float[Tensor, "batch m"] | Int[Tensor, " batch"]
    ) -> Predicted:
        """Predict what follows.

        Args:
            observation: Of the states.
            action: Of the kind that was logged.
        """
        rows = pair_rows(observation, action, num_actions=self.num_actions)
        _check_width(rows, len(self.center))
        scaled = (rows.to(self.weight) - self.center) / self.half_range
        found = monomials(scaled, degree=self.degree) @ self.weight
        size = observation.shape[1]
        following, reward, cost = observation + found[:, :size], found[:, size], found[:, size + 1 :]
        if self.known_reward is not None:
            reward = self.known_reward(observation, action, following)
        if self.known_cost is not None:
            cost = self.known_cost(observation, action, following)
        return Predicted(following, reward, cost, torch.zeros_like(reward, dtype=torch.bool))

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"degree={self.degree}, regularization={self.regularization}, num_actions={self.num_actions}"


def _costs(transitions: Transitions) -> Tensor:
    return transitions.reward.new_zeros(len(transitions), 0) if transitions.cost is None else transitions.cost


def _check_width(rows: Tensor, features: int) -> None:
    if rows.shape[1] != features:
        raise ValueError(f"observation and action must have {features} features together, got {rows.shape[1]}")


def _check_choices(num_actions: int | None) -> None:
    if num_actions is not None and num_actions < 2:
        raise ValueError(f"num_actions must be at least 2 or None, got {num_actions}")
