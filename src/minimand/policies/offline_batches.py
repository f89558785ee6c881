"""A log made ready for learning: scaled, on one device, and drawn from in batches that depend on nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from .transitions import Transitions

# A standard deviation that is added to, so that a feature that never changes is not blown up (TD3+BC's constant).
_LEAST_DEVIATION = 1e-3
# Steps drawn at once: one call of a generator then serves many steps.
_CHUNK = 64


class Scaling(nn.Module):
    r"""Map observations to mean 0 and deviation 1, and actions to :math:`[-1, 1]` and back.

    .. math:: o \mapsto (o - \mu)/(\sigma + 10^{-3}), \qquad a \mapsto 2 (a - l)/(h - l) - 1

    Args:
        mean: Of the observations, shape ``(n,)``.
        deviation: Of the observations, shape ``(n,)``.
        low: Least action, shape ``(m,)``.
        high: Largest action, shape ``(m,)``.

    Example:
        >>> scaling = Scaling(torch.zeros(2), torch.ones(2), torch.tensor([-2.0]), torch.tensor([2.0]))
        >>> scaling.action_out(torch.tensor([[0.5]]))
        tensor([[1.]])

    Source: The observation scaling of S. Fujimoto and S. S. Gu, "A minimalist approach to offline reinforcement
    learning" (2021, arXiv 2106.06860), section 5.
    """

    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, low: Tensor, high: Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("deviation", deviation), ("low", low), ("high", high)):
            checks.floating(value, name)
            checks.finite(value, name)
            self.register_buffer(name, value.clone())
        checks.require(high > low, lambda: f"high must be above low, got low {low.tolist()} and high {high.tolist()}")

    @staticmethod
    def of(log: Transitions, *, low: Tensor | None = None, high: Tensor | None = None) -> Scaling:
        """Measure the scaling on a log.

        Args:
            log: Transitions with continuous actions.
            low: Least action the process takes, shape ``(m,)``; None takes the least in the log.
            high: Largest action; None takes the largest in the log.

        Raises:
            TypeError: If the actions are choices.
            ValueError: If an action lies outside the bounds, or never varies and no bounds are given.
        """
        require_continuous(log)
        least, most = log.action.amin(0), log.action.amax(0)
        low = least if low is None else low.to(log.action)
        high = most if high is None else high.to(log.action)
        if low.shape != least.shape or high.shape != least.shape:
            raise ValueError(f"bounds must have shape {tuple(least.shape)}, got {tuple(low.shape)} {tuple(high.shape)}")
        slack = 1e-4 * (high - low)
        checks.require(
            (least >= low - slack) & (most <= high + slack),
            lambda: f"actions lie in {least.tolist()} to {most.tolist()}, outside {low.tolist()} to {high.tolist()}",
        )
        mean, deviation = log.observation.mean(0), log.observation.std(0, correction=0)
        return Scaling(mean, deviation, low, high)

    def observation_in(self, observation: Tensor) -> Tensor:
        """Return observations as networks see them."""
        return (observation - self.mean) / (self.deviation + _LEAST_DEVIATION)

    def action_in(self, action: Tensor) -> Tensor:
        """Return actions as networks give them, cut off at -1 and 1."""
        return (2 * (action - self.low) / (self.high - self.low) - 1).clamp(-1, 1)

    def action_out(self, action: Tensor) -> Tensor:
        """Return a network's actions as the process takes them."""
        return self.low + (action + 1) * (self.high - self.low) / 2


def require_continuous(log: Transitions) -> None:
    """Refuse a log whose actions are choices."""
    if not log.continuous:
        raise TypeError(
            "the actions are choices (int64), and this method wants continuous actions: a floating array of shape "
            "(N, m)"
        )


