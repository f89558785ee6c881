"""A pendulum to swing up: gymnasium's Pendulum-v1, many at once, with behaviour of graded quality."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import checks
from .transitions import Transitions

_GRAVITY, _STEP, _LARGEST_SPEED, _LARGEST_TORQUE = 10.0, 0.05, 8.0, 2.0
# Episodes in a hundred that the controller, not chance, acts in.
QUALITIES = {"random": 0.0, "mixed": 0.05, "medium": 0.5, "expert": 1.0}


class Pendulum:
    r"""Swing pendulums up and hold them, each by a torque of at most 2.

    :math:`\ddot\theta = 15\sin\theta + 3u` in steps of 0.05 s, :math:`|\dot\theta| \le 8`; the reward is
    :math:`-(\theta^2 + 0.1\dot\theta^2 + 0.001u^2)` with :math:`\theta \in [-\pi, \pi)` measured from upright, before
    the step. An episode is 200 steps, then it is truncated.

    Args:
        episode_steps: Steps an episode.
        device: Where the pendulums live.

    Example:
        >>> pendulum = Pendulum()
        >>> observation = pendulum.reset(4, seed=0)
        >>> observation, reward = pendulum.step(torch.zeros(4, 1))
        >>> observation.shape, reward.shape
        (torch.Size([4, 3]), torch.Size([4]))

    Source: The equations of gymnasium's ``Pendulum-v1``.
    """

    observation_dim, action_dim = 3, 1

    def __init__(self, *, episode_steps: int = 200, device: torch.device | str = "cpu") -> None:
        if episode_steps < 1:
            raise ValueError(f"episode_steps must be at least 1, got {episode_steps}")
        self.episode_steps, self.device = episode_steps, torch.device(device)
        self.angle = self.speed = torch.zeros(0, device=self.device)

    @property
    def low(self) -> Tensor:
        """Least action, shape ``(1,)``."""
        return torch.tensor([-_LARGEST_TORQUE], device=self.device)

    @property
    def high(self) -> Tensor:
        """Largest action, shape ``(1,)``."""
        return torch.tensor([_LARGEST_TORQUE], device=self.device)

    def reset(self, count: int, *, seed: int) -> Tensor:
        """Start episodes at any angle, speeds in [-1, 1], and return what is seen, shape ``(count, 3)``."""
        start = 2 * torch.rand((count, 2), generator=torch.Generator().manual_seed(seed)).to(self.device) - 1
        self.angle, self.speed = math.pi * start[:, 0], start[:, 1]
        return self._seen()

    def _seen(self) -> Tensor:
        return torch.stack([self.angle.cos(), self.angle.sin(), self.speed], 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Apply torques of shape ``(count, 1)``, cut off at 2, and return what is seen and the rewards."""
        if action.shape != (len(self.angle), 1):
            raise ValueError(f"action must have shape ({len(self.angle)}, 1), got {tuple(action.shape)}")
        checks.finite(action, "action")
        torque = action[:, 0].clamp(-_LARGEST_TORQUE, _LARGEST_TORQUE)
        angle = torch.remainder(self.angle + math.pi, 2 * math.pi) - math.pi
        reward = -(angle.square() + 0.1 * self.speed.square() + 0.001 * torque.square())
        pull = 1.5 * _GRAVITY * self.angle.sin() + 3 * torque
        self.speed = (self.speed + pull * _STEP).clamp(-_LARGEST_SPEED, _LARGEST_SPEED)
        self.angle = self.angle + self.speed * _STEP
        return self._seen(), reward

    @torch.no_grad()
    def returns(self, act: Callable[[Tensor], Tensor], *, episodes: int = 100, seed: int = 0) -> Tensor:
        """Return each episode's sum of rewards when ``act`` maps observations to actions, shape ``(episodes,)``."""
        observation, total = self.reset(episodes, seed=seed), torch.zeros(episodes, device=self.device)
        for _ in range(self.episode_steps):
            observation, reward = self.step(act(observation))
            total += reward
        return total

    @staticmethod
    def controller(observation: Tensor) -> Tensor:
        r"""Act well: pump energy until near the top, then hold, shape ``(count, 1)``.

        The torque is :math:`-2\operatorname{sign}(\dot\theta E)` with the energy
        :math:`E = \dot\theta^2/6 + 5(\cos\theta - 1)`, and :math:`-(10\theta + 2.5\dot\theta)` where
        :math:`|\theta| < 0.6` and :math:`|\dot\theta| < 4`.
        """
        angle, speed = torch.atan2(observation[:, 1], observation[:, 0]), observation[:, 2]
        energy = speed.square() / 6 + 5 * (observation[:, 0] - 1)
        # At rest there is no direction to pump in: any will do.
        direction = torch.where(speed * energy == 0, torch.ones_like(speed), torch.sign(speed * energy))
        near = (angle.abs() < 0.6) & (speed.abs() < 4)
        torque = torch.where(near, -(10 * angle + 2.5 * speed), -_LARGEST_TORQUE * direction)
        return torque.clamp(-_LARGEST_TORQUE, _LARGEST_TORQUE)[:, None]

    @torch.no_grad()
    def record(self, act: Callable[[Tensor], Tensor], *, episodes: int, seed: int = 0) -> Transitions:
        """Live whole episodes in which ``act`` maps observations to actions; torques are cut off at 2.

        Args:
            act: From shape ``(episodes, 3)`` to ``(episodes, 1)``.
            episodes: How many.
            seed: Of the starts.
        """
        observation, rows = self.reset(episodes, seed=seed), []
        for _ in range(self.episode_steps):
            action = act(observation).clamp(-_LARGEST_TORQUE, _LARGEST_TORQUE)
            following, reward = self.step(action)
            rows.append((observation, action, reward, following))
            observation = following
        seen, action, reward, following = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*rows, strict=True))
        truncated = torch.zeros(episodes, self.episode_steps, dtype=torch.bool, device=self.device)
        truncated[:, -1] = True
        nothing = torch.zeros_like(truncated).flatten()
        return Transitions(seen, action, reward, following, nothing, truncated.flatten())

    def log(self, quality: str = "mixed", *, episodes: int = 100, seed: int = 0) -> Transitions:
        """Log episodes of behaviour of some quality.

        Args:
            quality: ``"random"``: uniform torques; ``"expert"``: the controller with noise of deviation 0.1;
                ``"medium"``: half of each; ``"mixed"``: one episode in twenty by the controller, at least one.
            episodes: How many.
            seed: Of starts and noise.
        """
        checks.one_of(quality, "quality", tuple(QUALITIES))
        share = QUALITIES[quality]
        expert = torch.arange(episodes, device=self.device) < max(round(share * episodes), int(share > 0))
        generator = torch.Generator().manual_seed(seed + 0x5EED)

        def act(observation: Tensor) -> Tensor:
            chance = torch.rand((episodes, 1), generator=generator).to(self.device)
            noise = torch.randn((episodes, 1), generator=generator).to(self.device)
            held = self.controller(observation) + 0.1 * noise
            return torch.where(expert[:, None], held, _LARGEST_TORQUE * (2 * chance - 1))

        return self.record(act, episodes=episodes, seed=seed)
