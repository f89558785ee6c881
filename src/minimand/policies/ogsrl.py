r"""OGSRL: improve a policy in a model learnt from a log, inside what the log covers and below safety costs.

Only a log exists. Episodes are played in a model of it, and a guardian ends those that leave what the log covers: they
stay where they are and pay a penalty :math:`p` at every step that is left. With discount :math:`\gamma` and horizon T,

.. math:: \max_\pi\ E \sum_{t < T} \gamma^t (r_t + p\,o_t) \quad\text{s.t.}\quad
          E \sum_{t < T} \gamma^t c_{k,t} \le b_k, \qquad E \sum_{t < T} \gamma^t o_t \le b_g,

where :math:`o_t` is 1 outside; penalty and limit on :math:`o` may be used alone or together. Rewards, steps outside and
costs have a critic each. To first order around the policy that acted, by the performance difference,

.. math:: J_k(\pi) - J_k(\pi_{old}) \approx L_k(\pi) = E \sum_t \gamma^t
          \frac{\pi(a_t|s_t)}{\pi_{old}(a_t|s_t)} A_{k,t},

with generalised advantages that are not normalised, so that :math:`J_k(\pi_{old}) - b_k + L_k(\pi) \le 0` is the
constraint and not a multiple of it. ``"cpo"`` takes the step of constrained policy optimisation on these;
``"lagrangian"`` that of an unconstrained trust region on :math:`L_r + p L_o - \sum_k \lambda_k L_k`, with multipliers
that follow the violations. Both then shorten the step until the true divergence, the objective and the constraints
agree.

Without a guardian it is plain constrained planning in a model; without limits plain trust-region planning.

Source: Yan, Shen, Wachi, Gros, Zhao and Hu 2025, arXiv 2505.16242 (problem, guardian); Achiam et al. 2017,
arXiv 1705.10528 (step). The official code multiplies costs by -1 and compares a normalised advantage with the limit,
so that its constraint never binds; here both are as derived above.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import kl_divergence

from .. import checks
from ..constraints import Multiplier
from ..ppo import generalized_advantages
from .curvature import fisher_product, flatten, unflatten
from .features import feature_limits
from .guarded_rollout import GuardedEpisodes, Model, guarded_rollout
from .guardians import Guardian
from .transitions import Transitions
from .trust_region import backtracking, trust_region_step


@dataclasses.dataclass(frozen=True)
class OGSRLStep:
    """What a step of :class:`OGSRL` saw, before it, and did. Sums are discounted and the model's.

    Args:
        reward: Mean sum of rewards inside.
        costs: Mean sums of costs, ``(costs,)``.
        outside: Mean discounted number of steps outside.
        left: Share of episodes that left.
        violations: Constraints less limits, ``(constraints,)``: limited costs, then steps outside if limited.
        multipliers: Of the step, ``(constraints,)``.
        kl: Mean divergence of the new policy from the old.
        feasible: Whether the trust region reaches the constraints.
        accepted: Whether the policy was changed.
    """

    reward: float
    costs: Tensor
    outside: float
    left: float
    violations: Tensor
    multipliers: Tensor
    kl: float
    feasible: bool
    accepted: bool


class OGSRL:
    """Offline guarded safe reinforcement learning. Each :meth:`step` improves ``policy`` in place.

    Args:
        policy: Maps observations to a ``Categorical`` or an ``Independent(Normal, 1)``, such as
            :class:`GaussianPolicy`. Starting it as a copy of the logged behaviour keeps the first episodes inside.
        transitions: The log, whose episodes' first observations are those that episodes in the model start from.
        model: Maps observations and actions to what follows; fitted to the log.
        guardian: Tells what the log covers; fitted to ``logged_rows(transitions, history=history)``. None: everything.
        history: How many steps the guardian looks at.
        horizon: T, steps of an episode in the model; 20 in the paper.
        discount: gamma, in (0, 1]; 0.99.
        trace: lambda of the generalised advantages, in [0, 1]; 0.95.
        cost_limits: The most of each cost's discounted sum; None for no limits.
        outside_limit: The most of the discounted number of steps outside; None to leave it to the penalty.
        outside_penalty: Reward of a step outside, at most 0; -25 in the paper's code, where no reward is below -12.5.
        algorithm: ``"cpo"`` or ``"lagrangian"``.
        multiplier: Of the constraints, for ``"lagrangian"``; None for one with a step of 0.05 and damping 0.5.
        action_range: The lowest and highest actions, which drawn ones are held to; None to leave them as they are.
        num_actions: How many choices there are; None where actions are vectors.
        num_episodes: Episodes a step; 32 in the paper's code.
        max_kl: Size of the trust region; 0.01.
        damping: Added to the Fisher information; 0.1 is the custom of constrained policy optimisation, 1 the paper's.
        max_backtracks: Scales of a step that are tried, each 0.8 of the last; 30 in the paper's code.
        critic_hidden: Widths of the critic's hidden layers; two of 128 in the paper's code.
        critic_lr: Rate of the critic; 1e-3.
        critic_steps: Batches that the critic learns from after each step.
        generator: Of all draws.

    Attributes:
        policy: The policy.
        critic: Values of rewards, steps outside and costs, by observation and time left.
        multiplier: Of the constraints; None for ``"cpo"``.

    Raises:
        ValueError: If a setting is out of range, or limits do not fit the log's costs.

    Example:
        >>> from minimand.policies import (
        ...     ChristoffelGuardian, DoseSimulator, GaussianPolicy, RegressionModel, logged_rows)
        >>> simulator, generator = DoseSimulator(), torch.Generator().manual_seed(0)
        >>> log = simulator.log(100, generator=generator)
        >>> learner = OGSRL(
        ...     GaussianPolicy(2, 1, low=0.0, high=1.0), log, RegressionModel(cost=simulator.cost).fit(log),
        ...     guardian=ChristoffelGuardian().fit(logged_rows(log)), cost_limits=[0.1], action_range=(0.0, 1.0),
        ...     generator=generator)
        >>> first = learner.step()
        >>> bool(first.accepted and learner.step().outside < first.outside)
        True

    Source:
        Yan et al. 2025, arXiv 2505.16242; defaults are those of its official code where no other is named.
    """

    def __init__(
        self,
        policy: nn.Module,
        transitions: Transitions,
        model: Model,
        *,
        guardian: Guardian | None = None,
        history: int = 1,
        horizon: int = 20,
        discount: float = 0.99,
        trace: float = 0.95,
        cost_limits: Sequence[float] | None = None,
        outside_limit: float | None = None,
        outside_penalty: float = -25.0,
        algorithm: Literal["cpo", "lagrangian"] = "cpo",
        multiplier: Multiplier | None = None,
        action_range: tuple[float | Tensor, float | Tensor] | None = None,
        num_actions: int | None = None,
        num_episodes: int = 32,
        max_kl: float = 0.01,
        damping: float = 0.1,
        max_backtracks: int = 30,
        critic_hidden: Sequence[int] = (128, 128),
        critic_lr: float = 1e-3,
        critic_steps: int = 20,
        generator: torch.Generator | None = None,
    ) -> None:
        checks.one_of(algorithm, "algorithm", ("cpo", "lagrangian"))
        checks.between(discount, "discount", 0.0, 1.0, low_open=True)
        checks.between(trace, "trace", 0.0, 1.0)
        checks.non_negative(-outside_penalty, "minus outside_penalty")
        for size, name in ((horizon, "horizon"), (num_episodes, "num_episodes"), (critic_steps, "critic_steps")):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if outside_limit is not None:
            checks.non_negative(outside_limit, "outside_limit")
            if guardian is None:
                raise ValueError(f"outside_limit {outside_limit} wants a guardian: without one nothing is outside")
        self.num_costs = 0 if transitions.cost is None else transitions.cost.shape[1]
        if cost_limits is not None and len(cost_limits) != self.num_costs:
            raise ValueError(f"cost_limits must be one a cost of the log, {self.num_costs}, got {len(cost_limits)}")
        self.policy, self.model, self.guardian = policy, model, guardian
        self.history, self.horizon, self.discount, self.trace = history, horizon, discount, trace
        self.penalty, self.algorithm = outside_penalty, algorithm
        self.action_range, self.num_actions = action_range, num_actions
        self.num_episodes, self.max_kl, self.damping = num_episodes, max_kl, damping
        self.max_backtracks, self.critic_steps, self.generator = max_backtracks, critic_steps, generator
        ends = transitions.episode_ends
        like = next(policy.parameters())
        self.starts = transitions.observation[torch.cat([ends.new_ones(1), ends[:-1]])].to(like)
        limits = [*(cost_limits or ()), *(() if outside_limit is None else (outside_limit,))]
        self.limits = like.new_tensor(limits)
        checks.finite(self.limits, "cost_limits")
        # Which of the streams (rewards, steps outside, costs) the limits hold.
        self.limited = [*range(2, 2 + len(cost_limits or ())), *(() if outside_limit is None else (1,))]
        self.multiplier = None
        if algorithm == "lagrangian" and limits:
            self.multiplier = multiplier or Multiplier(0.05, num_constraints=len(limits), damping=0.5)
            self.multiplier.to(like)
        self.critic = _Critic(
            transitions.observation.to(like), horizon, 2 + self.num_costs, critic_hidden, generator
        ).to(like)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), lr=critic_lr)

    def rollout(self) -> GuardedEpisodes:
        """Play the episodes of a step in the model."""
        drawn = torch.randint(
            len(self.starts), (self.num_episodes,), generator=self.generator, device=self.starts.device
        )
        return guarded_rollout(
            self.policy,
            self.model,
            self.starts[drawn],
            horizon=self.horizon,
            guardian=self.guardian,
            history=self.history,
            action_range=self.action_range,
            num_actions=self.num_actions,
            generator=self.generator,
        )

    def step(self) -> OGSRLStep:
        """Play episodes, improve the policy by one trust-region step, and let the critic learn from the episodes.

        Raises:
            ValueError: If the model, the policy or the critic gives numbers that are not finite.
        """
        episodes = self.rollout()
        streams = self.streams(episodes)
        values = self.values(episodes)
        advantages = generalized_advantages(
            streams, values, gamma=self.discount, lam=self.trace, mask=(~episodes.ended).expand_as(streams)
        )
        weights = self.discount ** torch.arange(self.horizon, dtype=streams.dtype, device=streams.device)
        sums = (streams * weights).sum(-1).mean(-1)
        violations = sums[self.limited] - self.limits
        changed = self._improve(episodes, advantages * weights, violations)
        self._learn(episodes, advantages + values)
        return OGSRLStep(
            reward=float(sums[0]),
            costs=sums[2:],
            outside=float(sums[1]),
            left=float(episodes.outside[:, -1].float().mean()),
            violations=violations,
            **changed,
        )

    def streams(self, episodes: GuardedEpisodes) -> Float[Tensor, "streams episodes steps"]:
        """Return rewards, steps outside and costs of episodes, ``(2 + costs, episodes, steps)``.

        Args:
            episodes: In the model.
        """
        outside = episodes.outside.to(episodes.reward)
        return torch.stack([episodes.reward, outside, *episodes.cost.unbind(-1)])

    @torch.no_grad()
    def values(self, episodes: GuardedEpisodes) -> Float[Tensor, "streams episodes steps"]:
        """Return the critic's values of every stream, and the exact ones where nothing is left to decide.

        Args:
            episodes: In the model.
        """
        values = self.critic(episodes.observation).movedim(-1, 0)
        left = torch.arange(self.horizon, 0, -1, device=values.device, dtype=values.dtype)
        frozen = torch.zeros_like(values)
        frozen[1] = left if self.discount == 1 else (1 - self.discount**left) / (1 - self.discount)
        gone = episodes.outside & ~episodes.active
        return torch.where(gone, frozen, torch.where(episodes.ended, 0, values))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that learning has changed, by name."""
        state: dict[str, Any] = {
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.multiplier is not None:
            state["multiplier"] = self.multiplier.state_dict()
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return copy.deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Args:
            state: Of a learner with the same settings.
        """
        self.policy.load_state_dict(state["policy"])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.multiplier is not None:
            self.multiplier.load_state_dict(state["multiplier"])
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"])

    def _improve(self, episodes: GuardedEpisodes, advantages: Tensor, violations: Tensor) -> dict[str, Any]:
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        active = episodes.active
        observation, action = episodes.observation[active], episodes.action[active]
        weighted = advantages[:, active] / len(active)
        pressure = self._pressure(violations)
        with torch.no_grad():
            old = self.policy(observation)
            old_log_prob = old.log_prob(action)

        def surrogates() -> tuple[Tensor, Tensor, Tensor]:
            """Return gain in the objective, changes of the constraints, and mean divergence of the policy as it is."""
            new = self.policy(observation)
            changes = (weighted * (new.log_prob(action) - old_log_prob).expm1()).sum(-1)
            limited = changes[self.limited]
            gain = changes[0] + self.penalty * changes[1] - (pressure * limited).sum()
            return gain, limited, kl_divergence(old, new).mean()

        def place(step: Tensor) -> None:
            for parameter, origin, change in zip(parameters, start, unflatten(step, start), strict=True):
                parameter.copy_(origin + change)

        def accept(step: Tensor) -> Tensor:
            place(step)
            gain, moved, kl = surrogates()
            good = (gain > 0) & (kl <= self.max_kl)
            if constrained:
                # Within its limit a constraint must stay, beyond it it must not get worse; the way back may cost gain.
                kept = (violations + moved <= violations.clamp_min(0)).all()
                good = kept & (kl <= self.max_kl) & ((gain > 0) | ~found.feasible)
            return good

        gain, limited, divergence = surrogates()
        constrained = self.algorithm == "cpo" and len(self.limits) > 0
        gradients = torch.stack(
            [
                flatten(torch.autograd.grad(row, parameters, retain_graph=True, materialize_grads=True))
                for row in ([gain, *limited] if constrained else [gain])
            ]
        )
        found = trust_region_step(
            gradients[0],
            fisher_product(divergence, parameters, damping=self.damping),
            constraint_gradients=gradients[1:] if constrained else None,
            violations=violations if constrained else None,
            max_kl=self.max_kl,
        )
        start = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            search = backtracking(found.step, accept, max_iter=self.max_backtracks)
            place(search.step)
            kl = float(surrogates()[2])
        return {
            "multipliers": found.multipliers if constrained else pressure,
            "kl": kl,
            "feasible": bool(found.feasible),
            "accepted": bool(search.accepted),
        }

    def _pressure(self, violations: Tensor) -> Tensor:
        """Move the multipliers, and return what a unit of each constraint costs in the objective."""
        if self.multiplier is None:
            return torch.zeros_like(violations)
        seen = violations.clone().requires_grad_()
        (pressure,) = torch.autograd.grad(self.multiplier(seen), seen)
        return pressure

    def _learn(self, episodes: GuardedEpisodes, targets: Tensor) -> None:
        """Fit the critic where there was something to decide."""
        targets = targets.movedim(0, -1)[episodes.active]
        with torch.no_grad():
            inputs = self.critic.inputs(episodes.observation)[episodes.active]
        size = max(len(inputs) // 4, 1)
        for _ in range(self.critic_steps):
            batch = torch.randint(len(inputs), (size,), generator=self.generator, device=inputs.device)
            self.optimizer.zero_grad()
            (self.critic.body(inputs[batch]) - targets[batch] / self.critic.scale).square().mean().backward()
            self.optimizer.step()


class _Critic(nn.Module):
    """Values of every stream, by observations of episodes ``(episodes, steps, n)`` and the steps left."""

    center: Tensor
    half_range: Tensor

    def __init__(
        self,
        observation: Tensor,
        horizon: int,
        outputs: int,
        hidden: Sequence[int],
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        center, half_range = feature_limits(observation)
        self.register_buffer("center", center)
        self.register_buffer("half_range", half_range)
        self.scale = horizon / 4  # values are of the order of the steps left
        widths = [observation.shape[1] + 1, *hidden]
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], outputs)).to(observation)
        for parameter in self.body.parameters():
            nn.init.uniform_(parameter, -1 / widths[-1] ** 0.5, 1 / widths[-1] ** 0.5, generator=generator)

    def inputs(self, observation: Tensor) -> Tensor:
        left = torch.linspace(1, -1, observation.shape[1], dtype=observation.dtype, device=observation.device)
        left = left[None, :, None].expand(len(observation), -1, 1)
        return torch.cat([(observation - self.center) / self.half_range, left], -1)

    def forward(self, observation: Tensor) -> Tensor:
        return self.scale * self.body(self.inputs(observation))
