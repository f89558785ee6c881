"""Stable elementary functions that more than one room needs."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from . import checks


def expm1_ratio(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Compute :math:`(e^z - 1) / z`, continuous through ``z = 0`` where it is 1.

    Both the value and the gradient stay exact near zero, where the quotient itself is 0 / 0.
    """
    small = z.abs() < 1e-5 if z.dtype == torch.float64 else z.abs() < 1e-2
    safe = torch.where(small, torch.ones_like(z), z)  # keeps the unused branch's gradient finite
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    return torch.where(small, series, torch.expm1(safe) / safe)


def categorical_kl(
    log_p: Float[Tensor, "*batch classes"], log_q: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Compute KL(p || q) of categorical distributions given by their log-probabilities; 0 log 0 is 0."""
    p = log_p.exp()
    # "p == 0", not "p > 0": NaN must come through.
    return torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q)).sum(-1)


def comp_sum(log_probability: Float[Tensor, "*shape"], tau: float) -> Float[Tensor, "*shape"]:
    r"""Compute :math:`(p^{\tau-1} - 1) / (1 - \tau)` from :math:`\log p`; :math:`-\log p` at ``tau = 1``.

    expm1 keeps every digit as ``tau`` nears 1. Below 1 the value grows like :math:`p^{\tau-1}`; past the square root
    of the dtype's largest number it goes on along its tangent, so that neither it nor its gradient overflows.
    """
    if tau == 1:
        return -log_probability
    z = (tau - 1) * log_probability
    if tau > 1:
        return torch.expm1(z) / (1 - tau)
    ceiling = 0.5 * math.log(torch.finfo(z.dtype).max)
    beyond = torch.relu(z - ceiling)
    return torch.add(torch.expm1(z - beyond), beyond, alpha=math.exp(ceiling)) / (1 - tau)


_SIGN_STEPS = (
    (3955, -8306, 5008), (3735, -6681, 3463), (3799, -6499, 3211), (4019, -6385, 2906), (2677, -3029, 1162),
    (2172, -1833, 682),
)  # fmt: skip
# x (15 - 10 x^2 + 3 x^4) / 8 has slope 15 (1 - x^2)^2 / 8: it nears 1 with a cubic error, and from below.
_SIGN_POLISH = (15 / 8, -10 / 8, 3 / 8)


def orthogonalize(matrix: Float[Tensor, "*batch rows columns"], *, num_steps: int = 6) -> Float[Tensor, "..."]:
    r"""Compute :math:`U V^\top` of a matrix :math:`U \Sigma V^\top` by odd polynomials, without a decomposition.

    The matrix is divided by its Frobenius norm; then each step is :math:`X \leftarrow (a I + b A + c A^2) X` with
    :math:`A = X X^\top`. Six steps take singular values of 0.003 to 1 of the Frobenius norm into [0.9955, 0.9994]; each
    further one is :math:`x (15 - 10 x^2 + 3 x^4) / 8`: one more leaves an error of 3e-7, two of 1e-15. In exact
    arithmetic no singular value ends above 1. Smaller ones end below these intervals, and zero stays zero.

    Args:
        matrix: One matrix or a batch of them; computed in its own dtype, on its smaller side. bfloat16 adds errors of
            about 0.02 to the singular values.
        num_steps: How many steps, at least 1.

    Returns:
        Of the shape, dtype and device of ``matrix``; the same for any positive multiple of it.

    Raises:
        ValueError: If there is no matrix, it is not finite, or ``num_steps`` is below 1.

    Example:
        >>> torch.linalg.svdvals(orthogonalize(torch.tensor([[3.0, 5.0], [2.0, 0.0]])))
        tensor([0.9959, 0.9957])

    Source:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; coefficients of the six steps:
        Newhouse et al. 2025, arXiv 2507.13338; further steps: Kovarik, SIAM Journal on Numerical Analysis 7, 1970.
    """
    checks.floating(matrix, "matrix")
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have at least two dimensions, got shape {tuple(matrix.shape)}")
    checks.not_empty(matrix, "matrix")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    checks.finite(largest, "matrix")  # which a NaN or infinity anywhere makes it
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    tiny = torch.finfo(x.dtype).tiny
    # By the largest entry first: squares of entries overflow, or vanish, long before the entries do.
    x = x / largest.clamp_min(tiny)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(tiny)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    # One matrix alone has faster kernels. Sums are taken within products: on small matrices, passes over memory of
    # their own would cost as much as the products.
    x, add_product = (x[0], torch.addmm) if len(x) == 1 else (x, torch.baddbmm)
    for step in range(num_steps):
        a, b, c = (one / 1024 for one in _SIGN_STEPS[step]) if step < len(_SIGN_STEPS) else _SIGN_POLISH
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return x if wide else x.mT
