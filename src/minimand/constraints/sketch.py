r"""Solve a linear system by looking at random combinations of its equations, a few at a time.

Each step draws a sketch :math:`S` of :math:`s` columns and projects onto the solutions of
:math:`S^\top A z = S^\top b`:

.. math:: z \leftarrow z - A^\top S\,(S^\top A A^\top S)^+\,S^\top (A z - b).

The distance to the solution never grows. With one row a step, drawn with probability
:math:`\|A_i\|^2 / \|A\|_F^2`, its expected square shrinks by :math:`1 - \sigma_{min}(A)^2 / \|A\|_F^2` a step.

Flops are those of the operations carried out, for ``M`` equations in ``N`` unknowns, products and sums counted apart:

- full: :math:`N^3/3 + 2N^2` for symmetric, :math:`2N^3/3 + 2N^2` for other matrices;
- gaussian, a step: :math:`2MNs + 2Ms` for the sketch, then as for block;
- block, a step: :math:`4Ns^2 - \tfrac43 s^3` for a QR with its Q, :math:`s^2` for the triangle, :math:`4Ns` for
  residual and update;
- kaczmarz, q rows at once: :math:`2q^2N` for their products, :math:`q^2` for the triangle, :math:`4Nq` as above;
- the residual of all equations, once every max(1, N / s) steps: :math:`2MN`;
- equilibration: :math:`30MN`.

Source: Gower and Richtárik, "Randomized iterative methods for linear systems", SIMAX 2015, arXiv 1506.03296; Strohmer
and Vershynin, "A randomized Kaczmarz algorithm with exponential convergence", 2009, arXiv math/0702226.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..stopping import Budget, Stop

Sketch = Literal["full", "gaussian", "block", "kaczmarz"]

SKETCHES = ("full", "gaussian", "block", "kaczmarz")
_ROWS_AT_ONCE = 8
_SCALINGS = 5


@dataclasses.dataclass(frozen=True)
class SketchSolution:
    """What :func:`sketch_and_project` found.

    Args:
        solution: z, ``(unknowns,)``.
        residual: The norm of A z - b over that of b.
        iterations: Projections; those of ``"kaczmarz"`` are onto one equation each.
        flops: Floating-point operations.
        status: Why it stopped; ``STALLED`` where a direct solve met a singular matrix.
    """

    solution: Tensor
    residual: float
    iterations: int
    flops: int
    status: Stop


def sketch_and_project(
    matrix: Float[Tensor, "equations unknowns"],
    target: Float[Tensor, " equations"],
    *,
    sketch: Sketch = "block",
    sketch_size: int | None = None,
    initial: Float[Tensor, " unknowns"] | None = None,
    equilibrate: bool = False,
    tolerance: float = 1e-6,
    max_iter: int = 100_000,
    max_seconds: float | None = None,
    generator: torch.Generator | None = None,
) -> SketchSolution:
    r"""Solve A z = b by projections onto random sketches of its equations.

    Args:
        matrix: A.
        target: b.
        sketch: ``"gaussian"`` combines all equations with normal weights; ``"block"`` takes some of them, uniformly;
            ``"kaczmarz"`` one, in proportion to its squared norm; ``"full"`` solves directly.
        sketch_size: s, the columns of the sketch: three quarters of the equations if None, 1 for ``"kaczmarz"``.
        initial: Where to start; zero if None.
        equilibrate: Whether equations and unknowns are first scaled to rows and columns of like norms, which often
            takes orders of magnitude off the condition. Projections are then orthogonal in the scaled unknowns;
            residuals are still those of the equations as they came.
        tolerance: Stop when the norm of A z - b is at most this times that of b.
        max_iter: Most projections.
        max_seconds: Most seconds; None for no limit.
        generator: Draws the sketches; torch's default if None.

    Returns:
        A :class:`SketchSolution`.

    Raises:
        ValueError: If shapes do not match, something is not finite, or ``sketch_size`` does not fit.

    Example:
        >>> A, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 4.0])
        >>> found = sketch_and_project(A, b, sketch="kaczmarz", generator=torch.Generator().manual_seed(0))
        >>> [round(value, 3) for value in found.solution.tolist()], found.status
        ([1.0, 1.0], <Stop.CONVERGED: 'converged'>)

    Source:
        Gower and Richtárik 2015, arXiv 1506.03296, equation 1.3, with B the identity; the scaling: Ruiz, "A scaling
        algorithm to equilibrate both rows and columns norms in matrices", RAL-TR-2001-034, with Euclidean norms.
    """
    budget = Budget(max_iter, max_seconds)
    size = _check(matrix, target, sketch, sketch_size, initial, tolerance)
    matrix, target = matrix.detach(), target.detach()
    equations, unknowns = matrix.shape
    solution = torch.zeros_like(matrix[0]) if initial is None else initial.detach().clone()
    scale = float(target.norm())
    iteration, flops = 0, 0
    scaled, scaled_target, units = matrix, target, torch.ones_like(solution)
    if equilibrate and sketch != "full":
        scaled, weights, units = _equilibrated(matrix)
        scaled_target = weights * target
        flops += 6 * _SCALINGS * equations * unknowns
    inside = solution / units
    squares = scaled.square().sum(1) if sketch == "kaczmarz" else None

    while True:
        distance = float((matrix @ solution - target).norm())
        flops += 2 * equations * unknowns
        residual = distance / scale if scale > 0 else distance
        if distance <= tolerance * scale:
            return SketchSolution(solution, residual, iteration, flops, Stop.CONVERGED)
        status = budget.spent(iteration)
        if status is not None or not math.isfinite(distance):
            return SketchSolution(solution, residual, iteration, flops, status or Stop.STALLED)
        if sketch == "full":
            if iteration:  # a direct solve is as good as it gets
                return SketchSolution(solution, residual, iteration, flops, Stop.STALLED)
            step, cost = _direct(matrix, target - matrix @ solution)
            solution, flops, iteration = solution + step, flops + cost, 1
            continue
        # A residual costs as much as N rows: one for every N of them at most doubles the price of a row.
        sweep = min(max(1, unknowns // size), max_iter - iteration)
        if squares is not None:
            flops += _kaczmarz(scaled, scaled_target, squares, inside, sweep, generator)
        else:
            for _ in range(sweep):
                rows, values, cost = _sketched(scaled, scaled_target, sketch, size, generator)
                flops += cost + _project(rows, values, inside)
        solution = units * inside
        iteration += sweep


def _equilibrated(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrix with rows and columns of like norms, and the factors of its rows and its columns."""
    rows, columns = torch.ones_like(matrix[:, 0]), torch.ones_like(matrix[0])
    scaled = matrix
    for _ in range(_SCALINGS):
        across, down = scaled.norm(dim=1), scaled.norm(dim=0)
        rows = rows * torch.where(across > 0, across, torch.ones_like(across)).rsqrt()
        columns = columns * torch.where(down > 0, down, torch.ones_like(down)).rsqrt()
        scaled = rows[:, None] * matrix * columns
    return scaled, rows, columns


