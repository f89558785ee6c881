r"""Improve policies, each in one objective of several while the others are held: the second stage of C-MORL.

The constraints :math:`G_j(\pi) \ge d_j` are held by an interior point ("ipo"), where PPO's loss gains
:math:`-\frac1t \sum_{j \ne i} \log s_j` of the slacks :math:`s_j = (G_j - d_j) / |G_j(\pi_r)|`; or by steps of a
constrained trust region ("cpo"), where only the critic learns by PPO.

Source: Liu et al., ICLR 2025, arXiv 2410.02236; Liu, Ding and Liu, AAAI 2020, arXiv 1910.09615 (interior point);
Achiam et al. 2017, arXiv 1705.10528 (trust region). The estimate of returns, and slacks as shares, are re-derived.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..ppo import clipped_policy_loss
from .curvature import fisher_product, flatten, gradients_of_rows, unflatten
from .parallel_ppo import Experience, ParallelPPO, PolicyLoss
from .trust_region import backtracking, trust_region_step
from .vector_actor_critic import ActionLaw, evaluate_stacked

# Of the Fisher information; the custom of CPO's authors.
_DAMPING = 0.1


def interior_point_barrier(
    slack: Float[Tensor, "*constraints"], *, sharpness: float = 20.0, floor: float = 1e-3
) -> Float[Tensor, "*constraints"]:
    r"""Compute :math:`-\frac1t \log s`, and its tangent where the slack is below a floor.

    A slack that is merely clamped loses its gradient where the constraint is broken; the tangent pushes back.

    Args:
        slack: s, by how much each constraint holds.
        sharpness: The paper's t, above 0; 20 is the authors'. The larger, the less is felt before the edge.
        floor: Where the tangent takes over; 1e-3 is the authors' clamp.

    Returns:
        The barrier of each constraint.

    Raises:
        TypeError: If ``slack`` is no floating-point tensor.
        ValueError: If it is not finite, or a setting is not above 0.

    Example:
        >>> interior_point_barrier(torch.tensor([1.0, 0.1, -1.0]), sharpness=1.0, floor=0.1)
        tensor([-0.0000,  2.3026, 13.3026])

    Source:
        Liu et al. 2020, arXiv 1910.09615, equation 9; the tangent: Kervadec et al. 2019, arXiv 1904.04205.
    """
    checks.floating(slack, "slack")
    checks.finite(slack.detach(), "slack")
    checks.positive(sharpness, "sharpness")
    checks.positive(floor, "floor")
    above = slack.clamp_min(floor)
    return -(above.log() + (slack - above) / floor) / sharpness


def extension_thresholds(
    returns: Float[Tensor, "*batch objectives"], *, beta: float = 0.9
) -> Float[Tensor, "*batch objectives"]:
    r"""Return what each objective must keep while another is extended, :math:`G - (1 - \beta)|G|`.

    Args:
        returns: G of the policies to be extended.
        beta: At most 1; 0.9 is the paper's. At 1 nothing may be lost.

    Returns:
        The thresholds.

    Raises:
        TypeError: If ``returns`` is no floating-point tensor.
        ValueError: If it is not finite, or ``beta`` is above 1 or not finite.

    Example:
        >>> extension_thresholds(torch.tensor([10.0, -10.0]))
        tensor([  9., -11.])

    Source:
        Liu et al. 2025, arXiv 2410.02236, section 4.3; for negative returns: derived.
    """
    checks.floating(returns, "returns")
    checks.finite(returns, "returns")
    checks.between(beta, "beta", -torch.inf, 1.0, low_open=True)
    return returns - (1 - beta) * returns.abs()


def weighted_loss(weights: Float[Tensor, "policies objectives"], *, clip: float = 0.2) -> PolicyLoss:
    """Return PPO's loss of weighted sums of the objectives, each in units of its deviation.

    Args:
        weights: Of each policy.
        clip: Of the ratio.
    """

    def loss(logp: Tensor, rows: Experience) -> Tensor:
        advantages = (rows.advantages * (weights / rows.scales)[:, None]).sum(-1)
        return clipped_policy_loss(logp, rows.logp, standardize(advantages), clip=clip).mean(1)

    return loss


def standardize(advantages: Float[Tensor, "policies rows"]) -> Float[Tensor, "policies rows"]:
    """Return advantages less their mean, in standard deviations, for each policy."""
    centred = advantages - advantages.mean(1, keepdim=True)
    return centred / (advantages.std(1, correction=0, keepdim=True) + 1e-8)


class Extension:
    r"""Extend policies, each towards one objective while the others are held.

    The thresholds come from the first experience, of the policies to be extended themselves, so that they are measured
    as the returns are that must keep to them.

    Args:
        trainer: Of the policies.
        goals: i of each, ``(policies,)``.
        solver: "ipo" or "cpo".
        beta: Share to be kept.
        sharpness: Of the interior point.
        max_kl: Of the trust region.
    """

    def __init__(
        self, trainer: ParallelPPO, goals: Tensor, *, solver: str, beta: float, sharpness: float, max_kl: float
    ) -> None:
        self.trainer, self.goals, self.solver = trainer, goals, solver
        self.beta, self.sharpness, self.max_kl = beta, sharpness, max_kl
        self.thresholds: Tensor | None = None
        self.units = torch.empty(0)

    def update(self, experience: Experience) -> None:
        """Take a step from experience.

        Args:
            experience: Of the trainer's policies.
        """
        if self.thresholds is None:
            self.thresholds = extension_thresholds(experience.returns, beta=self.beta)
            size = experience.returns.abs()
            self.units = torch.where(size > 1e-6 * experience.scales, size, experience.scales)
        if self.solver == "cpo":
            self._trust_region(experience)
        self.trainer.improve(experience, None if self.solver == "cpo" else self.loss)

    def slack(self, ratio: Tensor, rows: Experience) -> Tensor:
        """Return by what share of its size each objective is above its threshold, ``(policies, objectives)``."""
        assert self.thresholds is not None
        return (rows.nearby_returns(ratio) - self.thresholds) / self.units

    def loss(self, logp: Tensor, rows: Experience) -> Tensor:
        """Compute PPO's loss of each policy's own objective, and the barriers of the others."""
        advantages = standardize(_own(rows.advantages, self.goals))
        objective = clipped_policy_loss(logp, rows.logp, advantages, clip=self.trainer.settings.clip).mean(1)
        barrier = interior_point_barrier(self.slack((logp - rows.logp).exp(), rows), sharpness=self.sharpness)
        return objective + barrier.sum(1) - _own(barrier, self.goals)

    def _trust_region(self, experience: Experience) -> None:
        trainer, parameters = self.trainer, list(self.trainer.parameters.values())
        others = torch.arange(experience.returns.shape[1], device=self.goals.device).expand_as(experience.returns)
        others = others[others != self.goals[:, None]].view(len(self.goals), -1)
        advantages = standardize(_own(experience.advantages, self.goals))
        acted = ActionLaw(experience.law, trainer.env.discrete)

        def measure(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            law = ActionLaw(evaluate_stacked(trainer.network, weights, experience.observations)[0], acted.discrete)
            ratio = (law.log_probability(experience.actions) - experience.logp).exp()
            gain, slack = (ratio * advantages).mean(1), self.slack(ratio, experience)
            return gain, -slack.gather(1, others), acted.divergence(law).mean(1)

        gain, violations, divergence = measure(trainer.parameters)
        rows = torch.cat([gain[:, None], violations], 1).sum(0)
        gradients = gradients_of_rows([rows], parameters, [torch.eye(len(rows)).to(rows)])
        flat = flatten(gradients, batch_dims=2)
        found = trust_region_step(
            flat[0],
            fisher_product(divergence.sum(), parameters, damping=_DAMPING, batch_dims=1),
            constraint_gradients=flat[1:].movedim(0, 1),
            violations=violations.detach(),
            max_kl=self.max_kl,
        )
        before, broken = gain.detach(), violations.detach().clamp_min(0)

        def moved(step: Tensor) -> dict[str, Tensor]:
            pieces = unflatten(step, parameters, batch_dims=1)
            return {
                name: value + piece for (name, value), piece in zip(trainer.parameters.items(), pieces, strict=True)
            }

        def accept(step: Tensor) -> Tensor:
            after, left, distance = measure(moved(step))
            # Recovery may cost the objective; nothing else may.
            return (
                (distance <= 1.5 * self.max_kl) & ((after >= before) | ~found.feasible) & (left <= broken + 1e-6).all(1)
            )

        with torch.no_grad():
            step = backtracking(found.step, accept).step
            for value, piece in zip(parameters, unflatten(step, parameters, batch_dims=1), strict=True):
                value.add_(piece)


def _own(values: Tensor, goals: Tensor) -> Tensor:
    """Pick each policy's own objective from the last dimension."""
    return values.gather(-1, goals.view(-1, *[1] * (values.dim() - 1)).expand(*values.shape[:-1], 1)).squeeze(-1)
