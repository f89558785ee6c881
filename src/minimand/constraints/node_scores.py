r"""How well a node's parents explain it: the inner models of a search for a graph.

A score of a graph that adds up over the nodes, :math:`Q = \sum_j Q_j(\text{parents of } j)`, is all that
:class:`minimand.constraints.TopoSwap` asks for. Any object with the method and the attribute of :class:`NodeScore` will
do; here are least squares, logistic regression and small networks, each fitting many nodes side by side.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import checks

_SINGULAR = 1e-13  # least eigenvalue of a correlation matrix, for each of its columns


@dataclasses.dataclass(frozen=True)
class NodeFits:
    """Models of nodes, fitted to their parents.

    Args:
        values: Q_j, ``(fits,)``, penalties included.
        weights: ``(fits, nodes)``: weight of each parent, or its strength where a weight is no number; 0 for no parent.
        gradients: ``(fits, nodes)``: derivative of Q_j by the weight of each node, parent or not, or the norm of it;
            where a penalty has a kink the smallest of its derivatives. 0 at the node itself. None if there is none.
        state: ``(fits, numbers)``: whatever a later fit may start from and a prediction needs, or None.
    """

    values: Tensor
    weights: Tensor
    gradients: Tensor | None = None
    state: Tensor | None = None

    def take(self, rows: Tensor) -> NodeFits:
        """Keep some fits."""
        gradients = None if self.gradients is None else self.gradients[rows]
        return NodeFits(
            self.values[rows], self.weights[rows], gradients, None if self.state is None else self.state[rows]
        )

    def put(self, rows: Tensor, fits: NodeFits) -> NodeFits:
        """Return these fits with some replaced."""

        def replaced(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else mine.index_copy(0, rows, theirs)

        return NodeFits(
            self.values.index_copy(0, rows, fits.values),
            self.weights.index_copy(0, rows, fits.weights),
            replaced(self.gradients, fits.gradients),
            replaced(self.state, fits.state),
        )


@runtime_checkable
class NodeScore(Protocol):
    """What a model of a node must do to be searched with.

    Attributes:
        max_fits: Most fits a call: it bounds the memory, and a search looks at results after each call.
    """

    max_fits: int

    def fit(
        self,
        data: Float[Tensor, "rows nodes"],
        nodes: Int[Tensor, " fits"],
        parents: Bool[Tensor, "fits nodes"],
        start: NodeFits | None = None,
    ) -> NodeFits:
        """Fit each of ``nodes`` to its ``parents``, from the earlier fits ``start`` of the same nodes or anew."""
        ...


class LeastSquaresScore:
    r"""Linear models: :math:`Q_j = \frac1{2n} \|x_j - X w_j\|^2 + \lambda \|w_j\|_1`, columns centred.

    Args:
        l1: lambda, at least 0. At 0 fits are exact; above it they are by cyclic coordinate descent.
        max_fits: Most fits a call.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [0.0, 1.0], [0.0, -1.0]])
        >>> fits = LeastSquaresScore().fit(rows, torch.tensor([1]), torch.tensor([[True, False]]))
        >>> fits.weights.round(decimals=6), fits.values
        (tensor([[2., 0.]], dtype=torch.float64), tensor([0.2500], dtype=torch.float64))

    Source:
        Deng et al. 2023, arXiv 2305.17277, the linear score.
    """

    def __init__(self, *, l1: float = 0.0, max_fits: int = 2048) -> None:
        checks.non_negative(l1, "l1")
        self.l1, self.max_fits = l1, _at_least_one(max_fits)

    def fit(
        self,
        data: Float[Tensor, "rows nodes"],
        nodes: Int[Tensor, " fits"],
        parents: Bool[Tensor, "fits nodes"],
        start: NodeFits | None = None,
    ) -> NodeFits:
        """Fit each node to its parents; exact fits have no use for ``start``."""
        covariance = covariance_of(data)
        target = covariance[nodes]
        system, right = _masked(covariance.expand(len(nodes), -1, -1), target, parents)
        if self.l1 == 0:
            weights = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(system))[..., 0]
        else:
            begin = torch.zeros_like(right) if start is None else torch.where(parents, start.weights, 0)
            weights = _lasso(system, right, torch.full_like(right[0], self.l1), begin)
        own = covariance.diagonal()[nodes]
        slope = weights @ covariance - target
        residual = (own + ((slope - target) * weights).sum(1)).clamp_min(0)
        gradients = least_subgradient(weights, slope, self.l1).scatter(1, nodes[:, None], 0)
        return NodeFits(residual / 2 + self.l1 * weights.abs().sum(1), weights, gradients)

    def gradients(
        self, data: Float[Tensor, "rows nodes"], weights: Float[Tensor, "nodes nodes"]
    ) -> Float[Tensor, "nodes nodes"]:
        """Return the derivative of the score by every weight; where the penalty has a kink, the smallest of them."""
        covariance = covariance_of(data)
        w = weights.to(covariance)
        return least_subgradient(w, covariance @ w - covariance, self.l1).fill_diagonal_(0)


class LogisticScore:
    r"""Logistic models of binary nodes: :math:`Q_j = \frac1n \sum [\log(1 + e^m) - x_j m] + \lambda \|w_j\|_1`.

    The logits are :math:`m = X w_j`, plus an intercept if there is one. Fits are by damped Newton steps, with
    coordinate descent inside them where ``l1`` is not 0.

    Args:
        l1: lambda, at least 0.
        intercept: Whether each model has one, without penalty. The paper's models have none.
        tolerance: Largest derivative that is left, where ``max_iter`` permits.
        num_iters: Most Newton steps.
        max_fits: Most fits a call.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
        >>> fits = LogisticScore().fit(rows, torch.tensor([1]), torch.tensor([[True, False]]))
        >>> fits.weights.float(), fits.state.abs().float().round(decimals=6)  # log odds of 2 to 1, and of 1 to 1
        (tensor([[0.6931, 0.0000]]), tensor([[0.]]))

    Source:
        Deng et al. 2023, arXiv 2305.17277, the logistic score.
    """

    def __init__(
        self,
        *,
        l1: float = 0.0,
        intercept: bool = True,
        tolerance: float = 1e-8,
        num_iters: int = 50,
        max_fits: int = 512,
    ) -> None:
        checks.non_negative(l1, "l1")
        checks.positive(tolerance, "tolerance")
        self.l1, self.intercept, self.tolerance = l1, intercept, tolerance
        self.num_iters, self.max_fits = _at_least_one(num_iters, "num_iters"), _at_least_one(max_fits)

    def fit(
        self,
        data: Float[Tensor, "rows nodes"],
        nodes: Int[Tensor, " fits"],
        parents: Bool[Tensor, "fits nodes"],
        start: NodeFits | None = None,
    ) -> NodeFits:
        """Fit each node to its parents; ``state`` holds the intercepts."""
        x = self._binary(data)
        size = x.shape[1]
        design = torch.cat([x, torch.ones_like(x[:, :1])], 1) if self.intercept else x
        products = (design[:, :, None] * design[:, None, :]).flatten(1)
        permitted = torch.nn.functional.pad(parents, (0, design.shape[1] - size), value=True)
        penalty = torch.full_like(design[0], self.l1)
        penalty[size:] = 0
        y = x[:, nodes].T
        w = torch.zeros(len(nodes), design.shape[1], dtype=x.dtype, device=x.device)
        if start is not None:
            before = start.weights if start.state is None else torch.cat([start.weights, start.state], 1)
            w = torch.where(permitted, before.to(x), 0)

        def objective(w: Tensor) -> Tensor:
            logits = w @ design.T
            return (torch.nn.functional.softplus(logits) - y * logits).mean(1) + (penalty * w.abs()).sum(1)

        value = objective(w)
        for _ in range(self.num_iters):
            chance = torch.sigmoid(w @ design.T)
            slope = (chance - y) @ design / len(x)
            left = least_subgradient(w, slope, penalty)
            if float(torch.where(permitted, left, 0).abs().amax()) <= self.tolerance:
                break
            curvature = ((chance * (1 - chance)) @ products / len(x)).view(len(w), design.shape[1], -1)
            # A whisper of curvature keeps separable classes, whose best weights are infinite, from a singular system.
            curvature.diagonal(dim1=1, dim2=2).add_(1e-9)
            if self.l1 == 0:
                system, right = _masked(curvature, slope, permitted)
                step = -torch.linalg.solve(system, right[..., None])[..., 0]
            else:
                system, right = _masked(curvature, (curvature @ w[..., None])[..., 0] - slope, permitted)
                step = _lasso(system, right, penalty, w) - w
            length = torch.ones_like(value)
            for _ in range(30):
                tried = objective(w + length[:, None] * step)
                worse = tried > value + 1e-12 * value.abs()
                if not bool(worse.any()):
                    break
                length = torch.where(worse, length / 2, length)
            fine = tried <= value + 1e-12 * value.abs()
            w = torch.where(fine[:, None], w + length[:, None] * step, w)
            value = torch.where(fine, tried, value)
        slope = (torch.sigmoid(w @ design.T) - y) @ design / len(x)
        gradients = least_subgradient(w, slope, penalty)[:, :size].scatter(1, nodes[:, None], 0)
        return NodeFits(value, w[:, :size], gradients, w[:, size:] if self.intercept else None)

    def gradients(
        self, data: Float[Tensor, "rows nodes"], weights: Float[Tensor, "nodes nodes"]
    ) -> Float[Tensor, "nodes nodes"]:
        """Return the derivative of the score by every weight, the best intercepts given; see :class:`NodeFits`."""
        x = self._binary(data)
        w = weights.to(x)
        logits = x @ w
        if self.intercept:
            shift = torch.zeros_like(logits[0])
            for _ in range(self.num_iters):
                chance = torch.sigmoid(logits + shift)
                # A logit moves its probability by at most a quarter of itself: the step is held to one unit.
                step = (x - chance).mean(0) / (chance * (1 - chance)).mean(0).clamp_min(1e-12)
                shift = shift + step.clamp(-1, 1)
            logits = logits + shift
        slope = x.T @ (torch.sigmoid(logits) - x) / len(x)
        return least_subgradient(w, slope, self.l1).fill_diagonal_(0)

    def _binary(self, data: Tensor) -> Tensor:
        checks.require((data == 0) | (data == 1), lambda: "data must hold zeros and ones only for the logistic score")
        return data.to(working_dtype(data))


class MLPScore:
    r"""A small network for each node: :math:`Q_j = \frac1{2n}\|x_j - f_j(X)\|^2 + \lambda_1 \|U_j\|_1 + \lambda_2 R`.

    :math:`f_j(x) = v_j^\top \sigma(U_j x + b_j)`, columns centred, :math:`R` half the sum of squares of U and v. The
    strength of a parent is the norm of its weights in U. The paper has no biases b, but then a function of one parent
    is odd up to a constant. All networks of a call are trained together, by Adam with the penalty's proximal
    step in Adam's own metric, its rate falling to 0 along a cosine. Bring columns to a common scale first: weights
    are penalised alike.

    Args:
        hidden: Hidden units; the paper's 40.
        l1: lambda_1, at least 0; the paper's 0.01.
        l2: lambda_2, at least 0; the paper's 0.01.
        num_iters: Steps of Adam for a fit.
        lr: Its first rate.
        seed: Draws the first weights, the same for a node whenever it is fitted anew.
        max_fits: Most networks trained together.

    Example:
        >>> x = torch.linspace(-2, 2, 50)
        >>> rows = torch.stack([x, x.square()], 1)  # a line says nothing of the second by the first
        >>> score = MLPScore(hidden=8, l1=0.0, l2=0.0)
        >>> parents = torch.tensor([[False, False], [True, False]])
        >>> values = score.fit(rows, torch.tensor([1, 1]), parents).values
        >>> bool(values[1] < 0.2 * values[0])
        True

    Source:
        Deng et al. 2023, arXiv 2305.17277, the neural score; the networks of Zheng et al. 2020, arXiv 1909.13189.
    """

    def __init__(
        self,
        *,
        hidden: int = 40,
        l1: float = 0.01,
        l2: float = 0.01,
        num_iters: int = 200,
        lr: float = 0.03,
        seed: int = 0,
        max_fits: int = 32,
    ) -> None:
        checks.non_negative(l1, "l1")
        checks.non_negative(l2, "l2")
        checks.positive(lr, "lr")
        self.hidden, self.num_iters = _at_least_one(hidden, "hidden"), _at_least_one(num_iters, "num_iters")
        self.l1, self.l2, self.lr, self.seed, self.max_fits = l1, l2, lr, seed, _at_least_one(max_fits)

    def fit(
        self,
        data: Float[Tensor, "rows nodes"],
        nodes: Int[Tensor, " fits"],
        parents: Bool[Tensor, "fits nodes"],
        start: NodeFits | None = None,
    ) -> NodeFits:
        """Train a network for each node; ``state`` holds U and b ``(hidden, nodes + 1)`` and v, flattened."""
        x, y = self._with_ones(data - data.mean(0)), (data - data.mean(0))[:, nodes].T
        size = x.shape[1]
        draw = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(size - 1, self.hidden * (size + 1), generator=draw, dtype=torch.float64)
        scale = torch.full_like(drawn[0], 1 / math.sqrt(size))
        scale[self.hidden * size :] = 1 / math.sqrt(self.hidden)
        first_state = (drawn * scale).to(x)[nodes]
        permitted = torch.nn.functional.pad(parents, (0, 1), value=True)
        permitted = permitted[:, None, :].expand(-1, self.hidden, -1).flatten(1)
        permitted = torch.nn.functional.pad(permitted, (0, self.hidden), value=True)
        warm = None if start is None else start.state
        weights = torch.where(permitted, first_state if warm is None else warm, 0)
        penalty = torch.full_like(weights[0], self.l1)
        penalty[self.hidden * size :] = 0
        penalty[size - 1 : self.hidden * size : size] = 0
        value, slope = self._smooth(x, y, weights)
        best, least = weights, value + (penalty * weights.abs()).sum(1)
        if warm is not None:
            # A network that had nothing to say has shrunk to zero, where its gradient is zero too.
            weights = weights + torch.where(permitted, 0.1 * first_state, 0)
            value, slope = self._smooth(x, y, weights)
        first, second = torch.zeros_like(weights), torch.zeros_like(weights)
        for step in range(1, self.num_iters + 1):
            rate = self.lr * (1 + math.cos(math.pi * step / (self.num_iters + 1))) / 2
            first = first.lerp(slope, 0.1)
            second = second.lerp(slope.square(), 0.01)
            reach = rate / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
            moved = weights - reach * first / (1 - 0.9**step)
            weights = torch.where(permitted, soft_threshold(moved, reach * penalty), 0)
            value, slope = self._smooth(x, y, weights)
            total = value + (penalty * weights.abs()).sum(1)
            better = total < least
            best, least = torch.where(better[:, None], weights, best), torch.where(better, total, least)
        _, slope = self._smooth(x, y, best)
        slope = least_subgradient(best, slope, penalty)[:, : self.hidden * size].unflatten(1, (self.hidden, size))
        u = best[:, : self.hidden * size].unflatten(1, (self.hidden, size))
        gradients = slope.norm(dim=1)[:, :-1].scatter(1, nodes[:, None], 0)
        return NodeFits(least, u.norm(dim=1)[:, :-1], gradients, best)

    def predict(
        self, data: Float[Tensor, "rows nodes"], fits: NodeFits, *, mean: Float[Tensor, " nodes"]
    ) -> Float[Tensor, "rows fits"]:
        """Predict fitted nodes, less their means, from rows; ``mean`` is that of the data that trained them."""
        if fits.state is None:
            raise ValueError("fits must hold the networks' weights in state")
        x = self._with_ones(data - mean)
        u, v = fits.state.split((self.hidden * x.shape[1], self.hidden), dim=1)
        active = torch.sigmoid(x @ u.unflatten(1, (self.hidden, x.shape[1])).mT)
        return (active @ v[..., None])[..., 0].T

    @staticmethod
    def _with_ones(x: Tensor) -> Tensor:
        """Add the input that the biases multiply."""
        return torch.nn.functional.pad(x, (0, 1), value=1.0)

    def _smooth(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and squared penalty of each network, and their gradient."""
        size = x.shape[1]
        u, v = weights.split((self.hidden * size, self.hidden), dim=1)
        active = torch.sigmoid(x @ u.unflatten(1, (self.hidden, size)).mT)
        error = (active @ v[..., None])[..., 0] - y
        shrunk = weights.clone()
        shrunk[:, size - 1 : self.hidden * size : size] = 0  # biases are free
        value = error.square().mean(1) / 2 + self.l2 / 2 * shrunk.square().sum(1)
        error = error / len(x)
        by_v = (active.mT @ error[..., None])[..., 0]
        inner = error[..., None] * v[:, None, :] * active * (1 - active)
        by_u = (inner.mT @ x).flatten(1)
        return value, torch.cat([by_u, by_v], 1) + self.l2 * shrunk


