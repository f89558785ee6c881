r"""How sharp a minimum is: the rise of the loss nearby, and the top eigenvalue of the Hessian.

For a loss :math:`L` at weights :math:`w`,

.. math:: S_\rho(w) = \max_{\|\epsilon\|_2 \le \rho} L(w + \epsilon) - L(w),
          \qquad \lambda_{\max}(\nabla^2 L(w)).

At a minimum the two agree to second order: :math:`S_\rho \to \lambda_{\max} \rho^2 / 2`. Neither is invariant to a
rescaling of layers that leaves the function alone, so compare models of one architecture trained alike.

Source: Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
ICLR 2021, arXiv 2010.01412, equation 1; Du, Zhou, Feng, Tan and Zhou, "Sharpness-Aware Training for Free",
NeurIPS 2022, arXiv 2205.14083, which measures both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from .. import checks

LossFunction = Callable[[Tensor, Tensor], Tensor]


def sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Tensor, Tensor],
    *,
    radius: float = 0.1,
    steps: int = 5,
) -> float:
    r"""Compute the largest rise of the loss that gradient ascent finds in a ball around the weights.

    Each step jumps to the point of the ball that the present gradient favours,
    :math:`\epsilon \leftarrow \rho\, g(w + \epsilon) / \|g\|_2`. The first is SAM's; where the loss is
    convex each of the others is at least as high as the one before. The best is returned, a lower bound of
    :math:`S_\rho`.

    Args:
        model: Measured in the mode, training or evaluation, that it is in. Left as it was.
        loss_fn: ``loss_fn(model(inputs), target)``, a scalar.
        batch: Inputs and target.
        radius: The paper's rho: radius of the ball, over all weights that require a gradient.
        steps: Ascent steps.

    Returns:
        The rise, at least 0, in the units of the loss.

    Raises:
        ValueError: If the radius is not positive, or the loss is not finite.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(1, 1), torch.zeros(1, 1)
        >>> rise = sharpness(model, lambda scores, target: 3 * scores.sum(), batch, radius=0.5)  # slope 3
        >>> round(rise, 4)
        1.5

    Source:
        Foret et al. 2021, equation 1.
    """
    checks.positive(radius, "radius")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with _loss_of(model, loss_fn, batch) as (weights, loss_at):
        here = {name: weight.detach() for name, weight in weights.items()}
        moved, start, best = here, None, 0.0
        for step in range(steps + 1):
            points = {name: weight.detach().requires_grad_() for name, weight in moved.items()}
            value = loss_at(points)
            start = value.item() if start is None else start
            best = max(best, value.item() - start)
            if step == steps:
                break
            gradients = torch.autograd.grad(value, list(points.values()), materialize_grads=True)
            norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
            if not norm > 0:
                break  # a stationary point favours no direction
            moved = {
                name: weight + radius / norm * gradient
                for (name, weight), gradient in zip(here.items(), gradients, strict=True)
            }
    return best


def top_hessian_eigenvalue(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: tuple[Tensor, Tensor],
    *,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> float:
    """Compute the largest eigenvalue of the loss's Hessian in the weights.

    Lanczos iteration on Hessian-vector products, which needs far fewer of them than the power iteration and
    finds the largest eigenvalue even where a negative one is larger in size. Keeps about twenty vectors of
    the weights' length.

    Args:
        model: Measured in the mode, training or evaluation, that it is in. Left as it was.
        loss_fn: ``loss_fn(model(inputs), target)``, a scalar that can be differentiated twice.
        batch: Inputs and target.
        tolerance: Relative accuracy.
        seed: Of the vector to start from.

    Returns:
        The eigenvalue, in the units of the loss over those of the weights squared.

    Raises:
        ValueError: If the model has no weights to train, or the loss is not finite.
        scipy.sparse.linalg.ArpackNoConvergence: If the accuracy is not reached.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batch = torch.eye(2), torch.zeros(2, 1)
        >>> round(top_hessian_eigenvalue(model, nn.MSELoss(reduction="sum"), batch), 4)  # sum of squares
        2.0

    Source:
        Du et al. 2022, arXiv 2205.14083, which reports it.
    """
    checks.positive(tolerance, "tolerance")
    with _loss_of(model, loss_fn, batch) as (weights, loss_at):
        points = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        values = list(points.values())
        # One graph serves every product.
        gradients = torch.autograd.grad(loss_at(points), values, create_graph=True, materialize_grads=True)
        size = sum(value.numel() for value in values)

        def product(vector: np.ndarray) -> np.ndarray:
            flat = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64).reshape(-1))
            parts = flat.split([value.numel() for value in values])
            directions = [part.reshape(value.shape).to(value) for part, value in zip(parts, values, strict=True)]
            bent = [(g, d) for g, d in zip(gradients, directions, strict=True) if g.requires_grad]
            if not bent:
                return np.zeros(size)
            rows = torch.autograd.grad(
                [g for g, _ in bent], values, [d for _, d in bent], retain_graph=True, materialize_grads=True
            )
            return torch.cat([row.flatten() for row in rows]).double().cpu().numpy()

        if size == 1:
            return float(product(np.ones(1))[0])
        start = np.random.default_rng(seed).standard_normal(size)
        if not product(start).any():
            return 0.0  # no curvature at all, which Lanczos cannot start on
        found = eigsh(
            LinearOperator((size, size), matvec=product, dtype=np.float64),
            k=1,
            which="LA",
            v0=start,
            tol=tolerance,
            return_eigenvectors=False,
        )
    return float(found[0])


@contextlib.contextmanager
def _loss_of(
    model: nn.Module, loss_fn: LossFunction, batch: tuple[Tensor, Tensor]
) -> Iterator[tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]]:
    """Give the trainable weights and the loss as a function of them; running statistics are put back after."""
    inputs, target = batch
    weights: dict[str, Tensor] = {name: w for name, w in model.named_parameters() if w.requires_grad}
    if not weights:
        raise ValueError("model has no parameter that requires a gradient")
    checks.not_empty(inputs, "batch")

    def loss_at(points: dict[str, Tensor]) -> Tensor:
        value = loss_fn(torch.func.functional_call(model, {**points, **buffers}, (inputs,)), target)
        if value.dim() != 0:
            raise ValueError(f"loss_fn must return a scalar, got shape {tuple(value.shape)}")
        if not torch.isfinite(value):
            raise ValueError(f"loss_fn returned {value.item()}")
        return value

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad():
        yield weights, loss_at
