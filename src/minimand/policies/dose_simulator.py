r"""A simulated treatment whose harm shows late: small enough to know the truth, hard enough to mislead a planner.

A patient's illness h and toxicity q lie in [0, 1]; each of twenty steps a dose a in [0, 1] is given, and

.. math:: h' = h + 0.03 - 0.10\,a\,(1 - 1.2\,q) + 0.02\,N, \qquad
          q' = 0.85\,q + 0.9 \max(a - 0.55, 0) + 0.05\,a + 0.01\,N

with standard normal N. The reward is :math:`-h'`, the cost 1 where :math:`q' > 0.35`. Clinicians give
:math:`0.1 + 0.35\,h + 0.1\,N` but never more than 0.6: the log hardly shows what higher doses do, while what it shows
says that more is better.

Source: ours, after the treatment problems of Yan, Shen, Wachi, Gros, Zhao and Hu 2025, arXiv 2505.16242, whose data
are not public.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .transition_models import Predicted
from .transitions import Transitions

TOXIC = 0.35


class DoseSimulator:
    """The treatment, many patients at once.

    Args:
        horizon: Steps of an episode, at least 1.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> log = DoseSimulator().log(300, generator=generator)
        >>> round(log.episode_returns().mean().item(), 1), log.cost.sum().item()
        (-12.9, 0.0)

    Source:
        Ours; see the module.
    """

    def __init__(self, horizon: int = 20) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        self.horizon = horizon

    def start(self, count: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "count 2"]:
        """Draw patients at admission: illness in (0.4, 0.9), toxicity in (0, 0.1).

        Args:
            count: How many.
            generator: Of the draws.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        device = None if generator is None else generator.device
        drawn = torch.rand(count, 2, generator=generator, device=device)
        return torch.stack([0.4 + 0.5 * drawn[:, 0], 0.1 * drawn[:, 1]], 1)

    def step(
        self,
        state: Float[Tensor, "count 2"],
        dose: Float[Tensor, "count 1"],
        *,
        generator: torch.Generator | None = None,
        noise: bool = True,
    ) -> Predicted:
        """Give doses, which are held to [0, 1] first.

        Args:
            state: Illness and toxicity.
            dose: Of each patient.
            generator: Of the noise.
            noise: Whether there is any; without it the step is the mean of what follows, but for the limits of [0, 1].
        """
        if state.dim() != 2 or state.shape[1] != 2 or dose.shape != (len(state), 1):
            raise ValueError(
                "state and dose must have shapes (count, 2) and (count, 1), "
                f"got {tuple(state.shape)} and {tuple(dose.shape)}"
            )
        illness, toxicity = state.unbind(1)
        dose = dose.squeeze(1).clamp(0, 1)
        illness = illness + 0.03 - 0.10 * dose * (1 - 1.2 * toxicity)
        toxicity = 0.85 * toxicity + 0.9 * (dose - 0.55).clamp_min(0) + 0.05 * dose
        following = torch.stack([illness, toxicity], 1)
        if noise:
            drawn = torch.randn(state.shape, generator=generator, device=state.device, dtype=state.dtype)
            following = following + drawn * following.new_tensor([0.02, 0.01])
        following = following.clamp(0, 1)
        reward, cost = self.reward(state, dose, following), self.cost(state, dose, following)
        return Predicted(following, reward, cost, torch.zeros_like(reward, dtype=torch.bool))

    def reward(self, state: Tensor, dose: Tensor, following: Tensor) -> Float[Tensor, " count"]:
        """Return minus the illness that follows.

        Args:
            state: Before the dose.
            dose: Of each patient.
            following: State after it.
        """
        return -following[:, 0]

    def cost(self, state: Tensor, dose: Tensor, following: Tensor) -> Float[Tensor, "count 1"]:
        """Return 1 where the toxicity that follows is above 0.35.

        Args:
            state: Before the dose.
            dose: Of each patient.
            following: State after it.
        """
        return (following[:, 1:] > TOXIC).to(following)

    def clinician(
        self, state: Float[Tensor, "count 2"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "count 1"]:
        """Return what clinicians give: more to the sicker, never more than 0.6.

        Args:
            state: Illness and toxicity.
            generator: Of their whims.
        """
        drawn = torch.randn(len(state), generator=generator, device=state.device, dtype=state.dtype)
        return (0.1 + 0.35 * state[:, 0] + 0.1 * drawn).clamp(0, 0.6)[:, None]

    def play(
        self,
        policy: Callable[[Tensor], Tensor],
        count: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Transitions:
        """Treat patients by a policy, in the true dynamics.

        Args:
            policy: Maps states ``(count, 2)`` to doses ``(count, 1)``.
            count: How many patients.
            generator: Of all draws but the policy's own.

        Returns:
            Their episodes, one after the other, each truncated at the horizon.
        """
        state, steps = self.start(count, generator=generator), []
        for _ in range(self.horizon):
            dose = policy(state).to(state).clamp(0, 1)
            found = self.step(state, dose, generator=generator)
            steps.append((state, dose, found.reward, found.next_observation, found.cost))
            state = found.next_observation
        state, dose, reward, following, cost = (torch.stack(each, 1).flatten(0, 1) for each in zip(*steps, strict=True))
        truncated = torch.arange(1, len(state) + 1, device=state.device) % self.horizon == 0
        return Transitions(state, dose, reward, following, torch.zeros_like(truncated), truncated, cost)

    def log(self, count: int, *, generator: torch.Generator | None = None) -> Transitions:
        """Return episodes of the clinicians'.

        Args:
            count: How many patients.
            generator: Of all draws.
        """
        return self.play(lambda state: self.clinician(state, generator=generator), count, generator=generator)

    def __repr__(self) -> str:
        return f"DoseSimulator(horizon={self.horizon})"
