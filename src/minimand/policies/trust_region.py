r"""The step of a constrained trust region: improve as much as a divergence allows, within linearised constraints.

.. math:: \max_x\ g^T x \quad\text{subject to}\quad c_i + b_i^T x \le 0,\ \ \tfrac12 x^T H x \le \delta,

where :math:`H` is the Fisher information of a policy, known by its products with vectors only. The solution is a
combination of :math:`H^{-1} g` and the :math:`H^{-1} b_i`, which conjugate gradients find, and for each set :math:`A`
of constraints that hold with equality it is, with :math:`r = B H^{-1} g`, :math:`S = B H^{-1} B^T` and
:math:`q = g^T H^{-1} g`,

.. math:: x_A = H^{-1}\Big(\frac{g - B_A^T S_A^{-1} r_A}\lambda - B_A^T S_A^{-1} c_A\Big), \qquad
          \lambda = \sqrt{\frac{q - r_A^T S_A^{-1} r_A}{2\delta - c_A^T S_A^{-1} c_A}}.

The best :math:`x_A` that breaks no constraint solves the problem: without constraints it is the natural gradient of
TRPO, with one it is the closed form of CPO, with several it replaces their dual program. Where the trust region does
not reach the constraints, the step goes as far as it may towards the nearest point that keeps them.

Leading dimensions hold policies that are independent of each other and step at once.

Source: Schulman et al. 2015, arXiv 1502.05477 (trust region, conjugate gradients, line search); Achiam et al. 2017,
arXiv 1705.10528, section 6 and appendix 10.2 (one constraint). Several constraints by their active sets: derived.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop
from .curvature import Product, conjugate_gradients

# Every subset of the constraints is tried: 1,024 of them at ten.
MOST_CONSTRAINTS = 10

# How far, in lengths of the constraint's own gradient, rounding may carry the solution past a constraint.
_SLIP = 1e-9


@dataclasses.dataclass(frozen=True)
class TrustRegionStep:
    r"""A step, and what it was decided by.

    Args:
        step: x.
        feasible: Whether the trust region reaches the linearised constraints; where not, the step recovers.
        active: Which constraints the step holds with equality.
        multipliers: Of the constraints; 0 where the step recovers.
        residual: Largest relative residual of the linear systems of each policy.
        iterations: Products taken.
        status: Why conjugate gradients stopped. Ten products rarely meet the tolerance; the line search mends it.
    """

    step: Float[Tensor, "*batch dim"]
    feasible: Bool[Tensor, "*batch"]
    active: Bool[Tensor, "*batch constraints"]
    multipliers: Float[Tensor, "*batch constraints"]
    residual: Float[Tensor, "*batch"]
    iterations: int
    status: Stop


@torch.no_grad()
def trust_region_step(
    gradient: Float[Tensor, "*batch dim"],
    product: Product,
    *,
    constraint_gradients: Float[Tensor, "*batch constraints dim"] | None = None,
    violations: Float[Tensor, "*batch constraints"] | None = None,
    max_kl: float = 0.01,
    tolerance: float = 1e-5,
    max_iter: int = 10,
    max_seconds: float | None = None,
) -> TrustRegionStep:
    r"""Compute the best step within a trust region and linearised constraints, by the closed form above.

    With one constraint the three cases of CPO: it does not bind, and the step is the natural gradient; it binds; or
    :math:`c^2 / s > 2\delta` and the step is :math:`-\sqrt{2\delta/s}\,H^{-1} b`, back towards it.

    Args:
        gradient: g, of what is to be maximised.
        product: Maps v to H v; see :func:`fisher_product`. It is given the ``1 + constraints`` systems of every policy
            at once, ``(systems, *batch, dim)``.
        constraint_gradients: The :math:`b_i`; None for no constraints, which is TRPO.
        violations: The :math:`c_i`, what each constraint's value is now: above 0 where it is violated.
        max_kl: delta, above 0; 0.01 is the paper's.
        tolerance: Of conjugate gradients.
        max_iter: Most products; 10 is the authors'.
        max_seconds: Most seconds for them, or None.

    Returns:
        The step, to be shortened by a line search on what was linearised.

    Raises:
        TypeError: If a tensor is of no floating-point dtype.
        ValueError: If shapes differ, a number is not finite, there are more than ten constraints, or a setting is out
            of range.

    Example:
        >>> found = trust_region_step(
        ...     torch.tensor([1.0, 1.0]),
        ...     lambda v: v,
        ...     constraint_gradients=torch.tensor([[1.0, 0.0]]),
        ...     violations=torch.tensor([-0.06]),
        ...     max_kl=0.005,
        ... )
        >>> found.step, found.active
        (tensor([0.0600, 0.0800]), tensor([True]))

    Source:
        Achiam et al. 2017, arXiv 1705.10528, theorem 2 and equation 14.
    """
    checks.positive(max_kl, "max_kl")
    batch = gradient.shape[:-1]
    if constraint_gradients is None:
        constraint_gradients = gradient.new_zeros(*batch, 0, gradient.shape[-1])
    count = constraint_gradients.shape[-2]
    if violations is None:
        violations = gradient.new_zeros(*batch, 0)
    if constraint_gradients.shape != (*batch, count, gradient.shape[-1]) or violations.shape != (*batch, count):
        raise ValueError(
            "constraint_gradients and violations must have shapes (*batch, constraints, dim) and (*batch, constraints) "
            f"for gradient of shape {tuple(gradient.shape)}, "
            f"got {tuple(constraint_gradients.shape)} and {tuple(violations.shape)}"
        )
    if count > MOST_CONSTRAINTS:
        raise ValueError(f"constraint_gradients must hold at most {MOST_CONSTRAINTS} constraints, got {count}")
    for value, name in (
        (gradient, "gradient"),
        (constraint_gradients, "constraint_gradients"),
        (violations, "violations"),
    ):
        checks.floating(value, name)
        checks.finite(value, name)
    rows = torch.cat([gradient[..., None, :], constraint_gradients], -2)
    solved = conjugate_gradients(
        product, rows.movedim(-2, 0), tolerance=tolerance, max_iter=max_iter, max_seconds=max_seconds
    )
    inverse = solved.solution.movedim(0, -2)
    gram = (rows @ inverse.mT).double()
    weights, feasible, active, multipliers = _combination((gram + gram.mT) / 2, violations.double(), max_kl)
    return TrustRegionStep(
        step=(weights.to(gradient)[..., None, :] @ inverse).squeeze(-2),
        feasible=feasible,
        active=active,
        multipliers=multipliers.to(gradient),
        residual=solved.residual.amax(0),
        iterations=solved.iterations,
        status=solved.status,
    )


def _combination(gram: Tensor, violations: Tensor, max_kl: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of the solution on the solved systems, from the inner products of all of them."""
    count = violations.shape[-1]
    # In lengths of their own gradients, constraints are alike and one tolerance serves all.
    lengths = gram.diagonal(dim1=-2, dim2=-1)[..., 1:].clamp_min(0).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1)
    cross, between, distance = gram[..., 1:, 0] / lengths, gram[..., 1:, 1:], violations / lengths
    between = between / (lengths[..., None, :] * lengths[..., :, None])
    members = torch.arange(2**count, device=gram.device)[:, None] >> torch.arange(count, device=gram.device) & 1
    members = members.to(gram)
    inverse = torch.linalg.pinv(
        between[..., None, :, :] * members[:, :, None] * members[:, None, :], rtol=1e-10, hermitian=True
    )

    def solve(vector: Tensor) -> Tensor:
        return (inverse @ (vector[..., None, :] * members)[..., None]).squeeze(-1)

    toward, back = solve(cross), solve(distance)  # S_A^-1 r_A and S_A^-1 c_A
    power = (gram[..., :1, 0] - (toward * cross[..., None, :]).sum(-1)).clamp_min(0)
    norm = (back * distance[..., None, :]).sum(-1).clamp_min(0)
    room = 2 * max_kl - norm
    # Where the gradient lies within the active ones, nothing is left to gain and the power is rounding.
    useful = power > 1e-14 * gram[..., :1, 0]
    reach = torch.where(useful, (room.clamp_min(0) / torch.where(useful, power, 1)).sqrt(), 0)
    scale = torch.where(room > 0, (power / torch.where(room > 0, room, 1)).sqrt(), 0)

    nearest = -back
    candidates = torch.cat([reach[..., None], nearest - reach[..., None] * toward], -1)
    values = distance[..., None, :] + (candidates[..., None, :] @ _images(cross, between)).squeeze(-2)
    slip = _SLIP * (1 + distance.abs()).amax(-1, keepdim=True) if count else values.new_zeros(*values.shape[:-2], 1)
    kept = (room >= 0) & (values <= slip[..., None]).all(-1)
    gains = reach * power - (back * cross[..., None, :]).sum(-1)
    best = torch.where(kept, gains, -math.inf).argmax(-1)
    feasible = kept.any(-1)

    # Recovery: of the nearest points on each set of constraints, the shortest that keeps the others too.
    missed = distance[..., None, :] + (nearest[..., None, :] @ between[..., None, :, :]).squeeze(-2)
    missed = torch.where(missed > slip[..., None], missed, 0).clamp_min(0).sum(-1)
    fallback = torch.where(missed <= missed.amin(-1, keepdim=True), norm, math.inf).argmin(-1)
    shorter = (2 * max_kl / norm.clamp_min(2 * max_kl)).sqrt()
    recovering = torch.cat([torch.zeros_like(reach)[..., None], nearest * shorter[..., None]], -1)

    choice = torch.where(feasible, best, fallback)
    weights = torch.where(feasible[..., None], _pick(candidates, choice), _pick(recovering, choice))
    multipliers = _pick(toward + scale[..., None] * back, choice) * feasible[..., None]
    active = members[choice].bool() & feasible[..., None]
    per_gradient = torch.cat([torch.ones_like(weights[..., :1]), 1 / lengths], -1)
    return weights * per_gradient, feasible, active, multipliers / lengths


