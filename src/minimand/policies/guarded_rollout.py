r"""Episodes in a model under a guardian: who leaves what the log covers stays where he is, and pays at every step.

At the first step whose state and action (or the history of them) lie outside, the model is not asked any more: the
episode stays in this state to the end, marked as outside; it gives no reward or cost of the model's. With a penalty
for each step outside, leaving costs the more the earlier it happens.

Source: Yan, Shen, Wachi, Gros, Zhao and Hu 2025, arXiv 2505.16242, and its official code (absorbing penalty).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from .. import checks
from .features import pair_rows
from .guardians import Guardian
from .transition_models import Predicted

Model = Callable[[Tensor, Tensor], Predicted]


@dataclasses.dataclass(frozen=True)
class GuardedEpisodes:
    """Episodes in a model, one a row.

    Args:
        observation: Before each step, ``(episodes, steps, n)``; constant once outside.
        action: As the policy drew it, before it is held to its range, ``(episodes, steps, m)``, or ``(episodes,
            steps)`` for choices.
        reward: Of the model, ``(episodes, steps)``; 0 outside and after the end.
        cost: Of the model, ``(episodes, steps, costs)``; 0 outside and after the end.
        outside: Whether the episode has left what the guardian covers, this step included, ``(episodes, steps)``.
        active: Whether the action mattered: neither outside before this step nor ended.
        ended: Whether the process had ended before this step.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    cost: Tensor
    outside: Tensor
    active: Tensor
    ended: Tensor


@torch.no_grad()
def guarded_rollout(
    policy: nn.Module,
    model: Model,
    start: Float[Tensor, "episodes n"],
    *,
    horizon: int,
    guardian: Guardian | None = None,
    history: int = 1,
    action_range: tuple[float | Tensor, float | Tensor] | None = None,
    num_actions: int | None = None,
    generator: torch.Generator | None = None,
) -> GuardedEpisodes:
    """Play episodes of a policy in a model, all at once.

    Args:
        policy: Maps observations to a distribution of actions: ``Independent(Normal(...), 1)`` or ``Categorical``.
        model: Maps observations and actions to what follows.
        start: First observations.
        horizon: Steps of an episode, at least 1.
        guardian: Tells what is inside; None: everything is.
        history: How many steps the guardian's rows tell of.
        action_range: The lowest and highest actions that there are, which drawn ones are held to before model and
            guardian see them; None to leave them as they are.
        num_actions: How many choices there are; None where actions are vectors.
        generator: Of the draws of actions.

    Returns:
        The episodes.

    Raises:
        TypeError: If the policy returns another distribution.
        ValueError: If the start is empty or not finite, or a setting is out of range.

    Example:
        >>> class Walk(nn.Module):
        ...     def forward(self, observation):
        ...         zero = torch.zeros_like(observation)
        ...         return Independent(Normal(zero + 1, zero + 1e-6), 1)
        >>> def forwards(observation, action):
        ...     after = observation + action
        ...     return Predicted(after, after[:, 0], after[:, :0], after[:, 0] > 9)
        >>> from minimand.policies import KernelDensityGuardian
        >>> near = KernelDensityGuardian().fit(torch.tensor([[-1.0, 1.0], [0.5, 1.0], [2.5, 1.0]]))
        >>> guarded_rollout(Walk(), forwards, torch.zeros(1, 1), horizon=5, guardian=near).outside
        tensor([[False, False, False,  True,  True]])

    Source:
        Yan et al. 2025, arXiv 2505.16242, and its official code.
    """
    checks.floating(start, "start")
    if start.dim() != 2 or not len(start):
        raise ValueError(f"start must have shape (episodes, n) with at least one episode, got {tuple(start.shape)}")
    checks.finite(start, "start")
    for number, name in ((horizon, "horizon"), (history, "history")):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    observation = start
    ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    outside, window, steps = ended, None, []
    for _ in range(horizon):
        drawn = draw(policy(observation), generator)
        action = drawn if action_range is None else torch.clamp(drawn, *map(drawn.new_tensor, action_range))
        active = ~(outside | ended)
        if guardian is not None:
            pair = pair_rows(observation, action, num_actions=num_actions)[:, None]
            window = pair.expand(-1, history, -1) if window is None else torch.cat([window[:, 1:], pair], 1)
            outside = outside | active & ~guardian.inside(window.flatten(1))
        moving = active & ~outside
        found = model(observation, action)
        reward = torch.where(moving, found.reward, 0)
        cost = torch.where(moving[:, None], found.cost, 0)
        steps.append((observation, drawn, reward, cost, outside, active, ended))
        observation = torch.where(moving[:, None], found.next_observation, observation)
        ended = ended | moving & found.terminated
    return GuardedEpisodes(*(torch.stack(each, 1) for each in zip(*steps, strict=True)))


def draw(distribution: Distribution, generator: torch.Generator | None) -> Tensor:
    """Draw actions with a generator, which distributions themselves do not take."""
    if isinstance(distribution, Categorical):
        return torch.multinomial(distribution.probs, 1, generator=generator).squeeze(-1)
    if isinstance(distribution, Independent) and isinstance(base := distribution.base_dist, Normal):
        noise = torch.randn(base.loc.shape, generator=generator, dtype=base.loc.dtype, device=base.loc.device)
        return base.loc + base.scale * noise
    raise TypeError(f"policy must return a Categorical or an Independent Normal, got {type(distribution).__name__}")
