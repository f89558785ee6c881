r"""Streams of losses between stochastic and adversarial, with noise and drift that are known exactly.

In the stochastically extended adversary (SEA) a law of losses may change from round to round. Two numbers say where a
stream lies between the extremes: with the mean loss :math:`F_t = E f_t`,

.. math:: \sigma_t^2 = \max_x E \|\nabla f_t(x) - \nabla F_t(x)\|^2, \qquad
          \Sigma_t^2 = \max_x \|\nabla F_t(x) - \nabla F_{t-1}(x)\|^2,

summed over rounds: :math:`\sigma_{1:T}^2` is 0 for an adversary without noise, :math:`\Sigma_{1:T}^2` (from the second
round on) is 0 for independent draws from one law.

Source: Sachs, Hadiji, van Erven and Guzmán, "Between Stochastic and Adversarial Online Convex Optimization", NeurIPS
2022, arXiv 2202.07554; Chen et al., JMLR 25 (2024), arXiv 2302.04552.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..projections import Ball, Box, Projection, Simplex
from .domains import project_rows


@dataclasses.dataclass(frozen=True)
class SEAStream:
    r"""Losses of many independent streams, all with the same means: linear, or quadratic with moving minimisers.

    .. math:: f_t(x) = \langle c_t + \sigma \xi_t, x \rangle \quad \text{or} \quad
              f_t(x) = \tfrac12 \|x - c_t - \sigma \xi_t\|^2, \qquad \xi_t \text{ uniform on the unit sphere.}

    Build one with :meth:`blocks`, :meth:`fixed`, :meth:`corrupted` or :meth:`rotating`, or from means of your own.

    Args:
        means: The :math:`c_t`, ``(rounds, dim)``.
        noise: The :math:`\sigma \xi_t`, ``(rounds, streams, dim)``.
        noise_level: Sigma.
        quadratic: Whether the losses are the quadratic ones.

    Example:
        >>> stream = SEAStream.blocks(100, block=20, streams=3, dim=5, noise=0.3)
        >>> round(float(stream.cumulative_variation), 6)  # four changes of sign, each of a gradient by 2
        16.0

    Source:
        Sachs et al. 2022, arXiv 2202.07554, section 1; Chen et al. 2024, arXiv 2302.04552, section 5.
    """

    means: Tensor
    noise: Tensor
    noise_level: float
    quadratic: bool = False

    def __post_init__(self) -> None:
        checks.floating(self.means, "means")
        checks.finite(self.means, "means")
        checks.non_negative(self.noise_level, "noise_level")
        wanted = (self.means.shape[0], self.means.shape[-1])
        if self.means.dim() != 2 or self.noise.dim() != 3 or (self.noise.shape[0], self.noise.shape[2]) != wanted:
            raise ValueError(
                "means must have shape (rounds, dim) and noise (rounds, streams, dim), "
                f"got {tuple(self.means.shape)} and {tuple(self.noise.shape)}"
            )

    @classmethod
    def blocks(
        cls, rounds: int, *, block: int, streams: int = 1, dim: int = 10, noise: float = 0.0, seed: int = 0
    ) -> SEAStream:
        """Draw linear losses whose mean, of norm 1, changes its sign after every block of rounds.

        Args:
            rounds: T.
            block: How long the sign is kept; 1 for a sign that alternates.
            streams: How many independent streams.
            dim: Number of entries of a point.
            noise: Sigma.
            seed: Of the generator.
        """
        _check_counts(rounds=rounds, block=block, streams=streams, dim=dim)
        generator = torch.Generator().manual_seed(seed)
        signs = 1.0 - 2.0 * (torch.arange(rounds) // block % 2).double()
        means = signs[:, None] * _sphere(1, dim, generator)
        return cls(means, noise * _sphere(rounds * streams, dim, generator).view(rounds, streams, dim), noise)

    @classmethod
    def fixed(cls, rounds: int, *, streams: int = 1, dim: int = 10, noise: float = 0.0, seed: int = 0) -> SEAStream:
        """Draw linear losses that are independent and alike: one mean of norm 1, with noise.

        Args:
            rounds: T.
            streams: How many independent streams.
            dim: Number of entries of a point.
            noise: Sigma.
            seed: Of the generator.
        """
        return cls.blocks(rounds, block=max(rounds, 1), streams=streams, dim=dim, noise=noise, seed=seed)

    @classmethod
    def corrupted(
        cls, rounds: int, *, share: float, streams: int = 1, dim: int = 10, noise: float = 0.0, seed: int = 0
    ) -> SEAStream:
        """Draw linear losses of one mean, whose sign an adversary turns in a share of rounds, drawn at random.

        Args:
            rounds: T.
            share: How often the sign is turned, in [0, 1].
            streams: How many independent streams.
            dim: Number of entries of a point.
            noise: Sigma.
            seed: Of the generator.
        """
        checks.between(share, "share", 0.0, 1.0)
        stream = cls.fixed(rounds, streams=streams, dim=dim, noise=noise, seed=seed)
        turned = torch.rand(rounds, 1, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) < share
        return dataclasses.replace(stream, means=torch.where(turned, -stream.means, stream.means))

    @classmethod
    def rotating(
        cls,
        rounds: int,
        *,
        angle: float,
        radius: float = 0.8,
        streams: int = 1,
        dim: int = 5,
        noise: float = 0.0,
        seed: int = 0,
    ) -> SEAStream:
        """Draw quadratic losses whose minimiser turns on a circle around zero.

        Args:
            rounds: T.
            angle: By how many radians it turns a round; 0 for one that rests.
            radius: Of the circle.
            streams: How many independent streams.
            dim: Number of entries of a point, at least 2.
            noise: Sigma.
            seed: Of the generator.
        """
        _check_counts(rounds=rounds, streams=streams, dim=dim)
        if dim < 2:
            raise ValueError(f"dim must be at least 2 for a circle, got {dim}")
        checks.non_negative(radius, "radius")
        generator = torch.Generator().manual_seed(seed)
        plane = torch.linalg.qr(torch.randn(dim, 2, generator=generator, dtype=torch.float64)).Q
        turns = angle * torch.arange(rounds, dtype=torch.float64)
        means = radius * torch.stack([turns.cos(), turns.sin()], -1) @ plane.T
        return cls(means, noise * _sphere(rounds * streams, dim, generator).view(rounds, streams, dim), noise, True)

    @property
    def cumulative_variance(self) -> Float[Tensor, ""]:
        r"""The exact :math:`\sigma_{1:T}^2`."""
        return torch.as_tensor(len(self.means) * self.noise_level**2).to(self.means)

    @property
    def cumulative_variation(self) -> Float[Tensor, ""]:
        r"""The exact :math:`\Sigma_{1:T}^2`, from the second round on."""
        return self.means.diff(dim=0).square().sum()

    def gradient(self, t: int, points: Float[Tensor, "streams dim"]) -> Float[Tensor, "streams dim"]:
        """Return the gradients of the losses of round t, counted from 0, at one point a stream."""
        drawn = self.means[t] + self.noise[t]
        return points - drawn if self.quadratic else drawn.expand_as(points)

    def mean_losses(self, points: Float[Tensor, "rounds streams dim"]) -> Float[Tensor, "rounds streams"]:
        """Return F_t of the point each stream played in each round, for quadratic losses less a constant."""
        means = self.means[:, None]
        return (points - means).square().sum(-1) / 2 if self.quadratic else (points * means).sum(-1)

    def regret(self, points: Float[Tensor, "rounds streams dim"], *, domain: Projection) -> Float[Tensor, " streams"]:
        """Return the regret of the mean losses to the best fixed point of the domain.

        Args:
            points: What each stream played in each round.
            domain: A ball, box or simplex.
        """
        best = self._best(self.means.mean(0), domain)
        return (self.mean_losses(points) - self.mean_losses(best.expand(len(points), 1, -1))).sum(0)

    def dynamic_regret(
        self, points: Float[Tensor, "rounds streams dim"], *, domain: Projection
    ) -> Float[Tensor, " streams"]:
        """Return the regret of the mean losses to the best point of the domain in every round.

        Args:
            points: What each stream played in each round.
            domain: A ball, box or simplex.
        """
        return (self.mean_losses(points) - self.mean_losses(self._best(self.means, domain)[:, None])).sum(0)

    def _best(self, mean: Tensor, domain: Projection) -> Tensor:
        """Return the minimiser over the domain of the loss with that mean, row by row."""
        if self.quadratic:
            return project_rows(mean, domain)
        if isinstance(domain, Ball):
            return -domain.radius * torch.nn.functional.normalize(mean, dim=-1)
        if isinstance(domain, Box):
            return torch.where(mean > 0, domain.low, domain.high).to(mean)
        if isinstance(domain, Simplex):
            return domain.total * torch.nn.functional.one_hot(mean.argmin(-1), mean.shape[-1]).to(mean)
        raise TypeError(f"domain must be a Ball, a Box or a Simplex, got {domain!r}")


def measure_sea(
    gradients: Float[Tensor, "rounds draws dim"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""Estimate :math:`\sigma_{1:T}^2` and :math:`\Sigma_{1:T}^2` at one point from several gradients a round.

    Without bias: the variance with one draw less in the denominator; the squared distance of the means of consecutive
    rounds less what their own noise adds to it. The paper's are the largest over all points, so these are lower bounds.

    Args:
        gradients: Of independent draws of each round's loss at the same point; at least two draws.

    Returns:
        The two estimates; the second may come out below 0 where there is next to no drift.

    Raises:
        ValueError: If there are fewer than two draws, or a gradient is not finite.

    Example:
        >>> variance, variation = measure_sea(torch.tensor([[[1.0], [3.0]], [[6.0], [6.0]]]))
        >>> variance, variation  # noise of variance 2, then none; means 2 and 6
        (tensor(2.), tensor(15.))

    Source:
        The definitions of Sachs et al. 2022, arXiv 2202.07554.
    """
    checks.floating(gradients, "gradients")
    checks.finite(gradients, "gradients")
    if gradients.dim() != 3 or gradients.shape[1] < 2:
        raise ValueError(
            f"gradients must have shape (rounds, draws, dim), at least two draws, got {tuple(gradients.shape)}"
        )
    variances = gradients.var(dim=1).sum(-1)
    moved = gradients.mean(1).diff(dim=0).square().sum(-1)
    return variances.sum(), (moved - (variances[1:] + variances[:-1]) / gradients.shape[1]).sum()


def _sphere(count: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=-1)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
