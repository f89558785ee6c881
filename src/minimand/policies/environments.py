"""Environments to act in: gymnasium's by name, one of them many at once, and what a policy is worth there."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .pendulum import Pendulum
from .transitions import Transitions

# Episodes that no time limit ends are cut off with an error, not left to run for ever.
_MOST_STEPS = 10_000


@runtime_checkable
class Environment(Protocol):
    """A process to act in: its sizes and bounds, and episodes lived by a policy."""

    @property
    def observation_dim(self) -> int:
        """Width of an observation."""
        ...

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        ...

    @property
    def low(self) -> Tensor:
        """Least action, shape ``(m,)``."""
        ...

    @property
    def high(self) -> Tensor:
        """Largest action, shape ``(m,)``."""
        ...

    def record(self, act: Callable[[Tensor], Tensor], *, episodes: int, seed: int = 0) -> Transitions:
        """Live whole episodes in which ``act`` maps observations ``(B, n)`` to actions ``(B, m)``."""
        ...


@dataclasses.dataclass(frozen=True)
class GymnasiumEnvironment:
    """Live episodes of a gymnasium environment with continuous actions, several at a time.

    ``info["cost"]``, as safe environments give it, becomes the transitions' cost.

    Args:
        name: Its id, such as ``"Hopper-v5"``.
        make: Builds one; see :func:`make_environment`.
    """

    name: str
    make: Callable[[], Any]

    def __post_init__(self) -> None:
        from gymnasium.spaces import Box

        one = self.make()
        try:
            spaces = one.observation_space, one.action_space
        finally:
            one.close()
        if not isinstance(spaces[1], Box):
            raise TypeError(f"{self.name} has discrete actions ({spaces[1]}); these methods want continuous ones")
        if not isinstance(spaces[0], Box) or len(spaces[0].shape) != 1 or len(spaces[1].shape) != 1:
            raise TypeError(f"{self.name} must give and take vectors, got {spaces[0]} and {spaces[1]}")
        if not (np.isfinite(spaces[1].low).all() and np.isfinite(spaces[1].high).all()):
            raise ValueError(f"{self.name} has unbounded actions: {spaces[1]}")
        object.__setattr__(self, "_spaces", spaces)

    @property
    def observation_dim(self) -> int:
        """Width of an observation."""
        return self._spaces[0].shape[0]  # type: ignore[attr-defined]

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return self._spaces[1].shape[0]  # type: ignore[attr-defined]

    @property
    def low(self) -> Tensor:
        """Least action, shape ``(m,)``."""
        return torch.as_tensor(self._spaces[1].low, dtype=torch.float32)  # type: ignore[attr-defined]

    @property
    def high(self) -> Tensor:
        """Largest action, shape ``(m,)``."""
        return torch.as_tensor(self._spaces[1].high, dtype=torch.float32)  # type: ignore[attr-defined]

    @torch.no_grad()
    def record(self, act: Callable[[Tensor], Tensor], *, episodes: int, seed: int = 0) -> Transitions:
        """Live whole episodes, all side by side, so that the policy is asked once a step.

        Args:
            act: Maps observations ``(B, n)`` to actions ``(B, m)``; those outside the bounds are cut off.
            episodes: How many.
            seed: Episode ``i`` starts from seed ``seed + i``.

        Raises:
            ValueError: If the environment gives what is not finite, or an episode does not end.
        """
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        worlds = [self.make() for _ in range(episodes)]
        lived: list[list[tuple[Any, ...]]] = [[] for _ in worlds]
        low, high = self.low, self.high
        try:
            seen = [world.reset(seed=seed + place)[0] for place, world in enumerate(worlds)]
            alive = list(range(episodes))
            while alive:
                if len(lived[alive[0]]) >= _MOST_STEPS:
                    raise ValueError(
                        f"an episode of {self.name} did not end in {_MOST_STEPS:,} steps: give a time limit"
                    )
                now = torch.as_tensor(np.stack([seen[place] for place in alive]), dtype=torch.float32)
                actions = act(now).to(low).clamp(low, high)
                for place, action in zip(list(alive), actions, strict=True):
                    following, reward, terminated, truncated, info = worlds[place].step(action.numpy())
                    row = (seen[place], action.numpy(), reward, following, terminated, truncated, info.get("cost"))
                    lived[place].append(row)
                    seen[place] = following
                    if terminated or truncated:
                        alive.remove(place)
        finally:
            for world in worlds:
                world.close()
        columns = list(zip(*(row for episode in lived for row in episode), strict=True))
        numbers = [torch.as_tensor(np.stack(column), dtype=torch.float32) for column in columns[:4]]
        flags = [torch.as_tensor(np.asarray(column, dtype=bool)) for column in columns[4:6]]
        cost = None
        if columns[6][0] is not None:
            cost = torch.as_tensor(np.asarray(columns[6], dtype=np.float32)).reshape(len(numbers[0]), -1)
        seen_rows, action_rows, reward_rows, following_rows = numbers
        return Transitions(seen_rows, action_rows, reward_rows, following_rows, flags[0], flags[1], cost)


def make_environment(name: str) -> Environment:
    """Find an environment by its gymnasium id.

    Args:
        name: Such as ``"Hopper-v5"``. ``"Pendulum-v1"`` needs no package: it is :class:`Pendulum`, many at once.

    Raises:
        ImportError: If gymnasium, or what the environment runs on, is not installed; says which extra to install.
        ValueError: If there is no such environment, or its actions have no bounds.
        TypeError: If its actions are choices, or it gives no vectors.

    Example:
        >>> make_environment("Pendulum-v1").action_dim
        1

    Source: M. Towers et al., "Gymnasium: a standard interface for reinforcement learning environments" (2024,
    arXiv 2407.17032).
    """
    if name == "Pendulum-v1":
        return Pendulum()
    hint = 'pip install "minimand[policies]"'
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(f"{name} needs gymnasium: {hint}") from error

    def make() -> Any:
        return gymnasium.make(name)

    try:
        return GymnasiumEnvironment(name, make)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"{name} needs a package that is not installed ({error}): {hint}") from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        near = difflib.get_close_matches(name, list(gymnasium.registry), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no environment {name!r}{meant} ({error})") from error


def require_fits(log: Transitions, environment: Environment, name: str) -> None:
    """Refuse a log that cannot be of an environment: other widths, or observations and actions it does not know.

    Raises:
        ValueError: Saying what differs.
        TypeError: If the log's actions are choices.
    """
    if not log.continuous:
        raise TypeError(f"the data's actions are choices, and {name} takes continuous ones")
    widths = log.observation.shape[1], log.action.shape[1]
    if widths != (environment.observation_dim, environment.action_dim):
        raise ValueError(
            f"the data have {widths[0]} observation and {widths[1]} action numbers, {name} has "
            f"{environment.observation_dim} and {environment.action_dim}: another environment?"
        )
    space = getattr(environment, "_spaces", (None,))[0]
    bounds = (space.low, space.high) if space is not None else ([-1, -1, -8], [1, 1, 8])
    low, high = (torch.as_tensor(np.asarray(bound), dtype=torch.float32) for bound in bounds)
    slack = 1e-3
    outside = ((log.observation < low - slack) | (log.observation > high + slack)).any(1)
    if bool(outside.any()):
        raise ValueError(f"{int(outside.sum()):,} observations lie outside the space of {name}")
    slack_action = 1e-4 * (environment.high - environment.low)
    outside = ((log.action < environment.low - slack_action) | (log.action > environment.high + slack_action)).any(1)
    if bool(outside.any()):
        raise ValueError(f"{int(outside.sum()):,} actions lie outside what {name} takes")
