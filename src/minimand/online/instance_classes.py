r"""Classes of instances that are equally hard at most: who is in them, how to draw from them and how to stay inside.

The instances are those with :math:`|\langle x, \theta \rangle| \le b` for every query x, grouped by their complexity:
:math:`\Theta_r = \{\theta: C(\theta) \le r\}`. For one best hypothesis,

.. math:: C(\theta)^{-1/2} = \max_\lambda \min_{z \ne z^*}
          \frac{\langle z^* - z, \theta \rangle}{\|z^* - z\|_{A(\lambda)^{-1}}}

is concave in :math:`\theta`, because the norm is convex in :math:`\lambda`: if :math:`\langle z^* - z, \theta_i \rangle
\ge t_i \|z^* - z\|_{A(\lambda_i)^{-1}}` for two instances, then for their mean with the mean of the allocations weighed
by :math:`t_i`. So the part of a class where one hypothesis is best is convex, an instance that has left it is brought
back along the line to the easiest instance of that hypothesis, and any lower bound of :math:`C^{-1/2}` at the instance,
such as that of an allocation found a few steps ago, brings it far enough.

Source: Zhang, Jain and Jamieson 2020, arXiv 2010.15382 (classes by complexity). The way back into a class is ours.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor

from .. import checks
from .problem_complexity import check_hypotheses, check_queries, complexity

_INSIDE = 1e-4
_NEAR = 1e-3
_ROUNDS = 60
_UNBOUNDED = 3

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Instances:
    """Instances of a class.

    Args:
        theta: The instances, ``(instances, dim)``.
        best: The best hypothesis of each, ``(instances,)``.
    """

    theta: Tensor
    best: Tensor

    def __len__(self) -> int:
        return len(self.best)


@dataclasses.dataclass(frozen=True)
class Measure:
    r"""What the complexity of instances says of those nearby.

    Args:
        widths: :math:`\|z^* - z\|_{A(\lambda)^{-1}}` under the best allocation, ``(instances, hypotheses)``.
        slopes: Of :math:`C^{-1/2}`, ``(instances, dim)``.
    """

    widths: Tensor
    slopes: Tensor

    def split(self, shares: list[int]) -> list[Measure]:
        """Split by instances."""
        pairs = zip(self.widths.split(shares), self.slopes.split(shares), strict=True)
        return [Measure(widths, slopes) for widths, slopes in pairs]


class InstanceClasses:
    r"""The instances with mean answers of at most :math:`b`, grouped by complexity.

    Args:
        hypotheses: Rows z, all different.
        queries: Rows x, which tell all hypotheses apart; None for the unit vectors.
        bound: b, the largest mean answer, in units of the noise's standard deviation. 1 for answers of plus and minus
            one.

    Attributes:
        home: The easiest instance of each hypothesis, ``(hypotheses, dim)``.
        easiest: Its :math:`C^{-1/2}`, ``(hypotheses,)``; 0 where a hypothesis is best for no instance.

    Raises:
        ValueError: If a hypothesis comes twice, or the queries cannot tell two apart.

    Example:
        >>> from minimand.online import complexity, thresholds
        >>> classes = InstanceClasses(thresholds(4))
        >>> instances = classes.draw(10, radius=5.0, generator=torch.Generator().manual_seed(0))
        >>> bool((complexity(instances.theta, thresholds(4)).value <= 5).all())
        True

    Source:
        Zhang, Jain and Jamieson 2020, arXiv 2010.15382.
    """

    def __init__(
        self,
        hypotheses: Float[Tensor, "hypotheses dim"],
        *,
        queries: Float[Tensor, "queries dim"] | None = None,
        bound: float = 1.0,
    ) -> None:
        check_hypotheses(hypotheses)
        check_queries(queries, hypotheses.shape[1])
        checks.positive(bound, "bound")
        self.hypotheses = hypotheses.detach().double()
        self.queries = None if queries is None else queries.detach().to(self.hypotheses)
        self.bound = bound
        high, low = self.hypotheses.amax(0), self.hypotheses.amin(0)
        if len(hypotheses) == 1:
            self.home = torch.zeros_like(self.hypotheses)
            self.easiest = torch.full_like(self.home[:, 0], torch.inf)
        elif queries is None and bool(((self.hypotheses == high) | (self.hypotheses == low)).all()):
            # Every gap is the largest in the box. Where all agree an answer tells nothing, whatever the sign.
            self.home = bound * torch.where(self.hypotheses == high, 1.0, -1.0).to(self.hypotheses)
            self.easiest = self._inverse_root(self.home)
        else:
            self._find_homes()

    def means(self, theta: Float[Tensor, "instances dim"]) -> Float[Tensor, "instances queries"]:
        """Return the mean answers.

        Args:
            theta: The instances.
        """
        return theta if self.queries is None else theta @ self.queries.mT

    def feasible(self, radius: float) -> Int[Tensor, " some"]:
        r"""Return the hypotheses that are best for some instance of :math:`\Theta_r`.

        Args:
            radius: r, above 0.
        """
        checks.positive(radius, "radius")
        return ((self.easiest >= radius**-0.5) & (self.easiest > 0)).nonzero()[:, 0]

    def measure(self, theta: Float[Tensor, "instances dim"], best: Int[Tensor, " instances"]) -> Measure:
        r"""Solve for the complexity of instances, to serve :meth:`move` for as long as they have moved little.

        Args:
            theta: Instances, each with a unique best hypothesis.
            best: That hypothesis.
        """
        checks.floating(theta, "theta")
        point = theta.detach().to(self.hypotheses)
        if len(self.hypotheses) == 1:
            return Measure(torch.ones_like(point[:, :1]), torch.zeros_like(point))
        solved = complexity(point, self.hypotheses, queries=self.queries, tolerance=_INSIDE)
        shares = solved.weights / torch.where(solved.weights > 0, self._gaps(point, best), torch.inf)
        differences = self.hypotheses[best][:, None] - self.hypotheses
        slopes = solved.value.rsqrt()[:, None] * (shares[..., None] * differences).sum(1)
        return Measure(self._widths(solved.allocation, best), slopes)

    def move(
        self,
        theta: Float[Tensor, "instances dim"],
        best: Int[Tensor, " instances"],
        step: Float[Tensor, "instances dim"],
        *,
        radius: float,
        measure: Measure,
    ) -> Float[Tensor, "instances dim"]:
        r"""Move instances by a step, along the edge of :math:`\Theta_r` where the step would leave it.

        There the step loses its part against the slope of :math:`C^{-1/2}`, so that instances come to rest where a loss
        is largest on the edge, and not where its slope points away from the easiest instance.

        Args:
            theta: Instances of the class.
            best: The best hypothesis of each.
            step: By how much each should move.
            radius: r, above 0.
            measure: Of instances near these.
        """
        point, wanted, slope = theta.to(self.hypotheses), step.to(self.hypotheses), measure.slopes
        leaves = self._bound(point + wanted, best, measure.widths) < radius**-0.5
        free = torch.ones_like(point)
        # Entries at the end of their range that would go on stay, and take no part in the slope: a second look tells.
        for _ in range(2):
            length = (free * slope).square().sum(-1, keepdim=True).clamp_min(1e-300)
            against = (free * wanted * slope).sum(-1, keepdim=True).clamp_max(0) / length
            moved = wanted - torch.where(leaves[:, None], against, 0.0) * slope
            moved, turned = free * moved, moved * point.sign()
            if self.queries is None:
                free = ((point.abs() < self.bound) | (turned < 0)).to(point)
        return self.retract((point + moved).to(theta), best, radius=radius, measure=measure)

    def retract(
        self,
        theta: Float[Tensor, "instances dim"],
        best: Int[Tensor, " instances"],
        *,
        radius: float,
        measure: Measure | None = None,
    ) -> Float[Tensor, "instances dim"]:
        r"""Bring instances into the part of :math:`\Theta_r` where given hypotheses are best.

        Each goes back towards the easiest instance of its hypothesis, until its own allocation proves that it is
        inside, or concavity of :math:`C^{-1/2}` does; instances that are inside already stay.

        Args:
            theta: Any point.
            best: The hypothesis of each.
            radius: r, above 0.
            measure: Of an instance near each, from :meth:`measure`: far cheaper, and goes back a little too far. None
                to solve for the complexity.

        Raises:
            ValueError: If a hypothesis is best for no instance of the class.
        """
        checks.floating(theta, "theta")
        checks.finite(theta, "theta")
        checks.positive(radius, "radius")
        least = radius**-0.5
        home, easiest = self.home[best], self.easiest[best]
        checks.require(
            (easiest >= least) & (easiest > 0),
            lambda: f"radius must be at least {float(easiest.min() ** -2):.4g} for these hypotheses, got {radius}",
        )
        point = self._into_body(theta.detach().to(home), home)
        # Then into the cone where the hypothesis is best: gaps are linear along the line.
        goal, gaps = self._gaps(home, best), self._gaps(point, best)
        wanted = 1e-3 * goal
        share = torch.where(gaps < wanted, (goal - wanted) / (goal - gaps).clamp_min(1e-300), 1.0).amin(-1)
        point = torch.lerp(home, point, share[:, None].clamp(0, 1))
        widths = (self.measure(point, best) if measure is None else measure).widths
        # Gaps are linear along the line, so that the allocation's own bound is met at the first of these shares.
        limit, gaps = least * widths, self._gaps(point, best)
        crossing = (goal - limit) / (goal - gaps).clamp_min(1e-300)
        crossing = torch.where(gaps < limit, crossing, 1.0).amin(-1)
        reached = self._bound(point, best, widths)
        chord = torch.where(reached < least, (easiest - least) / (easiest - reached).clamp_min(1e-300), 1.0)
        share = torch.maximum(crossing, chord)
        return torch.lerp(home, point, share[:, None].clamp(0, 1)).to(theta)

    def draw(self, count: int, *, radius: float, generator: torch.Generator | None = None) -> Instances:
        r"""Draw instances of :math:`\Theta_r`: a feasible hypothesis, and a point of the box brought into its part.

        Args:
            count: How many, at least 1.
            radius: r; too small a one has no instance.
            generator: Draws them; torch's default if None.

        Raises:
            ValueError: If the class is empty.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        some = self.feasible(radius)
        if not len(some):
            raise ValueError(f"radius must be larger: no instance has a complexity of at most {radius}")
        device = self.hypotheses.device if generator is None else generator.device
        dim = self.hypotheses.shape[1]
        drawn = torch.rand(count, dim + 1, dtype=torch.float64, generator=generator, device=device)
        drawn = drawn.to(self.hypotheses)
        best = some[(drawn[:, 0] * len(some)).long().clamp_max(len(some) - 1)]
        reach = self.home.abs().amax(0).clamp_min(1e-300)
        return Instances(self.retract((2 * drawn[:, 1:] - 1) * reach, best, radius=radius), best)

    def _find_homes(self) -> None:
        r"""Maximise :math:`C^{-1/2}` for every hypothesis by cutting planes.

        The function is concave, and :math:`\langle g, \theta \rangle` with its slope

        .. math:: g = C^{-1/2} \sum_z p_z \frac{z^* - z}{\langle z^* - z, \theta \rangle},

        where p are the weights that prove the complexity. So every instance that is solved gives a linear upper bound,
        and the next one is where the least of these bounds is largest.
        """
        count, dim = self.hypotheses.shape
        rows = torch.eye(dim).to(self.hypotheses) if self.queries is None else self.queries
        lengths = torch.linalg.vector_norm(self.hypotheses[:, None] - self.hypotheses, dim=-1)
        # No allocation makes a width smaller than this.
        least = lengths / torch.linalg.vector_norm(rows, dim=-1).amax()
        self.home, self.easiest = torch.zeros_like(self.hypotheses), self.hypotheses.new_zeros(count)
        programs = [_Program(self.hypotheses[each] - self.hypotheses, rows, self.bound) for each in range(count)]
        open_ = torch.arange(count, device=self.hypotheses.device)
        for _ in range(_ROUNDS):
            found = [programs[each].solve(least[each], float(self.easiest[each])) for each in open_.tolist()]
            upper = self.hypotheses.new_tensor([value for value, _ in found])
            points = torch.stack([point for _, point in found]).to(self.hypotheses)
            unfinished = upper > torch.maximum(self.easiest[open_] * (1 + _NEAR), lengths[open_].amax(-1) * 1e-6)
            open_, points = open_[unfinished], points[unfinished]
            if not len(open_):
                return
            slopes = self.measure(points, open_).slopes
            roots = (slopes * points).sum(-1)
            for each, slope in zip(open_.tolist(), slopes, strict=True):
                programs[each].cut(slope)
            better = roots > self.easiest[open_]
            self.home[open_[better]], self.easiest[open_[better]] = points[better], roots[better]

    def _widths(self, allocation: Tensor, best: Tensor) -> Tensor:
        differences = self.hypotheses[best][:, None] - self.hypotheses
        if self.queries is None:
            return (differences.square() / allocation[:, None].clamp_min(1e-300)).sum(-1).sqrt()
        information = (self.queries.mT * allocation[:, None, :]) @ self.queries
        inverse = torch.linalg.pinv(information, hermitian=True)
        return ((differences @ inverse) * differences).sum(-1).clamp_min(0).sqrt()

    def _bound(self, theta: Tensor, best: Tensor, widths: Tensor) -> Tensor:
        ratios = self._gaps(theta, best) / widths.clamp_min(1e-300)
        return ratios.scatter(-1, best[:, None], torch.inf).amin(-1)

    def _into_body(self, point: Tensor, home: Tensor) -> Tensor:
        if self.queries is None:
            return point.clamp(-self.bound, self.bound)
        inside, means = self.means(home), self.means(point)
        room = torch.where(means > 0, self.bound - inside, self.bound + inside)
        share = torch.where(means.abs() > self.bound, room / (means - inside).abs().clamp_min(1e-300), 1.0)
        return torch.lerp(home, point, share.amin(-1, keepdim=True).clamp(0, 1))

    def _gaps(self, theta: Tensor, best: Tensor) -> Tensor:
        return ((self.hypotheses[best][:, None] - self.hypotheses) @ theta[..., None]).squeeze(-1)

    def _inverse_root(self, theta: Tensor) -> Tensor:
        """Return a tight lower bound on C^(-1/2)."""
        if len(self.hypotheses) == 1:
            return torch.full_like(theta[:, 0], torch.inf)
        return complexity(theta, self.hypotheses, queries=self.queries, tolerance=_INSIDE).value.rsqrt()


