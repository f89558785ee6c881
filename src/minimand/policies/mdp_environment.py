"""A known process as an environment to be learnt in, with gymnasium's ``reset`` and ``step``."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .stock_augmented_distributional_dp import StockMDP


class MDPEnvironment:
    """Episodes of a finite process: observed are the state, one-hot, and the share of the horizon that is left.

    Args:
        mdp: The process; its rewards must be numbers.
        state: The first state.
        horizon: Steps after which an episode ends, as in :meth:`StockMDP.value_iteration`: nothing follows, so the step
            is terminal.

    Raises:
        ValueError: If the state is none, the horizon is below 1, or rewards are vectors.

    Example:
        >>> mdp = StockMDP(torch.ones(1, 2, 1), torch.tensor([1.0, -1.0]).view(1, 2, 1), discount=1.0)
        >>> environment = MDPEnvironment(mdp, 0, horizon=4)
        >>> environment.reset(seed=0)
        (tensor([1., 1.]), {})
        >>> environment.step(1)
        (tensor([1.0000, 0.7500]), -1.0, False, False, {})

    Source:
        The interface is that of Towers et al. 2024, "Gymnasium", arXiv 2407.17032.
    """

    def __init__(self, mdp: StockMDP, state: int, *, horizon: int) -> None:
        if mdp.num_rewards is not None:
            raise ValueError(f"mdp must pay numbers, got rewards of {mdp.num_rewards} entries")
        if not 0 <= state < len(mdp.transition):
            raise ValueError(f"state must lie in [0, {len(mdp.transition) - 1}], got {state}")
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        self.num_features = len(mdp.transition) + 1
        self.num_actions = mdp.transition.shape[1]
        self.horizon = horizon
        self._first = state
        self._cumulative = mdp.transition.double().cumsum(-1).cpu()
        self._reward = mdp.reward.tolist()
        self._ends = mdp.ends.tolist()
        self._generator = torch.Generator()
        self._state = self._steps = 0

    def observe(self, step: int, state: Tensor) -> Float[Tensor, "batch features"]:
        """Return what is observed of states at a step.

        Args:
            step: Steps taken since the start.
            state: Indices of states, ``(batch,)``.
        """
        left = torch.full((len(state), 1), 1 - step / self.horizon)
        return torch.cat([torch.nn.functional.one_hot(state, self.num_features - 1).to(left), left], dim=1)

    def reset(self, *, seed: int | None = None) -> tuple[Float[Tensor, " features"], dict[str, object]]:
        """Begin an episode.

        Args:
            seed: Begins the stream of draws anew; None goes on with it.

        Returns:
            The observation, and nothing else to say.
        """
        if seed is not None:
            self._generator.manual_seed(seed)
        self._state, self._steps = self._first, 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[Float[Tensor, " features"], float, bool, bool, dict[str, object]]:
        """Act.

        Args:
            action: An index.

        Returns:
            The observation, the reward, whether the episode has ended, that it is never cut off, and nothing else.

        Raises:
            ValueError: If there is no such action, or the episode has ended.
        """
        if not 0 <= action < self.num_actions:
            raise ValueError(f"action must lie in [0, {self.num_actions - 1}], got {action}")
        if self._steps >= self.horizon or self._ends[self._state]:
            raise ValueError("the episode has ended: reset the environment")
        row = self._cumulative[self._state, action]
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * row[-1]
        following = int(torch.searchsorted(row, drawn, right=True))
        reward = self._reward[self._state][action][following]
        self._state, self._steps = following, self._steps + 1
        ended = self._steps >= self.horizon or self._ends[following]
        return self._observation(), reward, ended, False, {}

    def _observation(self) -> Tensor:
        return self.observe(self._steps, torch.tensor([self._state]))[0]
