r"""Queries chosen by a policy that is trained against the hardest instances, and the exact game in a table.

A game has hypotheses z, two labels a query, and a budget of T queries. An instance :math:`\theta \in [-1, 1]^d` answers
query x by :math:`y = \pm 1` with mean :math:`\theta_x`; its best hypothesis is :math:`\arg\max_z \langle z, \theta
\rangle`. A policy sees the answers so far and chooses the next query; in the end the guess is the hypothesis that suits
the average answers best. Counts of answers are sufficient, so the states are few: there are :math:`\binom{t + 2d -
1}{2d - 1}` after t answers, and the loss is linear in how often a policy reaches the last ones,

.. math:: \ell(\pi, \theta) = \sum_s w_\pi(s) P_\theta(s) L(s, \theta), \qquad
          w_\pi(s) = \sum_{\text{orders of } s} \prod_t \pi(x_t | s_t), \quad
          P_\theta(s) = \prod_x \Big(\frac{1 + \theta_x}{2}\Big)^{n_x^+} \Big(\frac{1 - \theta_x}{2}\Big)^{n_x^-}.

Classes :math:`\Theta_r = \{\theta: C(\theta) \le r\}` group instances by complexity. With the value of each class,
:math:`V_r = \min_\pi \max_{\theta \in \Theta_r} \ell(\pi, \theta)`, the policy wanted is the one that comes nearest to
the best on every class,

.. math:: \min_\pi \max_\theta\ \ell(\pi, \theta) - V_{r(\theta)}.

Against finitely many instances both problems are solved exactly (:meth:`QueryGame.solve`): the best answer to a mixture
of instances comes from dynamic programming, and mixtures of policies are policies. Against a whole class a policy is
trained by gradients through the exact loss (:func:`train_robust_policy`), with instances that climb inside the class.
For one best hypothesis, :math:`C(\theta)^{-1/2} = \max_\lambda \min_z \langle z^* - z, \theta \rangle / \|z^* -
z\|_{A(\lambda)^{-1}}` is concave, because the norm is convex in :math:`\lambda`. So the part of a class with that best
hypothesis is convex, and an instance that has left it is brought back along the line to the noiseless one.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (classes by complexity, the gap to the best of each, training
by adversarial instances). The exact game, its solver and the way back into a class are ours.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from .query_game import Instances, QueryGame


@dataclasses.dataclass(frozen=True)
class RobustTraining:
    """What :func:`train_robust_policy` reports; the policy itself is trained in place.

    Args:
        instances: Where the adversary's instances ended.
        losses: Of the policy on these, less the values of their classes, ``(instances,)``.
        worst: The largest loss less value that the adversary held, before every step, ``(num_steps,)``.
    """

    instances: Instances
    losses: Tensor
    worst: Tensor


def train_robust_policy(
    policy: nn.Module,
    game: QueryGame,
    *,
    radii: Float[Tensor, " classes"],
    values: Float[Tensor, " classes"] | None = None,
    num_instances: int = 64,
    num_steps: int = 400,
    sharpness: float = 20.0,
    lr: float = 3e-3,
    instance_lr: float = 0.03,
    redraw_every: int = 20,
    generator: torch.Generator | None = None,
) -> RobustTraining:
    r"""Train a policy on :math:`\min_\pi \max_k \max_{\theta \in \Theta_{r_k}} \ell(\pi, \theta) - V_k`, exact losses.

    The instances are shared out among the classes, climb the gradient of their loss and are brought back into their
    class; the policy descends by Adam the loss weighed by :math:`w_i \propto \exp(\beta(\ell_i - V_i))`, at a rate that
    falls to a tenth. One radius and no value is the training for one class, whose worst loss estimates its value; all
    radii and these values are the training for the policy that is near the best on each. Classes are nested, so that an
    instance may also count with the larger values of the classes around its own, which never decide.

    Args:
        policy: ``(positives, negatives) -> probabilities``, such as :class:`QueryNetwork`; trained in place.
        game: Gives the losses.
        radii: r of each class.
        values: V of each class; None for 0.
        num_instances: Of the adversary, at least one a class.
        num_steps: Steps of both players.
        sharpness: beta, of the weights of the instances. 20, and the numbers below, are ours.
        lr: Adam's learning rate.
        instance_lr: Length of the instances' steps.
        redraw_every: After so many steps the quarter of the instances with the least loss is drawn anew.
        generator: Draws instances; torch's default if None.

    Returns:
        A :class:`RobustTraining`.

    Raises:
        ValueError: If a class is empty.
        FloatingPointError: If the loss ceases to be finite.

    Example:
        >>> from minimand.online import QueryNetwork, thresholds
        >>> game = QueryGame(thresholds(2), budget=3)
        >>> policy = QueryNetwork(2, budget=3, hidden=(16,))
        >>> generator = torch.Generator().manual_seed(0)
        >>> report = train_robust_policy(policy, game, radii=torch.tensor([6.0]), num_steps=3, generator=generator)
        >>> report.worst.shape, len(report.instances)
        (torch.Size([3]), 64)

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382. The paper estimates these gradients from rollouts; exact losses
        and normalised steps are ours.
    """
    checks.floating(radii, "radii")
    if radii.dim() != 1 or not len(radii):
        raise ValueError(f"radii must have shape (classes,), got {tuple(radii.shape)}")
    checks.finite(radii, "radii")
    if values is not None:
        checks.floating(values, "values")
        checks.finite(values, "values")
        if values.shape != radii.shape:
            raise ValueError(f"values must have the shape of radii, {tuple(radii.shape)}, got {tuple(values.shape)}")
    for name, value in (("sharpness", sharpness), ("lr", lr), ("instance_lr", instance_lr)):
        checks.positive(value, name)
    if num_instances < len(radii) or redraw_every < 1 or num_steps < 1:
        raise ValueError(
            f"num_instances must be at least the number of classes, {len(radii)}, num_steps and redraw_every at least "
            f"1, got {num_instances}, {num_steps} and {redraw_every}"
        )
    adversary = _Adversary(game, radii, values, num_instances, generator)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** (step / num_steps))
    worst = []
    for step in range(num_steps):
        reach = game._reach(game.table(policy))[-1]
        losses = game._losses(adversary.theta) @ reach - adversary.value
        weights = (sharpness * losses.detach()).softmax(0)
        objective = weights @ losses
        if not bool(torch.isfinite(objective)):
            raise FloatingPointError(f"the loss is not finite at step {step}: try a lower lr")
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        schedule.step()
        worst.append(losses.detach().max())
        adversary.climb(reach.detach(), instance_lr)
        if (step + 1) % redraw_every == 0:
            adversary.redraw(losses.detach())
    with torch.no_grad():
        losses = game.loss(game.table(policy), adversary.theta) - adversary.value
    return RobustTraining(Instances(adversary.theta, adversary.best), losses, torch.stack(worst))


class _Adversary:
    """Instances that climb inside their classes."""

    def __init__(
        self,
        game: QueryGame,
        radii: Tensor,
        values: Tensor | None,
        count: int,
        generator: torch.Generator | None,
    ) -> None:
        self.game, self.generator = game, generator
        self.radii = radii.tolist()
        shares = [len(range(place, count, len(radii))) for place in range(len(radii))]
        drawn = [
            game.draw_instances(share, radius=radius, generator=generator)
            for share, radius in zip(shares, self.radii, strict=True)
        ]
        self.shares = shares
        self.theta = torch.cat([one.theta for one in drawn])
        self.best = torch.cat([one.best for one in drawn])
        known = torch.zeros_like(radii) if values is None else values
        self.value = known.to(self.theta).repeat_interleave(torch.tensor(shares, device=self.theta.device))

    def climb(self, reach: Tensor, length: float) -> None:
        moved = self.theta + length * self.game._uphill(self.theta, reach)
        parts = zip(moved.split(self.shares), self.best.split(self.shares), self.radii, strict=True)
        self.theta = torch.cat([self.game.retract(theta, best, radius=radius) for theta, best, radius in parts])

    def redraw(self, losses: Tensor) -> None:
        thetas, bests = list(self.theta.split(self.shares)), list(self.best.split(self.shares))
        for place, (share, radius, loss) in enumerate(
            zip(self.shares, self.radii, losses.split(self.shares), strict=True)
        ):
            if share < 4:
                continue
            lowest = loss.argsort()[: share // 4]
            fresh = self.game.draw_instances(len(lowest), radius=radius, generator=self.generator)
            thetas[place] = thetas[place].index_copy(0, lowest, fresh.theta)
            bests[place] = bests[place].index_copy(0, lowest, fresh.best)
        self.theta, self.best = torch.cat(thetas), torch.cat(bests)