class _Program:
    """The linear program of cutting planes for the easiest instance of one hypothesis."""

    def __init__(self, differences: Tensor, rows: Tensor, bound: float) -> None:
        self.others = differences.abs().amax(-1).cpu().numpy() > 0
        self.differences = differences.cpu().numpy()[self.others]
        body = rows.cpu().numpy()
        self.body, self.bound = np.vstack([body, -body]), bound
        self.slopes: list[Array] = []

    def cut(self, slope: Tensor) -> None:
        """Add a linear upper bound."""
        self.slopes.append(slope.cpu().numpy())

    def solve(self, widths: Tensor, reached: float) -> tuple[float, Tensor]:
        """Return the upper bound and where it is attained; at first the largest least gap in units of the widths."""
        least = widths.cpu().numpy()[self.others]
        bounds = np.stack(self.slopes) if self.slopes else self.differences / least[:, None]
        # Where C^(-1/2) is larger than what was reached no gap is smaller than this.
        table = np.vstack([-bounds, -self.differences, self.body])
        level = np.concatenate([np.ones(len(bounds)), np.zeros(len(table) - len(bounds))])
        limits = np.concatenate([np.zeros(len(bounds)), -reached * least, np.full(len(self.body), self.bound)])
        result = linprog(
            np.append(np.zeros(table.shape[1]), -1.0),
            A_ub=np.column_stack([table, level]),
            b_ub=limits,
            bounds=(None, None),
            method="highs",
        )
        if result.status == _UNBOUNDED:
            raise ValueError("queries must tell all hypotheses apart: a difference of two lies outside of their span")
        if result.x is None:
            return 0.0, torch.zeros(table.shape[1], dtype=torch.float64)
        return float(result.x[-1]), torch.from_numpy(result.x[:-1])