def _direct(matrix: Tensor, target: Tensor) -> tuple[Tensor, int]:
    count = len(target)
    if torch.equal(matrix, matrix.T):
        factor, pivots, _ = torch.linalg.ldl_factor_ex(matrix)
        return torch.linalg.ldl_solve(factor, pivots, target[:, None])[:, 0], count**3 // 3 + 2 * count**2
    solution, _ = torch.linalg.solve_ex(matrix, target)
    return solution, 2 * count**3 // 3 + 2 * count**2


def _sketched(
    matrix: Tensor, target: Tensor, sketch: str, size: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, int]:
    device = matrix.device if generator is None else generator.device
    equations, unknowns = matrix.shape
    if sketch == "block":
        chosen = torch.randperm(equations, generator=generator, device=device)[:size].to(matrix.device)
        return matrix[chosen], target[chosen], 0
    weights = torch.randn(size, equations, generator=generator, device=device, dtype=matrix.dtype).to(matrix.device)
    return weights @ matrix, weights @ target, 2 * size * equations * (unknowns + 1)


def _project(rows: Tensor, values: Tensor, solution: Tensor) -> int:
    """Move ``solution`` in place to the nearest one of ``rows @ z = values``."""
    size, unknowns = rows.shape
    miss = rows @ solution - values
    # By QR and not by Cholesky of the rows' products, which would square their condition.
    basis, triangle = torch.linalg.qr(rows.T)
    diagonal = triangle.diagonal().abs()
    if bool(diagonal.min() > unknowns * torch.finfo(rows.dtype).eps * diagonal.max()):
        solution -= basis @ torch.linalg.solve_triangular(triangle.T, miss[:, None], upper=False)[:, 0]
    else:
        solution -= torch.linalg.pinv(rows) @ miss
    return 4 * unknowns * size**2 - 4 * size**3 // 3 + size**2 + 4 * unknowns * size


