r"""The game of choosing queries, played out: for more states than a table holds, and for answers that are real numbers.

Games are drawn, many at once, and the gradients of the expected loss are estimated by scores. For games g of one
instance, with losses :math:`L_g` and the mean :math:`b_g` of the losses of the *other* games of that instance,

.. math:: \nabla_\psi \ell \approx \frac1G \sum_g (L_g - b_g) \sum_t \nabla_\psi \log \pi_\psi(x_t | s_t), \qquad
          \nabla_\theta \ell \approx \frac1G \sum_g \nabla_\theta L_g + (L_g - b_g) \sum_t \nabla_\theta \log
          f(y_t | \theta, x_t),

both without bias, since :math:`b_g` is independent of game g. The score of an answer is :math:`(y - \mu_x) x` for
Gaussian answers of variance 1 and mean :math:`\mu_x = \langle x, \theta \rangle`, and :math:`y x / (1 + y \mu_x)` for
answers of plus and minus one.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (gradients by scores). The baseline that leaves one out is ours,
and so is taking the expectation over guesses that tie.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from .answer_counts import TIE, Noise, Policy, check_budget, check_probabilities, guess
from .instance_classes import InstanceClasses

_CERTAIN = 1e-6


@dataclasses.dataclass(frozen=True)
class PlayedGames:
    """Games that were played, ``games`` of each of the instances.

    Args:
        counts: Answers to each query at the end, ``(instances, games, queries)``.
        sums: Their sums.
        losses: Expected over guesses that tie, ``(instances, games)``.
        log_probabilities: Of the queries made; gradients flow to the policy, ``(instances, games)``.
        scores: Gradient of the log-likelihood of the answers in the instance, ``(instances, games, dim)``.
        loss_slopes: Gradient of the loss itself in the instance, ``(instances, games, dim)``.
    """

    counts: Tensor
    sums: Tensor
    losses: Tensor
    log_probabilities: Tensor
    scores: Tensor
    loss_slopes: Tensor

    @property
    def mean_losses(self) -> Tensor:
        """Estimate of each instance's loss, ``(instances,)``."""
        return self.losses.mean(-1)

    def policy_surrogate(self) -> Tensor:
        """Return numbers whose gradients in the policy estimate those of the losses, ``(instances,)``."""
        return (self._advantages() * self.log_probabilities).mean(-1)

    def instance_gradients(self) -> Tensor:
        """Return an estimate of the gradient of each instance's loss in the instance, ``(instances, dim)``."""
        return (self.loss_slopes + self._advantages()[..., None] * self.scores).mean(-2)

    def _advantages(self) -> Tensor:
        games = self.losses.shape[-1]
        if games < 2:
            raise ValueError("gradients need at least 2 games of each instance: the baseline is the mean of the others")
        return (self.losses - self.losses.mean(-1, keepdim=True)) * (games / (games - 1))


