r"""Matching an expert in an f-divergence without leaving a reference: the divergences, and the exact solution.

With :math:`D_f(\pi, E) = \sup_r E_E[\phi(r)] - E_\pi[r]`, :math:`\phi` concave, :math:`\phi(0) = 0`,
:math:`\phi'(0) = 1`, and the policy that is best for a reward, :math:`\pi \propto \pi_{ref} e^{r / \beta}`,

.. math:: \min_\pi D_f(\pi, E) + \beta\,KL(\pi \| \pi_{ref})
          = \max_r E_E[\phi(r)] - \beta \log E_{\pi_{ref}}[e^{r / \beta}].

- ``"total_variation"``: :math:`\phi(x) = x` for :math:`|x| \le 1/2`;
- ``"forward_kl"``, of E from the policy: :math:`\log(1 + x)`;
- ``"reverse_kl"``, of the policy from E: :math:`1 - e^{-x}`;
- ``"pearson"`` :math:`\sum (\pi - E)^2 / E`: :math:`x - x^2 / 4` up to 2, and 1 from there on;
- ``"neyman"`` :math:`\sum (\pi - E)^2 / \pi`: :math:`2 (\sqrt{1 + x} - 1)`;
- ``"hellinger"`` :math:`\sum (\sqrt\pi - \sqrt E)^2`: :math:`x / (1 + x)`;
- ``"jensen_shannon"``, twice the divergence: :math:`\log(2 - e^{-x})`.

Source: Wang et al., "Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections", NeurIPS 2025,
arXiv 2507.00018; the variational form: Nguyen, Wainwright and Jordan 2010, arXiv 0809.0853.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop

Divergence = Literal["total_variation", "forward_kl", "reverse_kl", "pearson", "neyman", "hellinger", "jensen_shannon"]

# Newton's method on one response is monotone and takes about five steps; this is where it gives up.
MOST_NEWTON_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Dual:
    """An f-divergence in its variational form.

    Args:
        objective: phi, on its domain.
        weight: phi', on its domain.
        reward: Inverse of log phi': the reward at which the policy's probability is exp(s) times the expert's.
        slope: Derivative of ``reward``.
        lowest: Limit of ``reward``: that of a response which the expert never gives.
        convex: Whether ``reward`` is convex.
    """

    objective: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    reward: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    lowest: float
    convex: bool = True


def _less_a_quarter_of_its_square(x: Tensor) -> Tensor:
    return torch.addcmul(x, x, x, value=-0.25)


DUALS: dict[str, Dual] = {
    "total_variation": Dual(
        objective=lambda x: x,
        weight=torch.ones_like,
        reward=lambda s: -s.sign() / 2,
        slope=torch.zeros_like,
        lowest=-0.5,
    ),
    "forward_kl": Dual(
        objective=torch.log1p,
        weight=lambda x: 1 / (1 + x),
        reward=lambda s: torch.expm1(-s),
        slope=lambda s: -torch.exp(-s),
        lowest=-1.0,
    ),
    "reverse_kl": Dual(
        objective=lambda x: -torch.expm1(-x),
        weight=lambda x: torch.exp(-x),
        reward=lambda s: -s,
        slope=lambda s: -torch.ones_like(s),
        lowest=-math.inf,
    ),
    "pearson": Dual(
        # Past 2 the supremum over non-negative policies is flat.
        objective=lambda x: _less_a_quarter_of_its_square(x.clamp_max(2)),
        weight=lambda x: (1 - x / 2).clamp_min(0),
        reward=lambda s: -2 * torch.expm1(s),
        slope=lambda s: -2 * torch.exp(s),
        lowest=-math.inf,
        convex=False,
    ),
    "neyman": Dual(
        # 2 (sqrt(1 + x) - 1) without the cancellation at small x.
        objective=lambda x: 2 * x / (torch.sqrt(1 + x) + 1),
        weight=lambda x: torch.rsqrt(1 + x),
        reward=lambda s: torch.expm1(-2 * s),
        slope=lambda s: -2 * torch.exp(-2 * s),
        lowest=-1.0,
    ),
    "hellinger": Dual(
        objective=lambda x: x / (1 + x),
        weight=lambda x: (1 + x) ** -2,
        reward=lambda s: torch.expm1(-s / 2),
        slope=lambda s: -torch.exp(-s / 2) / 2,
        lowest=-1.0,
    ),
    "jensen_shannon": Dual(
        objective=lambda x: torch.log1p(-torch.expm1(-x)),
        # exp(-x) / (2 - exp(-x)): unlike 1 / (2 exp(x) - 1) it cannot overflow.
        weight=lambda x: torch.exp(-x) / (1 - torch.expm1(-x)),
        # log((1 + exp(-s)) / 2), exact near 0 and without overflow.
        reward=lambda s: (-s).clamp_min(0) + torch.log1p(torch.expm1(-s.abs()) / 2),
        slope=lambda s: -torch.sigmoid(-s),
        lowest=-math.log(2),
    ),
}


@dataclasses.dataclass(frozen=True)
class FMatching:
    """The policy that matches an expert and stays near a reference, and what is known of it.

    Args:
        policy: The best policy.
        reward: r, of which it is the KL-regularised best response; -inf where it must not go.
        value: V, one a distribution.
        objective: Divergence plus beta times KL, which the dual attains.
        residual: By how much the largest of the policies' masses, before they were normalised, missed 1.
        iterations: Steps of the root finding.
        status: Why the solver stopped.
    """

    policy: Tensor
    reward: Tensor
    value: Tensor
    objective: Tensor
    residual: float
    iterations: int
    status: Stop


@torch.no_grad()
def f_matching_dual(
    p_expert: Float[Tensor, "*batch responses"],
    p_ref: Float[Tensor, "*batch responses"],
    *,
    divergence: Divergence = "pearson",
    beta: float = 0.1,
    tolerance: float = 1e-6,
    max_iter: int = 100,
    max_seconds: float | None = None,
) -> FMatching:
    r"""Solve :math:`\min_\pi D_f(\pi, E) + \beta\,KL(\pi \| \pi_{ref})` where the responses can be counted.

    At the optimum :math:`\pi = E\,\phi'(r)` and :math:`\pi = \pi_{ref}\,e^{(r - V) / \beta}`. For a given V each
    response solves one monotone equation by Newton's method, and the mass of all falls in V, which a safeguarded
    Newton iteration brings to 1. This is what :func:`implicit_reward_sft_loss` tends to as demonstrations abound,
    and it tells what they do not show: of the responses that the expert never gives, most divergences leave some.

    Args:
        p_expert: E, the demonstrators' distributions.
        p_ref: The reference's, above 0 everywhere.
        divergence: The f-divergence; the module's docstring says them all.
        beta: Strength of the KL divergence, above 0; 0.1 is DPO's.
        tolerance: By how much the logarithm of the mass may miss 0, at least 0.
        max_iter: Most iterations.
        max_seconds: Most seconds of wall clock; None for no limit.

    Returns:
        The policy, its reward and value, and why the solver stopped.

    Raises:
        TypeError: If a distribution is no floating-point tensor.
        ValueError: If shapes differ, a distribution is none, or a setting is out of range.

    Example:
        >>> expert, reference = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
        >>> f_matching_dual(expert, reference, divergence="reverse_kl", beta=1.0).policy
        tensor([0.7500, 0.2500])

    Source:
        Derived from Wang et al. 2025, arXiv 2507.00018.
    """
    checks.positive(beta, "beta")
    checks.one_of(divergence, "divergence", get_args(Divergence))
    checks.non_negative(tolerance, "tolerance")
    _check_distribution(p_expert, "p_expert")
    _check_distribution(p_ref, "p_ref")
    if p_expert.shape != p_ref.shape:
        raise ValueError(f"p_ref must have shape {tuple(p_expert.shape)}, got {tuple(p_ref.shape)}")
    checks.require(p_ref > 0, lambda: "p_ref must be above 0: what the reference never says, no policy may")
    budget = Budget(max_iter, max_seconds)
    dual = DUALS[divergence]
    seen = p_expert > 0
    log_ref = p_ref.log()
    log_ratio = torch.where(seen, p_expert, p_ref).log() - log_ref
    low, high = _bracket(log_ratio, seen, dual, divergence, beta)
    value, before = torch.zeros_like(low).clamp(low, high), torch.full_like(low, math.inf)
    for iteration in itertools.count():
        tilt = _tilt(log_ratio + value / beta, dual, divergence, beta)
        log_policy = torch.where(seen, log_ratio + tilt, (dual.lowest - value) / beta) + log_ref
        mass = log_policy.logsumexp(-1, keepdim=True)
        done = mass.abs() <= tolerance
        if bool(done.all()):
            status = Stop.CONVERGED
            break
        limit = budget.spent(iteration)
        if limit is not None:
            status = limit
            break
        low, high = torch.where(mass > 0, value, low), torch.where(mass > 0, high, value)
        middle = (low + high) / 2
        if bool((done | (middle == low) | (middle == high)).all()):
            status = Stop.STALLED
            break
        falls = torch.where(seen, _fall(tilt, log_ratio + value / beta, dual, divergence, beta), 1.0) / beta
        newton = value + mass / (torch.softmax(log_policy, -1) * falls).sum(-1, keepdim=True)
        # Each step halves either the error or the bracket, so that no shape of the mass can hold it up.
        trusted = (newton > low) & (newton < high) & (mass.abs() <= before / 2)
        before, value = mass.abs(), torch.where(done, value, torch.where(trusted, newton, middle))
    reward = torch.where(seen, beta * (tilt + log_ratio) + value, dual.lowest)
    gained = torch.where(seen, p_expert * dual.objective(torch.where(seen, reward, 0.0)), 0.0).sum(-1)
    return FMatching(
        policy=torch.softmax(log_policy, -1),
        reward=reward,
        value=value.squeeze(-1),
        objective=gained - value.squeeze(-1),
        residual=float(torch.expm1(mass).abs().max()),
        iterations=iteration,
        status=status,
    )


def _bracket(log_ratio: Tensor, seen: Tensor, dual: Dual, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return values at which the policy's mass is at least and at most 1."""
    # Where V <= beta log(ref / E) for all responses, no probability falls below the expert's.
    low = torch.where(seen, -beta * log_ratio, math.inf).amin(-1, keepdim=True)
    # Where V >= reward(log(ref / E)) for all, none exceeds the reference's.
    reward = dual.reward(-log_ratio)
    if divergence == "total_variation":
        reward = torch.full_like(reward, 0.5)
    high = torch.where(seen, reward, dual.lowest).amax(-1, keepdim=True)
    return low, high.clamp_max(torch.finfo(high.dtype).max / 4).maximum(low)