def _images(cross: Tensor, between: Tensor) -> Tensor:
    """Stack r over S: how a combination of the solved systems moves every constraint."""
    return torch.cat([cross[..., None, :], between], -2)[..., None, :, :]


def _pick(candidates: Tensor, choice: Tensor) -> Tensor:
    index = choice[..., None, None].expand(*choice.shape, 1, candidates.shape[-1])
    return candidates.gather(-2, index).squeeze(-2)


@dataclasses.dataclass(frozen=True)
class LineSearch:
    """Where a line search ended.

    Args:
        step: The step of every policy, 0 where none was accepted.
        scale: What the step was multiplied by.
        accepted: Whether a step was.
        iterations: How many scales were tried.
        status: Converged where every policy has a step.
    """

    step: Float[Tensor, "*batch dim"]
    scale: Float[Tensor, "*batch"]
    accepted: Bool[Tensor, "*batch"]
    iterations: int
    status: Stop


def backtracking(
    step: Float[Tensor, "*batch dim"],
    accept: Callable[[Tensor], Tensor],
    *,
    factor: float = 0.8,
    max_iter: int = 10,
    max_seconds: float | None = None,
) -> LineSearch:
    """Shorten every policy's step until it is accepted.

    Args:
        step: What is tried first.
        accept: Tells of steps, one a policy, which are good: ``(*batch, dim) -> (*batch)``, boolean.
        factor: What a refused step is multiplied by, between 0 and 1; 0.8 is that of CPO's authors.
        max_iter: Most scales tried; 10 is theirs.
        max_seconds: Most seconds, or None.

    Returns:
        The steps. One that was accepted is not asked for again.

    Raises:
        TypeError: If ``step`` is no floating-point tensor.
        ValueError: If it is not finite, or a setting is out of range.

    Example:
        >>> backtracking(torch.tensor([[8.0], [1.0]]), lambda step: step[:, 0] <= 2, factor=0.5).scale
        tensor([0.2500, 1.0000])

    Source:
        Achiam et al. 2017, arXiv 1705.10528, section 6.2; Schulman et al. 2015, arXiv 1502.05477, appendix C.
    """
    checks.floating(step, "step")
    checks.finite(step, "step")
    checks.between(factor, "factor", 0.0, 1.0, low_open=True, high_open=True)
    budget = Budget(max_iter, max_seconds)
    scale = torch.ones_like(step[..., 0])
    accepted = torch.zeros_like(scale, dtype=torch.bool)
    iterations = 0
    status = budget.spent(0)
    while status is None:
        accepted = accepted | accept(scale[..., None] * step)
        iterations += 1
        if accepted.all():
            status = Stop.CONVERGED
            break
        scale = torch.where(accepted, scale, factor * scale)
        status = budget.spent(iterations)
    scale = torch.where(accepted, scale, 0)
    return LineSearch(scale[..., None] * step, scale, accepted, iterations, status)
