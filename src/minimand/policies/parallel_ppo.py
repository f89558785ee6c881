r"""Proximal policy optimisation of many policies at once, with a critic of several objectives.

The policies share an architecture and nothing else: each has its own parameters, episodes, normalisation and gradient,
and all act and learn in one pass over stacked tensors.

With :math:`\rho = \pi / \pi_{old}` a batch estimates the discounted return of objective j of a nearby policy as

.. math:: \hat G_j(\pi) = J_j(\pi_{old}) + \bar L\ \mathrm{mean}_t\big(\gamma^t (\rho_t - 1) A_{j,t}\big),

where :math:`\bar L` is the mean length of an episode: exactly :math:`J_j` at the policy that acted.

Source: Schulman et al. 2017, arXiv 1707.06347 (PPO); Kakade and Langford, ICML 2002 (the return of a nearby policy).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from ..ppo import generalized_advantages
from .vector_actor_critic import ActionLaw, evaluate_stacked, stack_parameters
from .vector_environment import MakeEnvironment, VectorEnvironment


@dataclasses.dataclass(frozen=True)
class PPOSettings:
    r"""How policies learn by proximal policy optimisation.

    The defaults are those of Liu et al. 2025, arXiv 2410.02236, and its code.

    Args:
        num_envs: Episodes side by side, for each policy.
        num_steps: Steps of each before an update.
        epochs: Passes over the steps of an update.
        num_minibatches: Parts of a pass.
        lr: Of Adam.
        clip: How far the ratio of probabilities may leave 1.
        gamma: Discount.
        lam: lambda of the advantages.
        value_weight: Of the critic's squared error.
        entropy_weight: Of the entropy.
        max_norm: Most norm of a policy's gradient.

    Raises:
        ValueError: If a setting is out of range.
    """

    num_envs: int = 4
    num_steps: int = 2048
    epochs: int = 10
    num_minibatches: int = 32
    lr: float = 3e-4
    clip: float = 0.2
    gamma: float = 0.995
    lam: float = 0.95
    value_weight: float = 0.5
    entropy_weight: float = 0.0
    max_norm: float = 0.5

    def __post_init__(self) -> None:
        for name in ("num_envs", "num_steps", "epochs", "num_minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_minibatches > self.num_envs * self.num_steps:
            raise ValueError(f"num_minibatches must be at most num_envs * num_steps, got {self.num_minibatches}")
        for name in ("lr", "clip", "max_norm"):
            checks.positive(getattr(self, name), name)
        for name in ("value_weight", "entropy_weight"):
            checks.non_negative(getattr(self, name), name)
        for name in ("gamma", "lam"):
            checks.between(getattr(self, name), name, 0.0, 1.0)


class Moments(NamedTuple):
    """Running means and variances, ``(policies, features)``, and how many rows they are of, ``(policies, 1)``."""

    mean: Tensor
    variance: Tensor
    rows: Tensor

    @classmethod
    def none(cls, policies: int, features: int) -> Moments:
        """Begin with mean 0 and variance 1, of nothing."""
        zeros = torch.zeros(policies, features)
        return cls(zeros, torch.ones_like(zeros), zeros[:, :1])

    @property
    def deviation(self) -> Tensor:
        """Standard deviations."""
        return self.variance.sqrt().clamp_min(1e-4)

    def update(self, rows: Float[Tensor, "policies batch features"]) -> Moments:
        """Return the moments with more rows."""
        mean, variance, added = rows.mean(1), rows.var(1, correction=0), rows.shape[1]
        total = self.rows + added
        shift, share = mean - self.mean, added / total
        spread = self.variance * (1 - share) + variance * share + shift.square() * share * (1 - share)
        return Moments(self.mean + shift * share, spread, total)

    def normalize(self, rows: Float[Tensor, "policies batch features"]) -> Tensor:
        """Return rows less the mean, in standard deviations, cut at 10."""
        return ((rows - self.mean[:, None]) / self.deviation[:, None]).clamp(-10, 10)

    def to(self, device: torch.device) -> Moments:
        """Return the moments on a device."""
        return Moments(*(each.to(device) for each in self))


@dataclasses.dataclass(frozen=True)
class VectorPolicy:
    """A policy of several objectives at some moment of its training: what acts, and what training goes on from.

    Args:
        network: The architecture; its own parameters are not used.
        parameters: By name.
        observations: Moments that observations are normalised with, of one policy.
        values: Moments that the critic's values are of.
        discrete: Whether actions are indices.
    """

    network: nn.Module
    parameters: dict[str, Tensor]
    observations: Moments
    values: Moments
    discrete: bool

    @torch.no_grad()
    def act(self, observation: Float[Tensor, "batch features"], generator: torch.Generator | None = None) -> Tensor:
        """Return the likeliest actions, or with a generator drawn ones.

        Args:
            observation: What was seen.
            generator: Of the draw.
        """
        checks.finite(observation, "observation")
        seen = self.observations.normalize(observation[None])[0]
        law = ActionLaw(torch.func.functional_call(self.network, self.parameters, (seen,))[0], self.discrete)
        return law.mode() if generator is None else law.sample(generator)


@dataclasses.dataclass(frozen=True)
class Experience:
    """What every policy went through since the last update; rows are steps of all its episodes.

    Args:
        observations: Normalised, ``(policies, rows, features)``.
        actions: ``(policies, rows)`` or ``(policies, rows, action)``.
        law: Parameters of the law that they were drawn from.
        logp: Their log-probabilities.
        advantages: Of every objective, ``(policies, rows, objectives)``, not normalised.
        targets: Of the critic, normalised.
        discounts: Discount at each step of its episode, ``(policies, rows)``.
        returns: J, the discounted return of the policies that acted, ``(policies, objectives)``.
        lengths: Mean length of an episode, ``(policies,)``.
        scales: Deviation of the values, ``(policies, objectives)``.
    """

    observations: Tensor
    actions: Tensor
    law: Tensor
    logp: Tensor
    advantages: Tensor
    targets: Tensor
    discounts: Tensor
    returns: Tensor
    lengths: Tensor
    scales: Tensor

    def rows(self, index: Tensor) -> Experience:
        """Return some rows, the same of every policy."""
        names = ("observations", "actions", "law", "logp", "advantages", "targets", "discounts")
        return dataclasses.replace(self, **{name: getattr(self, name)[:, index] for name in names})

    def nearby_returns(self, ratio: Float[Tensor, "policies rows"]) -> Float[Tensor, "policies objectives"]:
        r"""Estimate the returns :math:`\hat G` of nearby policies.

        Args:
            ratio: Of the probabilities of the actions under them to those under the policies that acted.
        """
        gains = (self.discounts * (ratio - 1))[..., None] * self.advantages
        return self.returns + self.lengths[:, None] * gains.mean(1)


# Takes log-probabilities of the actions now and the rows they belong to; returns each policy's loss.
PolicyLoss = Callable[[Tensor, Experience], Tensor]


class ParallelPPO:
    """Train policies side by side.

    Args:
        make_env: Makes an environment of as many episodes as asked, from a seed.
        policies: Where to start from.
        settings: How to learn.
        generator: Of actions and minibatches.
    """

    def __init__(
        self,
        make_env: MakeEnvironment,
        policies: Sequence[VectorPolicy],
        settings: PPOSettings,
        *,
        generator: torch.Generator,
    ) -> None:
        self.network, self.settings, self.generator = policies[0].network, settings, generator
        stacked = stack_parameters([each.parameters for each in policies])
        self.parameters = {name: value.detach().clone().requires_grad_() for name, value in stacked.items()}
        self.device = next(iter(stacked.values())).device
        self.observations, self.values = (
            Moments(*(torch.cat(each) for each in zip(*moments, strict=True)))
            for moments in ([each.observations for each in policies], [each.values for each in policies])
        )
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.lr, eps=1e-5)
        self.count = len(policies)
        self.env = make_env(self.count * settings.num_envs, draw_seed(generator))
        self._seen: Tensor | None = None
        self._time = torch.zeros(self.count, settings.num_envs, device=self.device)
        self._returns = torch.zeros(self.count, self.env.num_objectives, device=self.device)
        self._steps, self._ends = 0, torch.zeros(self.count, device=self.device)

    def policies(self) -> list[VectorPolicy]:
        """Return the policies as they are now."""
        return [
            VectorPolicy(
                self.network,
                {name: value[i].detach().clone() for name, value in self.parameters.items()},
                Moments(*(each[i : i + 1] for each in self.observations)),
                Moments(*(each[i : i + 1] for each in self.values)),
                self.env.discrete,
            )
            for i in range(self.count)
        ]

    @torch.no_grad()
    def collect(self) -> Experience:
        """Act for a while, from where the episodes stand."""
        settings, group = self.settings, (self.count, self.settings.num_envs)
        if self._seen is None:
            self._seen = self.env.reset().to(self.device)
        taken: dict[str, list[Tensor]] = {}
        raw = []
        for _ in range(settings.num_steps):
            raw.append(self._seen.unflatten(0, group))
            seen = self.observations.normalize(raw[-1])
            parameters, values = evaluate_stacked(self.network, self.parameters, seen)
            law = ActionLaw(parameters, self.env.discrete)
            action = law.sample(self.generator)
            step = self.env.step(action.flatten(0, 1))
            terminated, truncated = (each.to(self.device).unflatten(0, group) for each in step[2:4])
            # What an episode that was cut off would still have earned.
            cut = torch.zeros_like(values)
            if truncated.any():
                last = self.observations.normalize(step.last.to(self.device).unflatten(0, group))
                beyond = self._raw_values(evaluate_stacked(self.network, self.parameters, last)[1])
                cut = torch.where(truncated[..., None], beyond, cut)
            row = {
                "observations": seen,
                "actions": action,
                "law": parameters,
                "logp": law.log_probability(action),
                "values": self._raw_values(values),
                "cut": cut,
                "rewards": step.rewards.to(self.device).unflatten(0, group),
                "ends": terminated | truncated,
                "time": self._time,
            }
            for name, value in row.items():
                taken.setdefault(name, []).append(value)
            self._time = torch.where(row["ends"], 0, self._time + 1)
            self._seen = step.observation.to(self.device)
        final = self.observations.normalize(self._seen.unflatten(0, group))
        final_values = self._raw_values(evaluate_stacked(self.network, self.parameters, final)[1])
        self.observations = self.observations.update(torch.cat(raw, 1))
        return self._experience({name: torch.stack(column, 2) for name, column in taken.items()}, final_values)

    def _raw_values(self, values: Tensor) -> Tensor:
        return values * self.values.deviation[:, None] + self.values.mean[:, None]

    def _experience(self, steps: dict[str, Tensor], final_values: Tensor) -> Experience:
        """Turn steps ``(policies, envs, steps, ...)`` into rows."""
        settings, ends, values = self.settings, steps["ends"], steps["values"]
        following = torch.cat([values[:, :, 1:], final_values[:, :, None]], 2)
        following = torch.where(ends[..., None], steps["cut"], following)

        def advantages(lam: float) -> Tensor:
            rewards, now, then = (each.movedim(-1, -2) for each in (steps["rewards"], values, following))
            over = ends[:, :, None].expand_as(rewards)
            found = generalized_advantages(rewards, now, gamma=settings.gamma, lam=lam, next_values=then, ends=over)
            return found.movedim(-2, -1)

        # Returns from the starts of episodes; those still going on are completed by the critic.
        starts = (steps["time"] == 0).flatten(1)
        returns = ((advantages(1.0) + values).flatten(1, 2) * starts[..., None]).sum(1)
        counts = starts.sum(1, keepdim=True)
        self._returns = torch.where(counts > 0, returns / counts.clamp_min(1), self._returns)
        self._steps += ends[0].numel()
        self._ends = self._ends + ends.flatten(1).sum(1)

        found = advantages(settings.lam)
        targets = (found + values).flatten(1, 2)
        self.values = self.values.update(targets)
        return Experience(
            observations=steps["observations"].flatten(1, 2),
            actions=steps["actions"].flatten(1, 2),
            law=steps["law"].flatten(1, 2),
            logp=steps["logp"].flatten(1, 2),
            advantages=found.flatten(1, 2),
            targets=self.values.normalize(targets),
            discounts=(settings.gamma ** steps["time"]).flatten(1),
            returns=self._returns,
            lengths=self._steps / self._ends.clamp_min(settings.num_envs),
            scales=self.values.deviation,
        )

    def improve(self, experience: Experience, policy_loss: PolicyLoss | None) -> None:
        """Learn from experience, each policy by its own loss.

        Args:
            experience: From :meth:`collect`.
            policy_loss: Of the policies; None trains the critics alone.
        """
        settings, count = self.settings, experience.logp.shape[1]
        for _ in range(settings.epochs):
            order = torch.randperm(count, generator=self.generator, device=self.generator.device).to(self.device)
            for index in order.chunk(settings.num_minibatches):
                rows = experience.rows(index)
                parameters, values = evaluate_stacked(self.network, self.parameters, rows.observations)
                # The custom counts the squared error of a critic without the half.
                loss = settings.value_weight * (values - rows.targets).square().sum(-1).mean(1)
                if policy_loss is not None:
                    law = ActionLaw(parameters, self.env.discrete)
                    loss = loss + policy_loss(law.log_probability(rows.actions), rows)
                    loss = loss - settings.entropy_weight * law.entropy().mean(1)
                self.optimizer.zero_grad()
                loss.sum().backward()
                self._clip_gradients()
                self.optimizer.step()

    @torch.no_grad()
    def _clip_gradients(self) -> None:
        """Shorten each policy's gradient on its own."""
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        norms = torch.stack([each.flatten(1).square().sum(1) for each in gradients]).sum(0).sqrt()
        factors = (self.settings.max_norm / norms.clamp_min(1e-12)).clamp_max(1)
        for each in gradients:
            each.mul_(factors.view(-1, *[1] * (each.dim() - 1)))


