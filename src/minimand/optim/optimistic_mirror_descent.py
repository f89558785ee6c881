r"""Optimistic online mirror descent: regret that pays for the noise and the change of losses, knowing neither.

Each round plays a point that trusts the last gradient to come again, sees the gradient there, and corrects:

.. math:: x_t = \arg\min_{x \in X} \langle g_{t-1}, x \rangle + D_{R_t}(x, \hat x_t), \qquad
          \hat x_{t+1} = \arg\min_{x \in X} \langle g_t, x \rangle + D_{R_t}(x, \hat x_t),

with :math:`g_0 = 0` and the same :math:`R_t` in both lines. With :math:`v_t = \|g_t - g_{t-1}\|^2` and
:math:`V_t = \sum_{s \le t} v_s`, what is known of the losses decides :math:`R_t`:

- convex: :math:`R_t = \|x\|_2^2 / 2\eta_t`, :math:`\eta_t = D / \sqrt{\epsilon + 4 G^2 + V_{t-1}}`;
- :math:`\lambda`-strongly convex: the same with :math:`\eta_t = 2 / \lambda t`;
- exp-concave: :math:`R_t = \|x\|_{H_t}^2 / 2`, :math:`H_t = (s + \beta G^2 / 2) I + \frac\beta2 \sum_{r<t} g_r g_r^T`;
- convex, on the simplex: the negative entropy over :math:`\eta_t`; see :mod:`minimand.optim.optimistic_ftrl`.

Whatever the gradients, the regret against every u of X is at most, in this order,

.. math:: \tfrac D2 \sqrt{\epsilon + 4G^2 + V_{T-1}} + D \sqrt{V_T}, \qquad \frac1\lambda \sum_t \frac{v_t}{t}, \qquad
          \frac{D^2}2 \Big(s + \frac{\beta G^2}2\Big) + \frac32 \sum_t \|g_t - g_{t-1}\|_{H_t^{-1}}^2.

In expectation over losses with noise :math:`\sigma_t` and drift :math:`\Sigma_t` of the mean gradient,
:math:`E\,V_T = O(\sigma_{1:T}^2 + \Sigma_{1:T}^2)` up to terms that the method's own movement pays for.

Source: Chen, Zhang, Tu, Zhao and Zhang, "Optimistic Online Mirror Descent for Bridging Stochastic and Adversarial
Online Convex Optimization", JMLR 25 (2024), arXiv 2302.04552. The bounds above are re-derived, with smaller constants.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..projections import Projection, Simplex
from .adaptive_step import check_round, check_steps, largest_norm, new_account, play, variation_rule
from .domains import check_domain, project_rows
from .optimistic_ftrl import FollowState, optimistic_entropic_step
from .optimistic_newton import LARGEST_METRIC, NewtonState, check_ball, optimistic_newton_step
from .vector_optimizer import VectorOptimizer

Mode = Literal["convex", "strongly_convex", "exp_concave", "entropic"]

_MODES = ("convex", "strongly_convex", "exp_concave", "entropic")


class MirrorState(NamedTuple):
    r"""Where learners with the Euclidean map stand between two rounds; ``(*batch, dim)`` or ``(*batch,)``.

    Attributes:
        point: The point x to play next.
        anchor: The second sequence, :math:`\hat x`.
        hint: The last gradient.
        step_size: The paper's eta of the next round.
        inverse_step: One over the step size of the last round.
        variation: V_t.
        largest: The largest norm of a gradient so far; 0 where a bound was promised.
        ascent: See :mod:`minimand.optim.adaptive_step`.
        stability: See :mod:`minimand.optim.adaptive_step`.
        rounds: How many rounds were played.
    """

    point: Tensor
    anchor: Tensor
    hint: Tensor
    step_size: Tensor
    inverse_step: Tensor
    variation: Tensor
    largest: Tensor
    ascent: Tensor
    stability: Tensor
    rounds: int

    @classmethod
    def at(cls, point: Float[Tensor, "*batch dim"]) -> MirrorState:
        """Begin at a point of the domain."""
        checks.floating(point, "point")
        checks.finite(point, "point")
        return cls(point, point, torch.zeros_like(point), **new_account(point))

    def regret_bound(self, *, diameter: float) -> Float[Tensor, "*batch"]:
        """Return what the regret of the rounds played cannot exceed."""
        return diameter**2 / 2 * self.ascent + self.stability


def optimistic_step(
    state: MirrorState,
    gradient: Float[Tensor, "*batch dim"],
    *,
    diameter: float,
    domain: Projection | None = None,
    grad_bound: float | None = None,
    strong_convexity: float | None = None,
    lr: float = 1.0,
    eps: float = 1e-8,
) -> MirrorState:
    r"""Compute the next point of optimistic mirror descent with the Euclidean map, for many streams at once.

    .. math:: \hat x_{t+1} = P(\hat x_t - \eta_t g_t), \qquad x_{t+1} = P(\hat x_{t+1} - \eta_{t+1} g_t).

    Args:
        state: From :meth:`MirrorState.at` or the last round.
        gradient: Of the losses at ``state.point``.
        diameter: D, the largest distance of two points of the domain; without one, a scale.
        domain: A ball, box or simplex, or None.
        grad_bound: G, which no gradient's norm exceeds; None for the largest so far (then the first step looks at the
            first gradient, which it may, as the first point does not depend on it).
        strong_convexity: Lambda of losses with :math:`f(u) \ge f(x) + \langle g, u-x \rangle + \frac\lambda2
            \|u-x\|^2`; None for convex losses. Too large a value voids the bound and may lose all.
        lr: Multiplies the step size; 1 in the paper. The regret bound allows for it.
        eps: The paper's delta, any number above 0: added to the squares under the root.

    Returns:
        The state of the next round, whose ``point`` is to be played.

    Raises:
        ValueError: If a gradient is not finite or a setting out of range.
        TypeError: If the domain is of another kind.

    Example:
        >>> state = MirrorState.at(torch.zeros(2))
        >>> optimistic_step(state, torch.tensor([3.0, 4.0]), diameter=2.0, grad_bound=5.0).point
        tensor([-1.1367, -1.5155])

    Source:
        Chen et al. 2024, arXiv 2302.04552, algorithms 1 (convex) and 2 (strongly convex).
    """
    check_round(gradient, state.point, grad_bound, lr, eps)
    checks.positive(diameter, "diameter")
    check_domain(domain)
    difference = gradient - state.hint
    moved = torch.linalg.vecdot(difference, difference)
    if strong_convexity is None:
        step, account = play(
            state,
            moved=moved,
            rule=variation_rule(lr * diameter, grad_bound, eps),
            largest=largest_norm(state, gradient) if grad_bound is None else None,
        )
    else:
        checks.positive(strong_convexity, "strong_convexity")
        fastest = 2 * lr / strong_convexity
        step, account = play(
            state,
            moved=moved,
            rule=lambda rounds, variation, largest: torch.full_like(variation, fastest / (rounds + 1)),
            # Half the curvature pays for the growth of 1 / eta, as far as the distance to the anchor allows.
            free=(state.step_size.reciprocal() / 2).clamp_max(strong_convexity / 2),
        )
    anchor = project_rows(torch.addcmul(state.anchor, step[..., None], gradient, value=-1), domain)
    point = project_rows(torch.addcmul(anchor, account["step_size"][..., None], gradient, value=-1), domain)
    return MirrorState(point=point, anchor=anchor, hint=gradient, **account)


class OptimisticMirrorDescent(VectorOptimizer):
    r"""Optimistic mirror descent as a torch optimizer: online steps that take the last gradient as a hint.

    The parameters hold x at all times, the state its anchor: ``step()`` moves the anchor by the gradient, then writes
    the next x, which takes the same gradient once more as a hint. All parameters of a group are one vector. Weights in
    a network have no domain; then ``diameter`` is a guess of how far the solution lies from the start, and sets the
    scale of steps. A round with learning rate 0 is not played; any other learning rate takes hold with the next x.

    Args:
        params: Parameters, or groups of them, inside the domain.
        diameter: D, above 0: the largest distance of two points of the domain; None for the domain's own.
        mode: What is known of the losses: ``"convex"``; ``"strongly_convex"``; ``"exp_concave"`` (at most 2000
            parameters a group, the domain a ball or none); or ``"entropic"``, convex losses on the simplex in the
            geometry of entropy.
        domain: :class:`~minimand.projections.Ball`, ``Box`` or ``Simplex``, or None for all of space.
        grad_bound: G, which no gradient's norm exceeds (half the range of its entries for ``"entropic"``); None for
            the largest so far. ``"exp_concave"`` needs it.
        strong_convexity: The paper's lambda, which ``"strongly_convex"`` needs: a true lower bound.
        exp_concavity: The paper's alpha. It sets ``curvature`` to :math:`\frac12 \min(1 / 4GD, \alpha)`.
        curvature: The paper's beta, where the cautious value of theory is to be replaced. ``"exp_concave"`` needs it or
            ``exp_concavity``.
        scale: The weight of the identity in the first metric of ``"exp_concave"``; 1 in the paper.
        lr: Multiplies the step size; 1 in the paper.
        eps: The paper's delta, any number above 0.
        average: Whether to keep the mean of the points played, at the memory of one more copy.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> from minimand.projections import Ball
        >>> optimizer = OptimisticMirrorDescent([weight], domain=Ball(1.0))
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([-0.6000, -0.8000], requires_grad=True)

    Source:
        Chen et al. 2024, arXiv 2302.04552, algorithms 1 to 3.
    """

    def __init__(
        self,
        params: Iterable[Any],
        diameter: float | None = None,
        *,
        mode: Mode = "convex",
        domain: Projection | None = None,
        grad_bound: float | None = None,
        strong_convexity: float | None = None,
        exp_concavity: float | None = None,
        curvature: float | None = None,
        scale: float = 1.0,
        lr: float = 1.0,
        eps: float = 1e-8,
        average: bool = False,
    ) -> None:
        settings = {
            "diameter": diameter,
            "mode": mode,
            "grad_bound": grad_bound,
            "strong_convexity": strong_convexity,
            "exp_concavity": exp_concavity,
            "curvature": curvature,
            "scale": scale,
            "lr": lr,
            "eps": eps,
        }
        super().__init__(params, settings, domain=domain, average=average)

    def _check(self, group: dict[str, Any], dim: int) -> None:
        mode = group["mode"]
        checks.one_of(mode, "mode", _MODES)
        check_steps(group["grad_bound"], group["lr"], group["eps"])
        wanted = {
            "strong_convexity": mode == "strongly_convex",
            "exp_concavity": mode == "exp_concave" and group["curvature"] is None,
            "curvature": mode == "exp_concave" and group["exp_concavity"] is None,
        }
        for name, needed in wanted.items():
            if group[name] is not None:
                checks.positive(group[name], name)
            elif needed:
                raise ValueError(f"{name} is required in mode {mode!r}")
        if mode == "exp_concave":
            if group["grad_bound"] is None:
                raise ValueError("grad_bound is required in mode 'exp_concave': it sets the first metric")
            check_ball(self.domain)
            checks.positive(group["scale"], "scale")
            if dim > LARGEST_METRIC:
                raise ValueError(f"mode 'exp_concave' takes at most {LARGEST_METRIC} parameters a group, got {dim}")
        if mode == "entropic":
            if not isinstance(self.domain, Simplex):
                raise TypeError(f"domain must be a Simplex in mode 'entropic', got {self.domain!r}")
            FollowState.on_simplex(torch.cat([weight.detach().reshape(-1) for weight in group["params"]]))

    def _begin(self, group: dict[str, Any], vector: Tensor) -> Any:
        if group["mode"] == "exp_concave":
            return NewtonState.at(
                vector, grad_bound=group["grad_bound"], curvature=_curvature(group), scale=group["scale"]
            )
        return FollowState.on_simplex(vector) if group["mode"] == "entropic" else MirrorState.at(vector)

    def _advance(self, group: dict[str, Any], state: Any, gradient: Tensor) -> Any:
        domain: Any = self.domain
        shared = {"grad_bound": group["grad_bound"], "lr": group["lr"]}
        if group["mode"] == "exp_concave":
            return optimistic_newton_step(state, gradient, curvature=_curvature(group), domain=domain, **shared)
        if group["mode"] == "entropic":
            return optimistic_entropic_step(state, gradient, total=domain.total, eps=group["eps"], **shared)
        return optimistic_step(
            state,
            gradient,
            diameter=group["diameter"],
            domain=domain,
            strong_convexity=group["strong_convexity"] if group["mode"] == "strongly_convex" else None,
            eps=group["eps"],
            **shared,
        )

    def _restore(self, group: dict[str, Any], saved: dict[str, Any]) -> Any:
        kinds = {"exp_concave": NewtonState, "entropic": FollowState}
        return kinds.get(group["mode"], MirrorState)(**saved)

    def _bound(self, group: dict[str, Any], state: Any) -> Tensor:
        if isinstance(state, FollowState):
            return state.entropic_regret_bound()
        return state.regret_bound(diameter=group["diameter"])


def _curvature(group: dict[str, Any]) -> float:
    if group["curvature"] is not None:
        return float(group["curvature"])
    return min(1 / (4 * group["grad_bound"] * group["diameter"]), group["exp_concavity"]) / 2
