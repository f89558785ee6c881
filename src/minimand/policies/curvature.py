r"""The curvature of a policy: products with its Fisher information, and linear systems solved by them.

Leading dimensions hold policies that are independent of each other, of which each has its own matrix.

Source: Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952; Schulman et al. 2015,
arXiv 1502.05477, appendix C.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop

Product = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class ConjugateGradients:
    """The solution of linear systems by conjugate gradients.

    Args:
        solution: Of every system.
        residual: Norm of what is left of every right-hand side, over the norm of the right-hand side.
        iterations: Products taken.
        status: Why it stopped; stalled where the matrix has no positive curvature left to follow.
    """

    solution: Float[Tensor, "*batch dim"]
    residual: Float[Tensor, "*batch"]
    iterations: int
    status: Stop


@torch.no_grad()
def conjugate_gradients(
    product: Product,
    rhs: Float[Tensor, "*batch dim"],
    *,
    tolerance: float = 1e-5,
    max_iter: int = 10,
    max_seconds: float | None = None,
) -> ConjugateGradients:
    r"""Solve :math:`H x = v` for positive definite H that is known by its products, many systems at once.

    Args:
        product: Maps :math:`v` to :math:`H v`, for all systems at once.
        rhs: v.
        tolerance: On the norm of the residual over that of v.
        max_iter: Most products; 10 is the custom of trust regions.
        max_seconds: Most seconds, or None.

    Returns:
        The solutions. A system that is solved, or has stalled, stays as it is while the others go on.

    Raises:
        TypeError: If ``rhs`` is no floating-point tensor.
        ValueError: If it is not finite, the shape of a product is another, or a setting is out of range.

    Example:
        >>> conjugate_gradients(lambda v: v @ torch.diag(torch.tensor([1.0, 4.0])), torch.ones(2)).solution
        tensor([1.0000, 0.2500])

    Source:
        Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952.
    """
    checks.floating(rhs, "rhs")
    checks.finite(rhs, "rhs")
    checks.non_negative(tolerance, "tolerance")
    budget = Budget(max_iter, max_seconds)
    solution, residual, direction = torch.zeros_like(rhs), rhs, rhs
    square = torch.linalg.vecdot(rhs, rhs)
    start, iterations = square, 0
    going = square > 0
    stalled = torch.zeros_like(going)
    status = budget.spent(0)
    while status is None and going.any():
        image = product(direction)
        if image.shape != rhs.shape:
            raise ValueError(f"product must return the shape {tuple(rhs.shape)}, got {tuple(image.shape)}")
        curvature = torch.linalg.vecdot(direction, image)
        stalled |= going & ~(curvature > 0)
        going = going & (curvature > 0)
        length = torch.where(going, square / torch.where(going, curvature, 1), 0)[..., None]
        solution = solution + length * direction
        residual = residual - length * image
        iterations += 1
        previous, square = square, torch.linalg.vecdot(residual, residual)
        direction = residual + (square / torch.where(going, previous, 1))[..., None] * direction
        going = going & (square > tolerance**2 * start)
        status = budget.spent(iterations)
    if not going.any():
        status = Stop.STALLED if stalled.any() else Stop.CONVERGED
    assert status is not None
    left = torch.where(start > 0, square / torch.where(start > 0, start, 1), 0).sqrt()
    return ConjugateGradients(solution, left, iterations, status)


def flatten(tensors: Sequence[Tensor], *, batch_dims: int = 0) -> Float[Tensor, "*batch dim"]:
    """Return tensors as one vector behind their first ``batch_dims`` dimensions.

    Args:
        tensors: Whose first ``batch_dims`` dimensions agree.
        batch_dims: How many dimensions number policies.
    """
    return torch.cat([each.flatten(batch_dims) if each.dim() > batch_dims else each[..., None] for each in tensors], -1)


def unflatten(vector: Float[Tensor, "*batch dim"], like: Sequence[Tensor], *, batch_dims: int = 0) -> list[Tensor]:
    """Return the pieces of a vector in the shapes of tensors, whatever dimensions lead.

    Args:
        vector: From :func:`flatten`, perhaps with more leading dimensions.
        like: Tensors of the shapes wanted.
        batch_dims: How many of their dimensions number policies.
    """
    shapes = [each.shape[batch_dims:] for each in like]
    pieces = vector.split([shape.numel() for shape in shapes], -1)
    return [piece.reshape(*vector.shape[:-1], *shape) for piece, shape in zip(pieces, shapes, strict=True)]


def gradients_of_rows(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], rows: Sequence[Tensor]
) -> list[Float[Tensor, "rows *shape"]]:
    """Return the gradients of several combinations of outputs in one pass; the graph stays.

    Args:
        outputs: With their graph; those without one are constants.
        parameters: What they are differentiated by.
        rows: Weights of each output in every combination, ``(rows, *output)``.
    """
    moving = [index for index, output in enumerate(outputs) if output.requires_grad]
    found: Sequence[Tensor | None] = torch.autograd.grad(
        [outputs[index] for index in moving],
        parameters,
        [rows[index] for index in moving],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    # torch makes the gradients of unused parameters, if asked to, in the shape of one row.
    count = len(rows[0])
    return [
        each.new_zeros(count, *each.shape) if gradient is None else gradient
        for each, gradient in zip(parameters, found, strict=True)
    ]


def fisher_product(
    divergence: Tensor, parameters: Sequence[Tensor], *, damping: float = 0.1, batch_dims: int = 0
) -> Product:
    r"""Return the product with :math:`F + \mu I`, the damped Hessian of a divergence at its minimum.

    At the parameters that acted, the Hessian of :math:`E_s\,KL(\pi_{old}(s) \,\|\, \pi_\theta(s))` is the Fisher
    information. It is differentiated twice and never formed; the first derivative is taken once for all products.

    Args:
        divergence: The mean divergence, a scalar with its graph; of several policies the sum over policies.
        parameters: The tensors that it is differentiated by.
        damping: The paper's mu, at least 0; 0.1 is the custom of CPO's authors.
        batch_dims: How many leading dimensions of every parameter number policies.

    Returns:
        A map of vectors ``(*systems, *batch, dim)``, flat as by :func:`flatten`, to vectors.

    Raises:
        ValueError: If the divergence is no scalar or not finite, or ``damping`` is negative.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> fisher_product((weight.square() * torch.tensor([1.0, 3.0])).sum(), [weight], damping=0.0)(torch.ones(2))
        tensor([2., 6.])

    Source:
        Schulman et al. 2015, arXiv 1502.05477, appendix C.
    """
    if divergence.dim() != 0:
        raise ValueError(f"divergence must be a scalar, got shape {tuple(divergence.shape)}")
    checks.finite(divergence.detach(), "divergence")
    checks.non_negative(damping, "damping")
    parameters = list(parameters)
    gradients = torch.autograd.grad(
        divergence, parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )

    def product(vector: Tensor) -> Tensor:
        # The rows of a batch of systems are differentiated in one pass.
        extra = vector.dim() - batch_dims - 1
        systems = vector.flatten(0, extra - 1) if extra else vector[None]
        images = gradients_of_rows(gradients, parameters, unflatten(systems, parameters, batch_dims=batch_dims))
        return flatten(images, batch_dims=batch_dims + 1).reshape(vector.shape) + damping * vector

    return product