class SampledQueryGame:
    r"""The game of identifying a hypothesis by a budget of noisy answers, played out by drawing queries and answers.

    Query x is answered by :math:`\langle x, \theta \rangle` plus noise of variance 1, or by plus and minus one with
    that mean. The guess is the best hypothesis for the instance of least squares. Neither hypotheses nor queries are
    restricted: that they differ is the transductive linear bandit; queries that are the hypotheses are the linear one.

    Args:
        hypotheses: Rows z, all different.
        budget: T, queries in all.
        queries: Rows x, which tell all hypotheses apart; None for the unit vectors.
        noise: ``"gaussian"`` or ``"bernoulli"``.
        loss: ``"error"`` is 1 for a wrong guess; ``"regret"`` is :math:`\langle z^* - z, \theta \rangle`.
        bound: Largest mean answer of an instance of the classes, in standard deviations of the noise; 1 for
            ``"bernoulli"``, whatever is given.

    Attributes:
        classes: The :class:`InstanceClasses` of the game.

    Raises:
        ValueError: If a hypothesis comes twice, or the queries cannot tell two apart.

    Example:
        >>> from minimand.online import uniform_allocation
        >>> game = SampledQueryGame(torch.eye(2), budget=2)  # two arms, pulled once each: Phi(-1 / sqrt 2)
        >>> theta = torch.tensor([[1.0, 0.0]])
        >>> games = game.play(uniform_allocation, theta, games=20_000, generator=torch.Generator().manual_seed(0))
        >>> abs(games.mean_losses.item() - 0.2398) < 0.01
        True

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382.
    """

    def __init__(
        self,
        hypotheses: Float[Tensor, "hypotheses dim"],
        *,
        budget: int,
        queries: Float[Tensor, "queries dim"] | None = None,
        noise: Noise = "gaussian",
        loss: Literal["error", "regret"] = "error",
        bound: float = 1.0,
    ) -> None:
        check_budget(budget)
        checks.one_of(noise, "noise", ("gaussian", "bernoulli"))
        checks.one_of(loss, "loss", ("error", "regret"))
        self.budget, self.noise, self.objective = budget, noise, loss
        self.classes = InstanceClasses(hypotheses, queries=queries, bound=bound if noise == "gaussian" else 1.0)
        self.num_queries = hypotheses.shape[1] if queries is None else len(queries)

    def play(
        self,
        policy: Policy,
        theta: Float[Tensor, "instances dim"],
        *,
        games: int,
        generator: torch.Generator | None = None,
    ) -> PlayedGames:
        """Play games of each instance, all of them at once.

        Args:
            policy: ``(counts, sums) -> probabilities`` of the queries, all ``(instances * games, queries)``.
            theta: The instances.
            games: How many of each.
            generator: Draws queries and answers; torch's default if None.

        Raises:
            ValueError: If the policy does not return probabilities of the queries, or a mean of a ``"bernoulli"``
                answer lies outside of [-1, 1].
        """
        self._check_theta(theta)
        if games < 1:
            raise ValueError(f"games must be at least 1, got {games}")
        instances = theta.detach().repeat_interleave(games, 0)
        means = self.classes.means(instances.double()).to(instances)
        counts, sums, scores = torch.zeros_like(means), torch.zeros_like(means), torch.zeros_like(means)
        chosen = means.new_zeros(len(means))
        for _ in range(self.budget):
            probabilities = policy(counts, sums)
            check_probabilities(probabilities, "what the policy returns", means.shape)
            query = self._draw(probabilities.detach(), generator)
            chosen = chosen + probabilities.gather(-1, query).squeeze(-1).log()
            mean = means.gather(-1, query)
            answer, score = self._answer(mean, generator)
            # New tensors, as a policy's graph may hold the old ones.
            counts, sums = counts.scatter_add(-1, query, torch.ones_like(mean)), sums.scatter_add(-1, query, answer)
            scores = scores.scatter_add(-1, query, score)
        losses, slopes = self._losses(counts, sums, instances)
        rows = self.classes.queries
        scores = scores if rows is None else scores @ rows.to(scores)
        parts = [counts, sums, losses, chosen, scores, slopes]
        return PlayedGames(*(part.unflatten(0, (len(theta), games)) for part in parts))

    def worst_instance(
        self,
        policy: Policy,
        *,
        radius: float,
        restarts: int = 64,
        num_steps: int = 60,
        games: int = 32,
        final_games: int = 4096,
        lr: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, " dim"], float]:
        r"""Search :math:`\Theta_r` for the instance of largest loss, and estimate its loss by games of its own.

        Instances climb estimated gradients; those of largest loss at the start and at the end are played again, twice
        as often with half as many left, until one is: its loss comes from fresh games, which chose nothing. So it is an
        unbiased estimate of the loss of an instance in the class, and bounds the largest from below.

        Args:
            policy: ``(counts, sums) -> probabilities``.
            radius: r.
            restarts: Instances that climb.
            num_steps: Steps of each.
            games: Of each instance in a step.
            final_games: Of the instance found.
            lr: Length of the first step, in units of the bound; it shrinks to a tenth.
            generator: Draws instances and games; torch's default if None.

        Returns:
            The instance, and its estimated loss, whose standard error is at most the largest loss over twice the root
            of ``final_games``.
        """
        found = self.classes.draw(restarts, radius=radius, generator=generator)
        theta, direction = found.theta, torch.zeros_like(found.theta)
        with torch.no_grad():
            for step in range(num_steps):
                if step % 10 == 0:
                    measure = self.classes.measure(theta, found.best)
                slope = self.play(policy, theta, games=games, generator=generator).instance_gradients()
                direction = 0.8 * direction + slope
                length = lr * self.classes.bound * 0.1 ** (step / max(num_steps - 1, 1))
                unit = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True).clamp_min(1e-12)
                theta = self.classes.move(theta, found.best, length * unit, radius=radius, measure=measure)
            contest = torch.cat([theta, found.theta])
            while len(contest) > 1:
                played = self.play(policy, contest, games=games, generator=generator)
                contest = contest[played.mean_losses.topk(len(contest) // 2).indices]
                games *= 2
            final = self.play(policy, contest, games=final_games, generator=generator)
        return contest[0], float(final.mean_losses)

    def _draw(self, probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
        device = probabilities.device if generator is None else generator.device
        return torch.multinomial(probabilities.to(device), 1, generator=generator).to(probabilities.device)

    def _answer(self, mean: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return an answer to each query, and the slope of its log-likelihood in its mean."""
        device = mean.device if generator is None else generator.device
        if self.noise == "gaussian":
            noise = torch.randn(mean.shape, dtype=mean.dtype, device=device, generator=generator).to(mean)
            return mean + noise, noise
        drawn = torch.rand(mean.shape, dtype=mean.dtype, device=device, generator=generator).to(mean)
        answer = torch.where(drawn < (1 + mean) / 2, 1.0, -1.0).to(mean)
        return answer, answer / (1 + answer * mean).clamp_min(_CERTAIN)

    def _losses(self, counts: Tensor, sums: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        hypotheses = self.classes.hypotheses
        guesses = guess(counts, sums, hypotheses, self.classes.queries)
        values = theta.double() @ hypotheses.mT
        gaps = values.amax(-1, keepdim=True) - values
        if self.objective == "error":
            losses = (guesses * (gaps > TIE)).sum(-1)
            return losses.to(theta), torch.zeros_like(theta)
        best = hypotheses[values.argmax(-1)]
        return (guesses * gaps).sum(-1).to(theta), (best - guesses @ hypotheses).to(theta)

    def _check_theta(self, theta: Tensor) -> None:
        checks.floating(theta, "theta")
        dim = self.classes.hypotheses.shape[1]
        if theta.dim() != 2 or not len(theta) or theta.shape[1] != dim:
            raise ValueError(f"theta must have shape (instances, {dim}), got {tuple(theta.shape)}")
        checks.finite(theta, "theta")
        if self.noise == "bernoulli":
            means = self.classes.means(theta.detach().double())
            checks.require(means.abs() <= 1 + TIE, lambda: "theta must have means of answers in [-1, 1]")

    def __repr__(self) -> str:
        shape = tuple(self.classes.hypotheses.shape)
        return (
            f"SampledQueryGame(hypotheses={shape}, budget={self.budget}, num_queries={self.num_queries}, "
            f"noise={self.noise!r}, loss={self.objective!r})"
        )
