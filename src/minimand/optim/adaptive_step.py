r"""The step size of optimistic methods that follows the seen variation, with the account of what regret it allows.

With gradients :math:`g_t`, hints :math:`M_t`, :math:`v_t = \|g_t - M_t\|_*^2` and :math:`V_t = \sum_{s \le t} v_s`,
every method that keeps this account has, against every comparator of a set of size :math:`\kappa`,

.. math:: \sum_{t \le T} \langle g_t, x_t - u \rangle \le \kappa \Big(\frac{1}{\eta_1} + \sum_{t=2}^T
          \Big(\frac{1}{\eta_t} - \frac{1}{\eta_{t-1}}\Big)_+\Big) + \frac{1}{2} \sum_{t \le T} \eta_t v_t,

for *any* positive step sizes: those of the papers, and those times the learning rate of a scheduler. The first
bracket is ``ascent``, the second sum, halved, ``stability``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import checks

Rule = Callable[[int, Tensor, Any], Tensor]


@runtime_checkable
class Account(Protocol):
    """The part of a learner's state that the step size needs; all but the rounds of shape ``(*batch,)``."""

    @property
    def step_size(self) -> Tensor:
        """The step size of the round to come; 0 before the first."""

    @property
    def inverse_step(self) -> Tensor:
        """One over the step size of the round that was played last; 0 before the first."""

    @property
    def variation(self) -> Tensor:
        """V_t."""

    @property
    def largest(self) -> Tensor:
        """The largest norm of a gradient so far; 0 where a bound on it was promised."""

    @property
    def ascent(self) -> Tensor:
        """See above."""

    @property
    def stability(self) -> Tensor:
        """See above."""

    @property
    def rounds(self) -> int:
        """How many rounds were played."""


def new_account(point: Tensor) -> dict[str, Any]:
    """Return the account before the first round of learners at ``(*batch, dim)``."""
    zero = point.new_zeros(point.shape[:-1])
    names = ("step_size", "inverse_step", "variation", "largest", "ascent", "stability")
    return {**dict.fromkeys(names, zero), "rounds": 0}


def play(
    state: Account, *, moved: Tensor, rule: Rule, largest: Tensor | None = None, free: Tensor | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Account for a round and choose the step size of the next.

    Args:
        state: Before the round.
        moved: v_t, squared in the norm of the method's own geometry.
        rule: ``(rounds, variation, largest) -> step size``.
        largest: The largest norm of a gradient, this round's included; None if the rule needs none.
        free: By how much 1 / step may grow at no cost, as the curvature of the losses pays for it.

    Returns:
        The step size of this round, and the account after it.
    """
    # Neither NaN nor infinity is less than infinity.
    checks.require(moved < torch.inf, lambda: "gradient contains NaN or infinity, or its square overflows")
    step = state.step_size
    if state.rounds == 0:
        step = rule(0, state.variation, largest)
    elif largest is not None:
        # As long as all gradients were zero the learner stayed at its start whatever the step: it may still be chosen.
        step = torch.where(state.largest == 0, rule(state.rounds, state.variation, largest), step)
    inverse, variation, rounds = step.reciprocal(), state.variation + moved, state.rounds + 1
    growth = inverse - state.inverse_step
    return step, {
        "step_size": rule(rounds, variation, largest),
        "inverse_step": inverse,
        "variation": variation,
        "largest": state.largest if largest is None else largest,
        "ascent": state.ascent + (growth if free is None else growth - free).clamp_min(0),
        "stability": torch.add(state.stability, step * moved, alpha=0.5),
        "rounds": rounds,
    }


def largest_norm(state: Account, gradient: Tensor) -> Tensor:
    """Return the largest Euclidean norm of a gradient so far, this one's included."""
    return torch.maximum(state.largest, torch.linalg.vector_norm(gradient, dim=-1))


def variation_rule(size: float | Tensor, grad_bound: float | None, eps: float) -> Rule:
    r"""Build the rule :math:`c / \sqrt{\epsilon + 4 G^2 + V}` of the papers, G promised or the largest norm so far."""
    if grad_bound is not None:
        floor = eps + 4 * grad_bound**2
        return lambda rounds, variation, largest: size * (variation + floor).rsqrt()
    return lambda rounds, variation, largest: size * torch.add(variation + eps, largest.square(), alpha=4).rsqrt()


def check_steps(grad_bound: float | None, lr: float, eps: float) -> None:
    """Raise unless the settings of a step size are in range."""
    if grad_bound is not None:
        checks.positive(grad_bound, "grad_bound")
    checks.non_negative(lr, "lr")
    checks.positive(eps, "eps")


def check_round(gradient: Tensor, point: Tensor, grad_bound: float | None, lr: float, eps: float) -> None:
    """Raise unless the gradient is one of the points, and the settings of a step size are in range."""
    checks.floating(gradient, "gradient")
    if gradient.shape != point.shape:
        raise ValueError(f"gradient must have the point's shape {tuple(point.shape)}, got {tuple(gradient.shape)}")
    check_steps(grad_bound, lr, eps)
    checks.positive(lr, "lr")
