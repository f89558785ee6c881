"""Environments that pay a reward for each of several objectives, many episodes at a time.

Source: the interface is that of gymnasium (Towers et al. 2024, arXiv 2407.17032) and mo-gymnasium (Felten et al.,
NeurIPS 2023), with tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


class VectorStep(NamedTuple):
    """What a step of every episode led to.

    Attributes:
        observation: What to act on next: of a new episode wherever one is over.
        rewards: Of each objective.
        terminated: Whether an episode reached its end, after which nothing more can be earned.
        truncated: Whether one was cut off by a limit of time.
        last: The observation that the step led to, before any new episode began.
    """

    observation: Float[Tensor, "episodes features"]
    rewards: Float[Tensor, "episodes objectives"]
    terminated: Bool[Tensor, " episodes"]
    truncated: Bool[Tensor, " episodes"]
    last: Float[Tensor, "episodes features"]


@runtime_checkable
class VectorEnvironment(Protocol):
    """Episodes that go on side by side; one that is over begins anew in the same step.

    Attributes:
        num_episodes: How many.
        observation_size: Features of an observation.
        num_objectives: Rewards a step.
        action_size: Number of actions if they are discrete, else entries of an action, of which those in [-1, 1] are
            meant to be used.
        discrete: Whether an action is an index.
    """

    num_episodes: int
    observation_size: int
    num_objectives: int
    action_size: int
    discrete: bool

    def reset(self) -> Tensor:
        """Begin all episodes and return their observations ``(episodes, features)``."""
        ...

    def step(self, action: Tensor) -> VectorStep:
        """Act in every episode: ``(episodes,)`` indices or ``(episodes, action)`` numbers."""
        ...


MakeEnvironment = Callable[[int, int], VectorEnvironment]


class GymEpisodes:
    """Play several copies of one environment with gymnasium's interface and a vector of rewards.

    Args:
        make: What makes an environment, or its name in mo-gymnasium, which ``pip install "minimand[policies]"`` brings.
            It has ``reset(seed=...)``, ``step(action)`` and ``action_space``; observations are flattened, and those of
            a discrete space become indicators.
        num_episodes: How many copies.
        seed: Of the first copy; those that follow have the numbers that follow.
        num_objectives: Rewards a step; None asks the environment's ``reward_space``.

    Raises:
        ImportError: If a name was given and mo-gymnasium is not installed.
        ValueError: If the action space is neither discrete nor a bounded box.

    Example:
        >>> class Coin:
        ...     class action_space:
        ...         n = 2
        ...     def reset(self, *, seed=None):
        ...         return [0.0], {}
        ...     def step(self, action):
        ...         return [1.0], [action, 1 - action], True, False, {}
        >>> episodes = GymEpisodes(Coin, num_episodes=2, num_objectives=2)
        >>> episodes.reset()
        tensor([[0.],
                [0.]])
        >>> episodes.step(torch.tensor([0, 1])).rewards
        tensor([[0., 1.],
                [1., 0.]])

    Source:
        Felten et al., "A Toolkit for Reliable Benchmarking and Research in Multi-Objective RL", NeurIPS 2023.
    """

    def __init__(
        self, make: str | Callable[[], Any], *, num_episodes: int, seed: int = 0, num_objectives: int | None = None
    ) -> None:
        if num_episodes < 1:
            raise ValueError(f"num_episodes must be at least 1, got {num_episodes}")
        if isinstance(make, str):
            name, library = make, mo_gymnasium()
            environments = [library.make(name) for _ in range(num_episodes)]
        else:
            environments = [make() for _ in range(num_episodes)]
        self._environments = environments
        self._seed = seed
        first = environments[0]
        self.num_episodes = num_episodes
        space = first.action_space
        self.discrete = hasattr(space, "n")
        if not self.discrete and not (hasattr(space, "low") and np.isfinite([space.low, space.high]).all()):
            raise ValueError(f"make must give an environment with discrete or bounded actions, got {space}")
        self.action_size = int(space.n) if self.discrete else int(np.prod(space.shape))
        self._indicators = getattr(getattr(first, "observation_space", None), "n", None)
        self._begun = False
        self.observation_size = len(self._read(first.reset(seed=seed)[0]))
        if num_objectives is None:
            rewards = getattr(getattr(first, "unwrapped", first), "reward_space", None)
            if rewards is None:
                raise ValueError("num_objectives is required: the environment has no reward_space")
            num_objectives = int(np.prod(rewards.shape))
        self.num_objectives = num_objectives

    def reset(self) -> Float[Tensor, "episodes features"]:
        """Begin all episodes; the seeds are used the first time only, as gymnasium wants it."""
        seeds = [None if self._begun else self._seed + i for i in range(self.num_episodes)]
        self._begun = True
        return _stack(
            [self._read(env.reset(seed=seed)[0]) for env, seed in zip(self._environments, seeds, strict=True)]
        )

    def step(self, action: Tensor) -> VectorStep:
        """Act in every episode.

        Args:
            action: Indices ``(episodes,)``, or numbers ``(episodes, action)``, which are cut to [-1, 1] and stretched
                to the bounds of the box.
        """
        observations, last, rewards, terminated, truncated = [], [], [], [], []
        for env, each in zip(self._environments, action.detach().cpu().numpy(), strict=True):
            seen, reward, over, cut, _ = env.step(int(each) if self.discrete else self._stretch(env.action_space, each))
            last.append(self._read(seen))
            observations.append(self._read(env.reset()[0]) if over or cut else last[-1])
            rewards.append(np.asarray(reward, np.float32))
            terminated.append(bool(over))
            truncated.append(bool(cut) and not over)
        if rewards[0].shape != (self.num_objectives,):
            raise ValueError(f"the environment must pay {self.num_objectives} rewards a step, got {rewards[0].shape}")
        return VectorStep(
            _stack(observations), _stack(rewards), torch.tensor(terminated), torch.tensor(truncated), _stack(last)
        )

    @staticmethod
    def _stretch(space: Any, action: np.ndarray) -> np.ndarray:
        share = (np.clip(action.reshape(space.shape), -1, 1) + 1) / 2
        return (space.low + share * (space.high - space.low)).astype(space.dtype)

    def _read(self, observation: Any) -> np.ndarray:
        if self._indicators is not None:
            return np.eye(int(self._indicators), dtype=np.float32)[int(observation)]
        return np.asarray(observation, np.float32).ravel()


def mo_gymnasium() -> Any:
    """Return the package mo-gymnasium, or say how to install it."""
    try:
        return importlib.import_module("mo_gymnasium")
    except ImportError as error:
        raise ImportError('environments by name need mo-gymnasium: pip install "minimand[policies]"') from error


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