def draw_seed(generator: torch.Generator) -> int:
    """Draw the seed of an environment."""
    return int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))


@torch.no_grad()
def evaluate_policies(
    env: VectorEnvironment, policies: Sequence[VectorPolicy], *, gamma: float, max_steps: int
) -> Float[Tensor, "policies objectives"]:
    """Play whole episodes by the likeliest actions, and return the mean discounted returns.

    Args:
        env: Of as many episodes for each policy, in turn.
        policies: Of one architecture.
        gamma: Discount.
        max_steps: Where an episode is cut off that has not ended.
    """
    parameters = stack_parameters([each.parameters for each in policies])
    moments = Moments(*(torch.cat(each) for each in zip(*(one.observations for one in policies), strict=True)))
    device, group = moments.mean.device, (len(policies), env.num_episodes // len(policies))
    seen = env.reset().to(device)
    total, alive = torch.zeros(*group, env.num_objectives, device=device), torch.ones(group, device=device)
    for time in range(max_steps):
        law = evaluate_stacked(policies[0].network, parameters, moments.normalize(seen.unflatten(0, group)))[0]
        step = env.step(ActionLaw(law, env.discrete).mode().flatten(0, 1))
        total += gamma**time * alive[..., None] * step.rewards.to(device).unflatten(0, group)
        alive = alive * ~(step.terminated | step.truncated).to(device).unflatten(0, group)
        if not alive.any():
            break
        seen = step.observation.to(device)
    return total.mean(1)
