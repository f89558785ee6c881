r"""Queries chosen by a policy that is trained against the hardest instances, and the exact game in a table.

A game has hypotheses z, queries x and a budget of T queries. An instance :math:`\theta` answers query x by
:math:`\langle x, \theta \rangle` and noise; its best hypothesis is :math:`\arg\max_z \langle z, \theta \rangle`. A
policy sees the answers so far and chooses the next query; in the end the guess is the hypothesis that suits the answers
best, and :math:`\ell(\pi, \theta)` the expected loss. How often each query was made and the sum of its answers are
sufficient. With answers of plus and minus one to unit queries the states are few: there are :math:`\binom{t + 2d -
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
trained by gradients, with instances that climb inside the class (:class:`InstanceClasses`): gradients of the exact loss
(:func:`train_robust_policy`), or estimated from games that are played (:func:`train_sampled_policy`) where the states
are too many or the answers real numbers.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (classes by complexity, the gap to the best of each, training
by adversarial instances and scores). The exact game, its solver and the way back into a class are ours.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import checks
from .instance_classes import InstanceClasses, Instances
from .query_game import QueryGame
from .sampled_game import SampledQueryGame

_REFRESH = 5
_MEMORY = 0.8


@dataclasses.dataclass(frozen=True)
class RobustTraining:
    """What training against instances reports; the policy itself is trained in place.

    Args:
        instances: Where the adversary's instances ended.
        losses: Of the policy on these, less the values of their classes, ``(instances,)``; estimated where games are
            sampled.
        worst: Before every step, the loss less value by the adversary's weights where games are sampled, else the
            largest that it held, ``(num_steps,)``.
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
        policy: ``(counts, sums) -> probabilities``, such as :class:`QueryNetwork`; trained in place.
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
    _check_classes(radii, values, num_instances)
    _check_settings(num_steps, redraw_every, sharpness=sharpness, lr=lr, instance_lr=instance_lr)
    adversary = _Adversary(game.classes, radii, values, num_instances, generator)
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
        adversary.climb(instance_lr * game._uphill(adversary.theta, reach.detach()))
        if (step + 1) % redraw_every == 0:
            adversary.redraw(losses.detach())
    with torch.no_grad():
        losses = game.loss(game.table(policy), adversary.theta) - adversary.value
    return RobustTraining(Instances(adversary.theta, adversary.best), losses, torch.stack(worst))


def train_sampled_policy(
    policy: nn.Module,
    game: SampledQueryGame,
    *,
    radii: Float[Tensor, " classes"],
    values: Float[Tensor, " classes"] | None = None,
    num_instances: int = 64,
    games: int = 16,
    num_steps: int = 200,
    sharpness: float = 10.0,
    lr: float = 1e-2,
    instance_lr: float = 0.03,
    redraw_every: int = 20,
    floor: float = 0.3,
    generator: torch.Generator | None = None,
) -> RobustTraining:
    r"""Train a policy on :math:`\min_\pi \max_k \max_{\theta \in \Theta_{r_k}} \ell(\pi, \theta) - V_k` by playing.

    As :func:`train_robust_policy`, with all gradients estimated from games: :meth:`PlayedGames.policy_surrogate` for
    the policy, :meth:`PlayedGames.instance_gradients`, averaged over steps, for the instances. Weights are
    :math:`w_i = (1 - c)\, \mathrm{softmax}_i(\beta \bar\ell_i) + c / N` of running means :math:`\bar\ell_i` of losses
    less values; the floor keeps old adversaries in play.

    Args:
        policy: ``(counts, sums) -> probabilities``, such as :class:`QueryScorer`; trained in place.
        game: Is played.
        radii: r of each class.
        values: V of each class; None for 0.
        num_instances: N, of the adversary, at least one a class.
        games: Of each instance in a step, at least 2.
        num_steps: Steps of both players.
        sharpness: beta, of the weights of the instances; half of that for exact losses, since estimates are
            noisy. It and the numbers below are ours.
        lr: Adam's learning rate, which falls to a tenth.
        instance_lr: Length of the instances' steps, in units of the bound of the game's instances.
        redraw_every: After so many steps the quarter of the instances with the least loss is drawn anew.
        floor: c, in [0, 1].
        generator: Draws instances and games; torch's default if None.

    Returns:
        A :class:`RobustTraining`.

    Raises:
        ValueError: If a class is empty.
        FloatingPointError: If the policy ceases to be finite.

    Example:
        >>> from minimand.online import QueryScorer
        >>> arms = torch.eye(3)
        >>> game, policy = SampledQueryGame(arms, budget=6, bound=2.0), QueryScorer(arms, budget=6)
        >>> generator = torch.Generator().manual_seed(0)
        >>> report = train_sampled_policy(policy, game, radii=torch.tensor([6.0]), num_steps=3, generator=generator)
        >>> report.worst.shape, len(report.instances)
        (torch.Size([3]), 64)

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382. There the weights are logits that climb too; here they are the
        best answer of an adversary who is paid for entropy, as in :func:`train_robust_policy`.
    """
    _check_classes(radii, values, num_instances)
    _check_settings(num_steps, redraw_every, sharpness=sharpness, lr=lr, instance_lr=instance_lr)
    checks.between(floor, "floor", 0, 1)
    if games < 2:
        raise ValueError(f"games must be at least 2: the baseline is the mean of the others, got {games}")
    adversary = _Adversary(game.classes, radii, values, num_instances, generator)
    average, direction = torch.zeros_like(adversary.value), torch.zeros_like(adversary.theta)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** (step / num_steps))
    worst = []
    for step in range(num_steps):
        played = game.play(policy, adversary.theta, games=games, generator=generator)
        losses = played.mean_losses - adversary.value
        average = losses if not step else torch.lerp(losses, average, _MEMORY)
        weights = (1 - floor) * (sharpness * average).softmax(0) + floor / len(average)
        objective = weights @ played.policy_surrogate()
        if not bool(torch.isfinite(objective)):
            raise FloatingPointError(f"the policy is not finite at step {step}: try a lower lr")
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        schedule.step()
        worst.append(weights @ losses)
        direction = _MEMORY * direction + played.instance_gradients()
        length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True).clamp_min(1e-12)
        adversary.climb(instance_lr * game.classes.bound * direction / length)
        if (step + 1) % redraw_every == 0:
            lowest = adversary.redraw(average)
            direction = direction.index_fill(0, lowest, 0.0)
            average = average.index_fill(0, lowest, float(average.mean()))
    with torch.no_grad():
        losses = game.play(policy, adversary.theta, games=16 * games, generator=generator).mean_losses
    return RobustTraining(Instances(adversary.theta, adversary.best), losses - adversary.value, torch.stack(worst))