def covariance_of(data: Tensor) -> Tensor:
    """Return X'X / n of centred columns, in double precision where the device has it, jittered if it is singular."""
    centred = data.to(working_dtype(data))
    centred = centred - centred.mean(0)
    covariance = centred.T @ centred / len(centred)
    scale = covariance.diagonal().sqrt()
    correlation = covariance / scale / scale[:, None]
    # Rows that the columns before explain up to rounding leave nothing to choose a parent by.
    if float(torch.linalg.eigvalsh(correlation)[0]) < _SINGULAR * len(scale):
        warnings.warn(
            f"columns of data are linearly dependent ({len(data)} rows, {len(scale)} columns): 1e-10 of each variance "
            "is added to it, and weights among these columns mean little",
            stacklevel=2,
        )
        covariance = covariance + torch.diag(1e-10 * covariance.diagonal())
    return covariance


def working_dtype(data: Tensor) -> torch.dtype:
    """Return float64, or float32 on a device without it."""
    return torch.float32 if data.device.type == "mps" else torch.float64


def soft_threshold(values: Tensor, by: Tensor | float) -> Tensor:
    """Move values towards 0 by ``by``, and no further."""
    limit = torch.as_tensor(by, dtype=values.dtype, device=values.device)
    return values - values.clamp(-limit, limit)