def _kaczmarz(
    matrix: Tensor, target: Tensor, squares: Tensor, solution: Tensor, steps: int, generator: torch.Generator | None
) -> int:
    r"""Project ``solution`` in place onto ``steps`` random equations, one after the other.

    With :math:`y_k` the length of the k-th step along its row, the residual that the k-th step finds is
    :math:`r_k - \sum_{j<k} \langle A_k, A_j \rangle y_j`: the lengths of several steps solve one triangular system.
    """
    device = squares.device if generator is None else generator.device
    order = torch.multinomial(squares.to(device), steps, replacement=True, generator=generator).to(matrix.device)
    for chosen in order.split(_ROWS_AT_ONCE):
        rows = matrix[chosen]
        miss = rows @ solution - target[chosen]
        lengths = torch.linalg.solve_triangular((rows @ rows.T).tril(), miss[:, None], upper=False)[:, 0]
        solution.addmv_(rows.T, lengths, alpha=-1)
    whole, rest = divmod(steps, _ROWS_AT_ONCE)
    together = whole * _ROWS_AT_ONCE**2 + rest**2
    unknowns = len(solution)
    return 2 * together * unknowns + together + 4 * unknowns * steps


def check_sketch_size(sketch: str, size: int | None, equations: int, unknowns: int) -> int:
    """Return the columns of a sketch, or raise if they do not fit."""
    checks.one_of(sketch, "sketch", SKETCHES)
    if sketch in ("full", "kaczmarz"):
        own = 1 if sketch == "kaczmarz" else equations
        if size not in (None, own):
            raise ValueError(f"sketch_size must be None or {own} for sketch={sketch!r}, got {size}")
        return own
    largest = min(equations, unknowns)
    if size is None:
        return min(math.ceil(3 * equations / 4), largest)
    if not 1 <= size <= largest:
        raise ValueError(f"sketch_size must lie between 1 and {largest}, the size of the system, got {size}")
    return size


def _check(
    matrix: Tensor, target: Tensor, sketch: str, sketch_size: int | None, initial: Tensor | None, tolerance: float
) -> int:
    checks.floating(matrix, "matrix")
    checks.floating(target, "target")
    if matrix.dim() != 2 or tuple(target.shape) != (matrix.shape[0],):
        raise ValueError(
            "matrix must have shape (equations, unknowns) and target (equations,), "
            f"got {tuple(matrix.shape)} and {tuple(target.shape)}"
        )
    checks.not_empty(matrix, "matrix")
    checks.finite(matrix, "matrix")
    checks.finite(target, "target")
    checks.non_negative(tolerance, "tolerance")
    if initial is not None:
        if tuple(initial.shape) != (matrix.shape[1],):
            raise ValueError(f"initial must have shape ({matrix.shape[1]},), got {tuple(initial.shape)}")
        checks.finite(initial, "initial")
    if sketch == "full" and matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square for sketch='full', got {tuple(matrix.shape)}")
    if sketch == "kaczmarz" and not bool(matrix.any()):
        raise ValueError("matrix is zero: there is no equation to project onto")
    return check_sketch_size(sketch, sketch_size, *matrix.shape)