class _Adversary:
    """Instances that climb inside their classes."""

    def __init__(
        self,
        classes: InstanceClasses,
        radii: Tensor,
        values: Tensor | None,
        count: int,
        generator: torch.Generator | None,
    ) -> None:
        self.classes, self.radii, self.generator, self.age = classes, radii.tolist(), generator, 0
        self.shares = [len(range(place, count, len(radii))) for place in range(len(radii))]
        drawn = [
            classes.draw(share, radius=radius, generator=generator)
            for share, radius in zip(self.shares, self.radii, strict=True)
        ]
        self.theta = torch.cat([one.theta for one in drawn])
        self.best = torch.cat([one.best for one in drawn])
        known = torch.zeros_like(radii) if values is None else values
        self.value = known.to(self.theta).repeat_interleave(torch.tensor(self.shares, device=self.theta.device))

    def climb(self, step: Tensor) -> None:
        """Move by a step, and come back into the classes."""
        if self.age % _REFRESH == 0:
            self.measure = self.classes.measure(self.theta, self.best)
        self.age += 1
        parts = zip(*(each.split(self.shares) for each in (self.theta, self.best, step)), strict=True)
        measures = zip(self.measure.split(self.shares), self.radii, strict=True)
        self.theta = torch.cat(
            [
                self.classes.move(theta, best, moved, radius=radius, measure=measure)
                for (theta, best, moved), (measure, radius) in zip(parts, measures, strict=True)
            ]
        )

    def redraw(self, losses: Tensor) -> Tensor:
        """Draw the quarter of least loss in each class anew; return which."""
        start, lowest = 0, []
        for share, radius in zip(self.shares, self.radii, strict=True):
            count = share // 4
            if count:
                rows = start + losses[start : start + share].argsort()[:count]
                fresh = self.classes.draw(count, radius=radius, generator=self.generator)
                self.theta = self.theta.index_copy(0, rows, fresh.theta)
                self.best = self.best.index_copy(0, rows, fresh.best)
                lowest.append(rows)
            start += share
        self.age = 0
        return torch.cat(lowest) if lowest else self.best[:0]


def _check_classes(radii: Tensor, values: Tensor | None, num_instances: int) -> None:
    checks.floating(radii, "radii")
    if radii.dim() != 1 or not len(radii):
        raise ValueError(f"radii must have shape (classes,), got {tuple(radii.shape)}")
    checks.finite(radii, "radii")
    if num_instances < len(radii):
        raise ValueError(f"num_instances must be at least the number of classes, {len(radii)}, got {num_instances}")
    if values is None:
        return
    checks.floating(values, "values")
    checks.finite(values, "values")
    if values.shape != radii.shape:
        raise ValueError(f"values must have the shape of radii, {tuple(radii.shape)}, got {tuple(values.shape)}")


def _check_settings(num_steps: int, redraw_every: int, **positive: float) -> None:
    for name, value in positive.items():
        checks.positive(value, name)
    for name, count in (("num_steps", num_steps), ("redraw_every", redraw_every)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