def least_subgradient(weights: Tensor, slope: Tensor, l1: Tensor | float) -> Tensor:
    """Return the derivative of least size of a smooth function plus an l1 penalty."""
    return torch.where(weights == 0, soft_threshold(slope, l1), slope + l1 * weights.sign())


def _masked(matrix: Tensor, right: Tensor, permitted: Tensor) -> tuple[Tensor, Tensor]:
    """Make a system whose solution is 0 off the permitted places and solves the rest."""
    both = permitted[:, :, None] & permitted[:, None, :]
    system = torch.where(both, matrix, 0)
    system.diagonal(dim1=1, dim2=2).add_((~permitted).to(system))
    return system, torch.where(permitted, right, 0)


def _lasso(system: Tensor, right: Tensor, penalty: Tensor, start: Tensor) -> Tensor:
    """Minimise w'Aw / 2 - b'w + sum of penalty |w| for a batch, by cyclic coordinate descent."""
    w = start.clone()
    curvature = system.diagonal(dim1=1, dim2=2)
    for _ in range(1000):
        largest = torch.zeros((), dtype=w.dtype, device=w.device)
        for place in range(w.shape[1]):
            pull = right[:, place] - (system[:, place] * w).sum(1) + curvature[:, place] * w[:, place]
            new = soft_threshold(pull, penalty[place]) / curvature[:, place]
            # What the change does to a derivative, which is what the tolerance of a solution is about.
            largest = torch.maximum(largest, ((new - w[:, place]).abs() * curvature[:, place]).amax())
            w[:, place] = new
        if float(largest) <= 1e-12 + 1e-10 * float(right.abs().amax()):
            break
    return w


def _at_least_one(number: int, name: str = "max_fits") -> int:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