class Batch(NamedTuple):
    """Transitions of one step, for each member its own; observations and actions are scaled.

    Args:
        observation: Shape ``(S, B, n)``.
        action: Shape ``(S, B, m)``, in [-1, 1].
        reward: Shape ``(S, B)``.
        next_observation: Shape ``(S, B, n)``.
        continues: 0 where the process ended, else 1, shape ``(S, B)``.
        noise: Standard normal numbers for whatever the method draws, shape ``(S, B, k)``: with them a step is a
            function of the learner and the batch alone.
        rows: Which rows of the log these are, shape ``(S, B)`` int64.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    continues: Tensor
    noise: Tensor
    rows: Tensor


@dataclasses.dataclass(frozen=True)
class ScaledLog:
    """A log as learners see it.

    Args:
        observation: Scaled, shape ``(N, n)``.
        action: In [-1, 1], shape ``(N, m)``.
        reward: Shifted and scaled as asked, shape ``(N,)``.
        next_observation: Scaled, shape ``(N, n)``.
        continues: 0 where the process ended, else 1, shape ``(N,)``.
        scaling: How observations and actions were scaled.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    continues: Tensor
    scaling: Scaling

    @staticmethod
    def of(
        log: Transitions,
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
        scaling: Scaling | None = None,
        reward_scale: float = 1.0,
    ) -> ScaledLog:
        """Scale a log.

        Args:
            log: Transitions with continuous actions.
            low: Least action the process takes, shape ``(m,)``; None takes the least in the log.
            high: Largest action; None takes the largest in the log.
            scaling: That of an earlier log, if a policy shall go on from there; None measures it on this one.
            reward_scale: Factor of the rewards. With rewards of about one a step most learning rates fit.
        """
        require_continuous(log)
        checks.positive(reward_scale, "reward_scale")
        scaling = Scaling.of(log, low=low, high=high) if scaling is None else scaling
        return ScaledLog(
            scaling.observation_in(log.observation),
            scaling.action_in(log.action),
            log.reward * reward_scale,
            scaling.observation_in(log.next_observation),
            (~log.terminated).to(log.reward),
            scaling,
        )

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def observation_dim(self) -> int:
        """Width of an observation."""
        return self.observation.shape[1]

    @property
    def action_dim(self) -> int:
        """Width of an action."""
        return self.action.shape[1]


class BatchStream:
    """Batches of a log drawn with replacement, for each member from its own generator.

    Member ``s`` of many draws what it would draw alone. :meth:`state` and :meth:`resume` let a run that was cut off go
    on with the very numbers it would have drawn.

    Args:
        log: What is drawn from.
        seeds: One a member.
        batch_size: Transitions a member and step.
        noise_width: Standard normal numbers a transition.
        pools: Rows that each member draws from, int64; None lets all draw from all.

    Example:
        >>> from minimand.policies import Pendulum
        >>> stream = BatchStream(ScaledLog.of(Pendulum().log("mixed", episodes=2)), seeds=(0, 1), batch_size=8)
        >>> next(stream).observation.shape
        torch.Size([2, 8, 3])

    Source: Uniform replay with replacement, as in S. Fujimoto and S. S. Gu (2021, arXiv 2106.06860).
    """

    def __init__(
        self,
        log: ScaledLog,
        *,
        seeds: Sequence[int],
        batch_size: int,
        noise_width: int = 0,
        pools: Sequence[Tensor] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if pools is not None and len(pools) != len(seeds):
            raise ValueError(f"pools must hold rows for each of {len(seeds)} members, got {len(pools)}")
        self.log, self.batch_size, self.noise_width = log, batch_size, noise_width
        self._pools = None if pools is None else [pool.cpu() for pool in pools]
        # Not the generators that the networks start from: those of equal seeds would give the same numbers.
        self._generators = [torch.Generator().manual_seed((seed + 1) * 0x9E3779B1 % (1 << 62)) for seed in seeds]
        parts = (log.observation, log.action, log.reward[:, None], log.next_observation, log.continues[:, None])
        self._widths = [part.shape[1] for part in parts]
        self._rows = torch.cat(parts, 1)
        self._begin()

    def _begin(self) -> None:
        self._states = torch.stack([generator.get_state() for generator in self._generators])
        shape = (_CHUNK, self.batch_size)
        if self._pools is None:
            index = [torch.randint(len(self.log), shape, generator=generator) for generator in self._generators]
        else:
            pairs = zip(self._pools, self._generators, strict=True)
            index = [pool[torch.randint(len(pool), shape, generator=generator)] for pool, generator in pairs]
        self._index = torch.stack(index, 1).to(self._rows.device)
        noise = [torch.randn((*shape, self.noise_width), generator=generator) for generator in self._generators]
        self._noise = torch.stack(noise, 1).to(self._rows)
        self._place = 0

    def __next__(self) -> Batch:
        """Return the next step's batch."""
        if self._place == _CHUNK:
            self._begin()
        index, noise = self._index[self._place], self._noise[self._place]
        self._place += 1
        rows = self._rows.index_select(0, index.view(-1)).view(*index.shape, -1)
        observation, action, reward, following, continues = rows.split(self._widths, -1)
        return Batch(observation, action, reward[..., 0], following, continues[..., 0], noise, index)

    def __iter__(self) -> BatchStream:
        return self

    def state(self) -> dict[str, Tensor]:
        """Return what :meth:`resume` needs to go on from here."""
        return {"generators": self._states.clone(), "place": torch.tensor(self._place)}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on from where :meth:`state` was taken."""
        if len(state["generators"]) != len(self._generators):
            raise ValueError(f"the state is of {len(state['generators'])} members, not {len(self._generators)}")
        for generator, numbers in zip(self._generators, state["generators"], strict=True):
            generator.set_state(numbers.clone())
        self._begin()
        self._place = int(state["place"])
