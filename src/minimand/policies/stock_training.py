"""Train a stock agent in any environment with gymnasium's ``reset`` and ``step``.

Source: Ávila Pires et al. 2025, arXiv 2501.13028; the schedule is that of Moghimi 2026, arXiv 2602.04131, shortened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .. import checks
from .expected_utility import ExpectedUtility
from .stock_agent import StockTransitions
from .stock_replay import FirstStocks, StockReplay


@runtime_checkable
class EpisodicEnvironment(Protocol):
    """What a training loop asks of an environment: gymnasium's interface, of which nothing else is used."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, Any]:
        """Begin an episode: the first observation, and what else there is to say."""
        ...

    def step(self, action: int) -> tuple[Any, Any, bool, bool, Any]:
        """Act: observation, reward, whether it has ended, whether it was cut off, and what else there is to say."""
        ...


@runtime_checkable
class StockLearner(Protocol):
    """What a training loop asks of an agent: a :class:`StockAgent`, or another that acts and learns alike."""

    network: nn.Module
    utility: ExpectedUtility
    discount: float

    def act(
        self, observation: Tensor, stock: float, *, epsilon: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Choose an action."""
        ...

    def loss(self, batch: StockTransitions) -> Tensor:
        """Compute what the network's parameters are to lower."""
        ...

    def update_target(self) -> None:
        """Move the target network to the network."""
        ...


@dataclasses.dataclass(frozen=True)
class StockTraining:
    """What training went through.

    Args:
        first_stocks: Of each finished episode, ``(episodes,)``.
        returns: Their returns, discounted, ``(episodes,)``.
        utilities: Of first stock plus return, ``(episodes,)``.
        losses: Of each update, ``(updates,)``.
    """

    first_stocks: Tensor
    returns: Tensor
    utilities: Tensor
    losses: Tensor


def as_features(observation: Any) -> Tensor:
    """Turn an observation of numbers into a tensor of float32."""
    return torch.as_tensor(observation, dtype=torch.float32)


def train_stock_agent(
    agent: StockLearner,
    environment: EpisodicEnvironment,
    *,
    first_stock: tuple[float, float],
    num_steps: int,
    edit_stocks: bool = False,
    observe: Callable[[Any], Tensor] = as_features,
    optimizer: torch.optim.Optimizer | None = None,
    batch_size: int = 128,
    capacity: int = 100_000,
    learning_starts: int = 1_000,
    update_every: int = 4,
    target_every: int = 100,
    epsilon: tuple[float, float] = (1.0, 0.05),
    seed: int = 0,
) -> StockTraining:
    """Let the agent act, keep what it sees, and regress its quantiles on what followed.

    Every episode begins with a first stock drawn evenly from a range, and with ``edit_stocks`` so does every transition
    replayed. A share of the actions is drawn at random; it falls in a line over the first half of the steps.

    Args:
        agent: Trained in place: a :class:`StockAgent`, or what has its ``act``, ``loss`` and ``update_target``.
        environment: With gymnasium's ``reset`` and ``step``; actions are integers from 0.
        first_stock: The lowest and highest first stock; equal for a single one, of which only a single objective,
            such as one target, is learnt.
        num_steps: Steps in the environment.
        edit_stocks: Whether transitions are replayed with other stocks than they were seen with. Off in the paper;
            where episodes already begin anywhere in the range it was of no use in our study.
        observe: Turns an observation of the environment into a tensor of fixed shape.
        optimizer: Of ``agent.network``'s parameters; None for Adam with a step of 1e-3.
        batch_size: Transitions an update.
        capacity: Of the replay.
        learning_starts: Steps before the first update.
        update_every: Steps for each update.
        target_every: Updates for each copy of the network to the target network.
        epsilon: The share of random actions at first and at last.
        seed: Of the environment and of all draws.

    Returns:
        What each episode brought, and the losses.

    Raises:
        ValueError: If a number is out of range, or the environment pays what is not finite.

    Example:
        >>> from minimand.policies import (
        ...     ExpectedUtility, MDPEnvironment, StockAgent, StockMDP, StockQuantileNetwork
        ... )
        >>> mdp = StockMDP(torch.ones(1, 2, 1), torch.tensor([1.0, -1.0]).view(1, 2, 1), discount=1.0)
        >>> agent = StockAgent(StockQuantileNetwork(2, 2, num_quantiles=4), ExpectedUtility.target(), discount=1.0)
        >>> environment = MDPEnvironment(mdp, 0, horizon=3)
        >>> training = train_stock_agent(agent, environment, first_stock=(-3.0, 3.0), num_steps=30, learning_starts=20)
        >>> len(training.returns), len(training.losses)
        (10, 2)

    Source:
        Ávila Pires et al. 2025, arXiv 2501.13028; Moghimi 2026, arXiv 2602.04131.
    """
    low, high = first_stock
    for value, name in ((num_steps, "num_steps"), (update_every, "update_every"), (target_every, "target_every")):
        checks.positive(value, name)
    if not low <= high:
        raise ValueError(f"first_stock must hold a lowest and a highest stock, got {first_stock}")
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or torch.optim.Adam(agent.network.parameters(), lr=1e-3)
    replay = StockReplay(capacity, discount=agent.discount)

    def draw(count: int, generator: torch.Generator | None) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    edited: FirstStocks | None = draw if edit_stocks else None
    finished: list[tuple[float, float]] = []
    losses: list[Tensor] = []
    episode = _Episode(environment, observe, float(draw(1, generator)), seed=seed)
    for count in range(num_steps):
        share = min(2 * count / num_steps, 1.0)
        action = agent.act(
            episode.observation,
            episode.stock,
            epsilon=epsilon[0] + share * (epsilon[1] - epsilon[0]),
            generator=generator,
        )
        if episode.step(int(action), agent.discount, replay):
            finished.append((episode.first_stock, episode.earned))
            episode = _Episode(environment, observe, float(draw(1, generator)), seed=None)
        if count + 1 > learning_starts and (count + 1) % update_every == 0:
            loss = agent.loss(replay.sample(batch_size, first_stock=edited, generator=generator))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if len(losses) % target_every == 0:
                agent.update_target()
    first, returns = torch.tensor(finished, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return StockTraining(
        first_stocks=first,
        returns=returns,
        utilities=agent.utility(first + returns),
        losses=torch.stack(losses) if losses else torch.zeros(0),
    )


class _Episode:
    """An episode in progress, with its stock."""

    def __init__(
        self,
        environment: EpisodicEnvironment,
        observe: Callable[[Any], Tensor],
        first_stock: float,
        *,
        seed: int | None,
    ) -> None:
        self.environment, self.observe = environment, observe
        observation, _ = environment.reset(seed=seed)
        self.observation = observe(observation)
        self.first_stock = self.stock = first_stock
        self.steps, self.earned = 0, 0.0

    def step(self, action: int, discount: float, replay: StockReplay) -> bool:
        """Act, keep the transition, and tell whether the episode is over."""
        observation, reward, terminated, truncated, _ = self.environment.step(action)
        following, reward = self.observe(observation), float(reward)
        replay.add(
            self.observation,
            action=action,
            reward=reward,
            next_observation=following,
            terminal=bool(terminated),
            stock=self.stock,
            first_stock=self.first_stock,
            step=self.steps,
        )
        self.earned += discount**self.steps * reward
        self.observation, self.stock, self.steps = following, (self.stock + reward) / discount, self.steps + 1
        return bool(terminated or truncated)