def _tilt(ratio: Tensor, dual: Dual, divergence: str, beta: float) -> Tensor:
    """Solve ``reward(s) / beta - s = ratio`` for s, the logarithm of the policy's probability over the expert's."""
    if divergence == "total_variation":
        return (beta * ratio).clamp(-0.5, 0.5) / beta - ratio
    # The root lies between 0 and the nearer of two bounds, each with one of the two terms left out.
    bound = dual.weight(beta * ratio).log()
    bound = torch.where(ratio > 0, torch.fmax(bound, -ratio), torch.fmin(bound, -ratio))
    # Newton's method on a convex falling function is monotone from the left, on a concave one from the right.
    tilt = torch.where((ratio > 0) == dual.convex, bound, torch.zeros_like(ratio))
    small = 4 * torch.finfo(ratio.dtype).eps
    for _ in range(MOST_NEWTON_STEPS):
        step = (dual.reward(tilt) / beta - tilt - ratio) / (1 - dual.slope(tilt) / beta)
        tilt = tilt + step
        if bool((step.abs() <= small * (1 + tilt.abs())).all()):
            break
    return tilt


def _fall(tilt: Tensor, ratio: Tensor, dual: Dual, divergence: str, beta: float) -> Tensor:
    """Return the slope of :func:`_tilt`, without its minus sign, in [0, 1]."""
    if divergence == "total_variation":
        return ((beta * ratio).abs() > 0.5).to(tilt.dtype)
    return beta / (beta - dual.slope(tilt))


def _check_distribution(value: Tensor, name: str) -> None:
    checks.floating(value, name)
    checks.not_empty(value, name)
    checks.finite(value, name)
    checks.require(value >= 0, lambda: f"{name} must not be negative")
    slack = 1e3 * torch.finfo(value.dtype).eps
    checks.require(
        (value.sum(-1) - 1).abs() <= slack * value.shape[-1] ** 0.5, lambda: f"{name} must add up to 1 in each row"
    )
