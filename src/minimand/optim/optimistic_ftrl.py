r"""Optimistic follow-the-regularised-leader: the best point for all gradients so far and a guess of the next.

.. math:: x_{t+1} = \arg\min_{x \in X} \Big\langle \sum_{s \le t} g_s + M_{t+1}, x \Big\rangle
          + \frac{R(x)}{\eta_{t+1}}, \qquad M_{t+1} = g_t,

with :math:`R(x) = \tfrac12 \|x - x_1\|_2^2`, so that :math:`x_{t+1} = P_X(x_1 - \eta_{t+1} (\sum_s g_s + g_t))`, or on
the simplex :math:`R(x) = KL(x \| x_1)`, so that :math:`x_{t+1} \propto x_1 \exp(-\eta_{t+1} (\sum_s g_s + g_t))`. The
step size falls with the variation :math:`V_t = \sum_s \|g_s - M_s\|_*^2` that was seen:

.. math:: \eta_{t+1} = \frac{\sqrt{c}}{\sqrt{\epsilon + 4 G^2 + V_t}}, \qquad c = D^2 \text{ or } \max_i \ln(1/x_{1,i}).

The second form is also optimistic *mirror descent* with the entropy. When the step falls, its two lines alone have no
bound, since :math:`KL(u \| \hat x_t)` has none; drawing the anchor back to the start by as much as the step falls,
:math:`\hat x_{t+1} \propto (\hat x_t e^{-\eta_t g_t})^{\eta_{t+1}/\eta_t} x_1^{1 - \eta_{t+1}/\eta_t}`, repairs it and
gives exactly this point. With :math:`V` in the dual norm (half the range of entries, at most the largest of them) the
regret is at most :math:`\sqrt{c}\,(\sqrt{\epsilon + 4 G^2 + V_{T-1}} + \sqrt{V_T})`.

Source: Sachs, Hadiji, van Erven and Guzmán, "Between Stochastic and Adversarial Online Convex Optimization", NeurIPS
2022, arXiv 2202.07554; Rakhlin and Sridharan, COLT 2013, arXiv 1208.3728; the stabilised anchor: Fang, Harvey,
Portella and Friedlander, ICML 2020, arXiv 2006.02585.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..projections import Projection
from .adaptive_step import check_round, check_steps, largest_norm, new_account, play, variation_rule
from .domains import check_domain, project_rows
from .vector_optimizer import VectorOptimizer


class FollowState(NamedTuple):
    """Where leader-followers stand between two rounds; ``(*batch, dim)`` or ``(*batch,)``.

    Attributes:
        point: The point to play next.
        start: The point x_1 of the first round; its logarithm on the simplex.
        total: The sum of all gradients.
        hint: The guess of the next gradient.
        step_size: The paper's eta of the next round.
        inverse_step: One over the step size of the last round.
        variation: V_t.
        largest: The largest norm of a gradient so far; 0 where a bound was promised.
        ascent: See :mod:`minimand.optim.adaptive_step`.
        stability: See :mod:`minimand.optim.adaptive_step`.
        rounds: How many rounds were played.
    """

    point: Tensor
    start: Tensor
    total: Tensor
    hint: Tensor
    step_size: Tensor
    inverse_step: Tensor
    variation: Tensor
    largest: Tensor
    ascent: Tensor
    stability: Tensor
    rounds: int

    @classmethod
    def at(cls, point: Float[Tensor, "*batch dim"]) -> FollowState:
        """Begin at a point of the domain, for :func:`optimistic_ftrl_step`."""
        checks.floating(point, "point")
        checks.finite(point, "point")
        return cls(point, point, torch.zeros_like(point), torch.zeros_like(point), **new_account(point))

    @classmethod
    def on_simplex(cls, point: Float[Tensor, "*batch dim"]) -> FollowState:
        """Begin at a point inside the simplex, for :func:`optimistic_entropic_step`."""
        checks.floating(point, "point")
        checks.not_empty(point, "point")
        checks.finite(point, "point")
        checks.require(point > 0, lambda: "point must have entries above 0: one that is 0 can never grow")
        start = (point / point.sum(-1, keepdim=True)).log()
        return cls(point, start, torch.zeros_like(point), torch.zeros_like(point), **new_account(point))

    def regret_bound(self, *, diameter: float) -> Float[Tensor, "*batch"]:
        """Return what the regret of the rounds played with the Euclidean map cannot exceed."""
        return diameter**2 / 2 * self.ascent + self.stability

    def entropic_regret_bound(self) -> Float[Tensor, "*batch"]:
        """Return what the regret of the rounds played with the entropic map cannot exceed."""
        return -self.start.amin(-1) * self.ascent + self.stability


def optimistic_ftrl_step(
    state: FollowState,
    gradient: Float[Tensor, "*batch dim"],
    *,
    diameter: float,
    domain: Projection | None = None,
    grad_bound: float | None = None,
    lr: float = 1.0,
    eps: float = 1e-8,
) -> FollowState:
    r"""Compute the next point of optimistic follow-the-regularised-leader, for many independent streams at once.

    Its linear regret against every u within ``diameter`` of the start is at most ``state.regret_bound()``, and with
    the promised bound on gradients at most :math:`\frac D2 \sqrt{\epsilon + 4G^2 + V_{T-1}} + D\sqrt{V_T}`.

    Args:
        state: From :meth:`FollowState.at` or the last round.
        gradient: Of the losses at ``state.point``.
        diameter: D, the largest distance of two points of the domain; without one, a scale.
        domain: A ball, box or simplex, or None.
        grad_bound: G, which no gradient's norm exceeds; None for the largest so far.
        lr: Multiplies the step size.
        eps: Added to the squares under the root, so that gradients that are all zero divide nothing.

    Returns:
        The state of the next round, whose ``point`` is to be played.

    Raises:
        ValueError: If a gradient is not finite or a setting out of range.
        TypeError: If the domain is of another kind.

    Example:
        >>> state = FollowState.at(torch.zeros(2))
        >>> optimistic_ftrl_step(state, torch.tensor([3.0, 4.0]), diameter=2.0, grad_bound=5.0).point
        tensor([-1.0733, -1.4311])

    Source:
        Sachs et al. 2022, arXiv 2202.07554; bound re-derived for any step sizes.
    """
    check_round(gradient, state.point, grad_bound, lr, eps)
    checks.positive(diameter, "diameter")
    check_domain(domain)
    difference = gradient - state.hint
    _, account = play(
        state,
        moved=torch.linalg.vecdot(difference, difference),
        rule=variation_rule(lr * diameter, grad_bound, eps),
        largest=largest_norm(state, gradient) if grad_bound is None else None,
    )
    total = state.total + gradient
    point = project_rows(
        torch.addcmul(state.start, account["step_size"][..., None], total + gradient, value=-1), domain
    )
    return state._replace(point=point, total=total, hint=gradient, **account)


def optimistic_entropic_step(
    state: FollowState,
    gradient: Float[Tensor, "*batch dim"],
    *,
    total: float = 1.0,
    grad_bound: float | None = None,
    hint: Float[Tensor, "*batch dim"] | None = None,
    lr: float = 1.0,
    eps: float = 1e-8,
) -> FollowState:
    r"""Compute the next point of optimistic mirror descent with the entropy on the simplex, for many streams at once.

    Its linear regret is at most ``state.entropic_regret_bound()``, and from a uniform start with the promised bound at
    most :math:`\sqrt{\ln d}\,(\sqrt{\epsilon + 4G^2 + V_{T-1}} + \sqrt{V_T})`, with :math:`G` and :math:`V` in half the
    range of entries, :math:`(\max_i g_i - \min_i g_i) / 2`, which no constant shift of all entries changes.

    Args:
        state: From :meth:`FollowState.on_simplex` or the last round.
        gradient: Of the losses at ``state.point``.
        total: What the entries of a point add up to.
        grad_bound: G, which half the range of no gradient exceeds (nor, where the hints are other than gradients,
            half the error of a hint); None for the largest so far.
        hint: The guess of the next gradient; None for this one.
        lr: Multiplies the step size.
        eps: Added to the squares under the root.

    Returns:
        The state of the next round, whose ``point`` is to be played.

    Raises:
        ValueError: If a gradient is not finite, a setting out of range, or hints come without ``grad_bound``.

    Example:
        >>> state = FollowState.on_simplex(torch.full((2,), 0.5))
        >>> optimistic_entropic_step(state, torch.tensor([0.0, 1.0]), grad_bound=0.5).point
        tensor([0.8160, 0.1840])

    Source:
        Chen et al. 2024, arXiv 2302.04552, with the entropy as mirror map; Fang et al. 2020, arXiv 2006.02585.
    """
    check_round(gradient, state.point, grad_bound, lr, eps)
    checks.positive(total, "total")
    if hint is not None and grad_bound is None:
        raise ValueError("grad_bound is required with hints other than the last gradient")
    # On points that add up to one: the loss of z p is that of p with gradients z times as large.
    scaled = total * gradient
    # A simplex of one point has size 0 and nothing to choose: any other size serves there.
    size = (-state.start.amin(-1)).clamp_min(math.log(2))
    _, account = play(
        state,
        moved=_half_range(scaled - state.hint).square(),
        rule=variation_rule(lr * size.sqrt(), None if grad_bound is None else total * grad_bound, eps),
        largest=torch.maximum(state.largest, _half_range(scaled)) if grad_bound is None else None,
    )
    summed = state.total + scaled
    guess = scaled if hint is None else total * hint
    point = total * torch.softmax(state.start - account["step_size"][..., None] * (summed + guess), dim=-1)
    return state._replace(point=point, total=summed, hint=guess, **account)


class OptimisticFTRL(VectorOptimizer):
    """Optimistic follow-the-regularised-leader as a torch optimizer: strong where one fixed point is best throughout.

    All parameters of a group are one vector. Weights in a network have no domain; then ``diameter`` is a guess of how
    far the solution lies from the start, and sets the scale of steps. A falling learning rate draws the weights back to
    the start, as it weighs all gradients anew: with a schedule take :class:`OptimisticMirrorDescent`. A round with
    learning rate 0 is not played.

    Args:
        params: Parameters, or groups of them, inside the domain.
        diameter: D, above 0; None for the domain's own.
        domain: :class:`~minimand.projections.Ball`, ``Box`` or ``Simplex``, or None for all of space.
        grad_bound: G, which no gradient's norm exceeds; None for the largest so far.
        lr: Multiplies the step size; 1 in the paper.
        eps: Added to the squares under the root.
        average: Whether to keep the mean of the points played, at the memory of one more copy.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = OptimisticFTRL([weight], diameter=2.0)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.variation
        25.0

    Source:
        Sachs et al. 2022, arXiv 2202.07554.
    """

    def __init__(
        self,
        params: Iterable[Any],
        diameter: float | None = None,
        *,
        domain: Projection | None = None,
        grad_bound: float | None = None,
        lr: float = 1.0,
        eps: float = 1e-8,
        average: bool = False,
    ) -> None:
        settings = {"diameter": diameter, "grad_bound": grad_bound, "lr": lr, "eps": eps}
        super().__init__(params, settings, domain=domain, average=average)

    def _check(self, group: dict[str, Any], dim: int) -> None:
        check_steps(group["grad_bound"], group["lr"], group["eps"])

    def _begin(self, group: dict[str, Any], vector: Tensor) -> FollowState:
        return FollowState.at(vector)

    def _advance(self, group: dict[str, Any], state: Any, gradient: Tensor) -> FollowState:
        return optimistic_ftrl_step(
            state,
            gradient,
            diameter=group["diameter"],
            domain=self.domain,
            grad_bound=group["grad_bound"],
            lr=group["lr"],
            eps=group["eps"],
        )

    def _bound(self, group: dict[str, Any], state: Any) -> Tensor:
        return state.regret_bound(diameter=group["diameter"])

    def _restore(self, group: dict[str, Any], saved: dict[str, Any]) -> FollowState:
        return FollowState(**saved)


def _half_range(values: Tensor) -> Tensor:
    low, high = values.aminmax(dim=-1)
    return (high - low) / 2
