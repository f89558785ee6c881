r"""An ensemble of optimistic mirror descents, for comparators that move: dynamic regret without knowing how far.

N learners with step sizes :math:`\eta_i = \min\{1 / 8L, 2^{i-1} \sqrt{D^2 / 8 G^2 T}\}` all take the gradient at the
combined point :math:`x_t = \sum_i p_{t,i} x_{t,i}`. The weights are those of optimistic mirror descent with the entropy
(:func:`~minimand.optim.optimistic_entropic_step`) on losses that also charge each learner for its movement,

.. math:: \ell_{t,i} = \langle g_t, x_{t,i} \rangle + c \|x_{t,i} - x_{t-1,i}\|^2, \qquad
          m_{t+1,i} = \langle g_t, x_{t+1,i} \rangle + c \|x_{t+1,i} - x_{t,i}\|^2, \qquad c = 2L,

the second being the hint for the first. Of the two layers' bounds follows, for any gradients and any comparators with
the path length :math:`P_T = \sum_{t \ge 2} \|u_t - u_{t-1}\|`,

.. math:: \sum_t \langle g_t, x_t - u_t \rangle \le \min_i \Big\{ \text{regret of the weights to } i
          + c \sum_t \Big(\|x_{t,i} - x_{t-1,i}\|^2 - \sum_j p_{t,j} \|x_{t,j} - x_{t-1,j}\|^2\Big)
          + \frac{D^2 / 2 + D P_T}{\eta_i} + \frac{\eta_i}{2} V_T \Big\}.

Source: Chen et al., JMLR 25 (2024), arXiv 2302.04552, section on dynamic regret; the two layers with corrections: Zhao,
Zhang, Zhang and Zhou, JMLR 25 (2024), arXiv 2112.14368. The step size of the weights and the bound are re-derived.
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
from .adaptive_step import check_round, check_steps, new_account, play
from .domains import check_domain, project_rows
from .optimistic_ftrl import FollowState, optimistic_entropic_step
from .vector_optimizer import VectorOptimizer


def ensemble_step_sizes(
    horizon: int, *, smoothness: float, grad_bound: float, diameter: float
) -> Float[Tensor, " learners"]:
    r"""Compute the step sizes of the learners: doubling from the static one up to :math:`1 / 8L`.

    Args:
        horizon: T, how many rounds will be played.
        smoothness: L, the Lipschitz constant of the mean losses' gradients.
        grad_bound: G, which no gradient's norm exceeds.
        diameter: D, the largest distance of two points of the domain.

    Returns:
        One step size a learner, rising, in float64.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> ensemble_step_sizes(1000, smoothness=1.0, grad_bound=2.0, diameter=2.0)
        tensor([0.0112, 0.0224, 0.0447, 0.0894, 0.1250], dtype=torch.float64)

    Source:
        Chen et al. 2024, arXiv 2302.04552.
    """
    for value, name in (
        (horizon, "horizon"),
        (smoothness, "smoothness"),
        (grad_bound, "grad_bound"),
        (diameter, "diameter"),
    ):
        checks.positive(value, name)
    smallest, largest = diameter / (grad_bound * math.sqrt(8 * horizon)), 1 / (8 * smoothness)
    count = max(1, math.ceil(math.log2(largest / smallest)) + 1)
    return (smallest * 2.0 ** torch.arange(count, dtype=torch.float64)).clamp_max(largest)


class EnsembleState(NamedTuple):
    """Where ensembles stand between two rounds; ``(*batch, dim)``, ``(*batch, learners, dim)`` or ``(*batch,)``.

    Attributes:
        point: The combined point to play next.
        points: The learners' own points.
        anchors: The learners' second sequences.
        moves: How far each learner has just moved, squared; ``(*batch, learners)``.
        correction: The sum over rounds of each learner's move less the weighted mean of all moves.
        hint: The last gradient.
        weights: The state of the weights.
        step_size: What multiplies the learners' step sizes in the next round.
        inverse_step: One over that of the last round.
        variation: V_t.
        largest: Not used.
        ascent: See :mod:`minimand.optim.adaptive_step`.
        stability: See :mod:`minimand.optim.adaptive_step`.
        rounds: How many rounds were played.
    """

    point: Tensor
    points: Tensor
    anchors: Tensor
    moves: Tensor
    correction: Tensor
    hint: Tensor
    weights: FollowState
    step_size: Tensor
    inverse_step: Tensor
    variation: Tensor
    largest: Tensor
    ascent: Tensor
    stability: Tensor
    rounds: int

    @classmethod
    def at(cls, point: Float[Tensor, "*batch dim"], *, learners: int) -> EnsembleState:
        """Begin with so many learners at a point of the domain."""
        checks.floating(point, "point")
        checks.finite(point, "point")
        points = point[..., None, :].expand(*point.shape[:-1], learners, point.shape[-1])
        zeros = torch.zeros_like(points[..., 0])
        weights = FollowState.on_simplex(torch.full_like(zeros, 1 / learners))
        return cls(point, points, points, zeros, zeros, torch.zeros_like(point), weights, **new_account(point))

    def regret_bound(
        self,
        *,
        step_sizes: Float[Tensor, " learners"],
        diameter: float,
        smoothness: float,
        path_length: float | Float[Tensor, "*batch"] = 0.0,
    ) -> Float[Tensor, "*batch"]:
        """Return what the dynamic regret of the rounds played cannot exceed.

        Args:
            step_sizes: The learners'.
            diameter: D.
            smoothness: L.
            path_length: P_T of the comparators; 0 for a fixed one.
        """
        steps = step_sizes.to(self.point)
        distance = diameter**2 / 2 + diameter * torch.as_tensor(path_length).to(self.point)
        tracking = (distance * self.ascent)[..., None] / steps + self.stability[..., None] * steps
        combining = self.weights.entropic_regret_bound()[..., None] + 2 * smoothness * self.correction
        return (combining + tracking).amin(-1)


def ensemble_step(
    state: EnsembleState,
    gradient: Float[Tensor, "*batch dim"],
    *,
    step_sizes: Float[Tensor, " learners"],
    diameter: float,
    grad_bound: float,
    smoothness: float,
    domain: Projection | None = None,
    lr: float = 1.0,
) -> EnsembleState:
    """Compute the next combined point of an ensemble, for many streams at once.

    Args:
        state: From :meth:`EnsembleState.at` or the last round.
        gradient: Of the losses at ``state.point``.
        step_sizes: Of the learners: :func:`ensemble_step_sizes`.
        diameter: D, the largest distance of two points of the domain; without one, a scale.
        grad_bound: G, which no gradient's norm exceeds.
        smoothness: L, the Lipschitz constant of the mean losses' gradients.
        domain: A ball, box or simplex, or None.
        lr: Multiplies the step sizes; 1 in the paper.

    Returns:
        The state of the next round, whose ``point`` is to be played.

    Raises:
        ValueError: If a gradient is not finite, a setting out of range or the number of step sizes wrong.
        TypeError: If the domain is of another kind.

    Example:
        >>> state = EnsembleState.at(torch.zeros(2), learners=2)
        >>> sizes = torch.tensor([0.05, 0.1])
        >>> bounds = {"diameter": 2.0, "grad_bound": 5.0, "smoothness": 1.0}
        >>> ensemble_step(state, torch.tensor([3.0, 4.0]), step_sizes=sizes, **bounds).point
        tensor([-0.4562, -0.6083])

    Source:
        Chen et al. 2024, arXiv 2302.04552.
    """
    check_round(gradient, state.point, grad_bound, lr, 1.0)
    for value, name in ((diameter, "diameter"), (smoothness, "smoothness")):
        checks.positive(value, name)
    check_domain(domain)
    if step_sizes.shape != state.moves.shape[-1:]:
        raise ValueError(f"step_sizes must be one for each of {state.moves.shape[-1]} learners, got {len(step_sizes)}")
    difference = gradient - state.hint
    multiplier, account = play(
        state,
        moved=torch.linalg.vecdot(difference, difference),
        rule=lambda rounds, variation, largest: torch.full_like(variation, lr),
    )
    steps, row = step_sizes.to(gradient), gradient[..., None, :]
    anchors = project_rows(state.anchors - (multiplier[..., None] * steps)[..., None] * row, domain)
    points = project_rows(anchors - (account["step_size"][..., None] * steps)[..., None] * row, domain)
    moves = (points - state.points).square().sum(-1)
    played = state.weights.point
    weights = optimistic_entropic_step(
        state.weights,
        torch.linalg.vecdot(state.points, row) + 2 * smoothness * state.moves,
        hint=torch.linalg.vecdot(points, row) + 2 * smoothness * moves,
        # A hint errs by <g_t - g_{t-1}, x_i>, of which half the range is at most G D.
        grad_bound=grad_bound * diameter / 2,
    )
    return EnsembleState(
        point=(weights.point[..., None] * points).sum(-2),
        points=points,
        anchors=anchors,
        moves=moves,
        correction=state.correction + state.moves - (played * state.moves).sum(-1, keepdim=True),
        hint=gradient,
        weights=weights,
        **account,
    )


class EnsembleMirrorDescent(VectorOptimizer):
    """An ensemble of optimistic mirror descents as a torch optimizer, for losses whose best point moves and is noisy.

    It keeps three vectors a learner, and there are about half as many learners as the horizon has bits: for problems
    of thousands of parameters rather than networks of millions. Where losses move without noise, a single
    :class:`OptimisticMirrorDescent` is better, and cheaper.

    Args:
        params: Parameters, or groups of them, inside the domain. All of a group are one vector.
        diameter: D, above 0: the largest distance of two points of the domain; None for the domain's own.
        horizon: T, how many rounds will be played.
        smoothness: L, the Lipschitz constant of the mean losses' gradients.
        grad_bound: G, which no gradient's norm exceeds.
        domain: :class:`~minimand.projections.Ball`, ``Box`` or ``Simplex``, or None for all of space.
        lr: Multiplies the step sizes; 1 in the paper. A round with 0 is not played.
        average: Whether to keep the mean of the points played, at the memory of one more copy.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> bounds = {"horizon": 1000, "smoothness": 1.0, "grad_bound": 2.0}
        >>> optimizer = EnsembleMirrorDescent([weight], diameter=2.0, **bounds)
        >>> (weight - 1).square().sum().div(2).backward()
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([0.1192, 0.1192], requires_grad=True)

    Source:
        Chen et al. 2024, arXiv 2302.04552.
    """

    def __init__(
        self,
        params: Iterable[Any],
        diameter: float | None = None,
        *,
        horizon: int,
        smoothness: float,
        grad_bound: float,
        domain: Projection | None = None,
        lr: float = 1.0,
        average: bool = False,
    ) -> None:
        settings = {
            "diameter": diameter,
            "horizon": horizon,
            "smoothness": smoothness,
            "grad_bound": grad_bound,
            "lr": lr,
        }
        super().__init__(params, settings, domain=domain, average=average)

    def regret_bound(self, path_length: float = 0.0) -> float:
        """Return what the regret of the rounds so far cannot exceed, against comparators that move so far in all.

        With several groups, the path length is counted in full against each of them.

        Args:
            path_length: P_T, the sum of the distances between consecutive comparators.
        """
        checks.non_negative(path_length, "path_length")
        return float(sum(self._bound(group, state, path_length) for group, state in self._states()))

    def _check(self, group: dict[str, Any], dim: int) -> None:
        check_steps(group["grad_bound"], group["lr"], 1.0)
        _step_sizes(group)

    def _begin(self, group: dict[str, Any], vector: Tensor) -> EnsembleState:
        return EnsembleState.at(vector, learners=len(_step_sizes(group)))

    def _advance(self, group: dict[str, Any], state: Any, gradient: Tensor) -> EnsembleState:
        return ensemble_step(
            state,
            gradient,
            step_sizes=_step_sizes(group),
            diameter=group["diameter"],
            grad_bound=group["grad_bound"],
            smoothness=group["smoothness"],
            domain=self.domain,
            lr=group["lr"],
        )

    def _bound(self, group: dict[str, Any], state: Any, path_length: float = 0.0) -> Tensor:
        return state.regret_bound(
            step_sizes=_step_sizes(group),
            diameter=group["diameter"],
            smoothness=group["smoothness"],
            path_length=path_length,
        )

    def _restore(self, group: dict[str, Any], saved: dict[str, Any]) -> EnsembleState:
        return EnsembleState(**{**saved, "weights": FollowState(**saved["weights"])})


def _step_sizes(group: dict[str, Any]) -> Tensor:
    return ensemble_step_sizes(
        group["horizon"],
        smoothness=group["smoothness"],
        grad_bound=group["grad_bound"],
        diameter=group["diameter"],
    )
