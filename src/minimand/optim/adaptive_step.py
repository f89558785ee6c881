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


@runtime_checkable
class Account(Protocol):
    """The part of a learner's state that the step size needs; all of shape ``(*batch,)``."""

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
        """The bound on the norm of gradients: the one promised, or the largest norm so far."""

    @property
    def ascent(self) -> Tensor:
        """See above."""

    @property
    def stability(self) -> Tensor:
        """See above."""

    @property
    def rounds(self) -> Tensor:
        """How many rounds were played."""


def new_account(point: Tensor) -> dict[str, Tensor]:
    """Return the account before the first round of learners at ``(*batch, dim)``."""
    zero = point.new_zeros(point.shape[:-1])
    names = ("step_size", "inverse_step", "variation", "largest", "ascent", "stability", "rounds")
    return dict.fromkeys(names, zero)


def bound_on_gradients(state: Account, gradient: Tensor, norm: Callable[[Tensor], Tensor], promised: Any) -> Tensor:
    """Return the promised bound on gradients, or the largest norm seen, the gradient's included."""
    if promised is None:
        return torch.maximum(state.largest, norm(gradient))
    return torch.full_like(state.largest, promised)


def play(
    state: Account, *, moved: Tensor, largest: Tensor, rule: Callable[[Tensor, Tensor, Tensor], Tensor], free: Any = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Account for a round and choose the step size of the next.

    Args:
        state: Before the round.
        moved: v_t, squared in the norm of the method's own geometry.
        largest: The bound on gradients, this round's included.
        rule: ``(rounds, variation, bound on gradients) -> step size``.
        free: By how much 1 / step may grow at no cost, as the curvature of the losses pays for it.

    Returns:
        The step size of this round, and the account after it.
    """
    checks.require(torch.isfinite(moved), lambda: "gradient contains NaN or infinity, or its square overflows")
    # As long as all gradients were zero the learner stayed at its start whatever the step: it may still be chosen.
    step = torch.where(state.largest == 0, rule(state.rounds, state.variation, largest), state.step_size)
    inverse, variation, rounds = step.reciprocal(), state.variation + moved, state.rounds + 1
    return step, {
        "step_size": rule(rounds, variation, largest),
        "inverse_step": inverse,
        "variation": variation,
        "largest": largest,
        "ascent": state.ascent + (inverse - state.inverse_step - free).clamp_min(0),
        "stability": state.stability + step * moved / 2,
        "rounds": rounds,
    }


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
