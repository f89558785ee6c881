r"""Two worlds of linear functions over a finite field, in which even a bound made for one algorithm must fail.

Inputs are uniform on :math:`\mathbb F_q^d`, labels :math:`y = a \cdot x`, and there are :math:`n \le d` examples. In
world 0 the coefficients :math:`a` are uniform on the vectors that vanish outside the first :math:`n` coordinates, in
world 1 on all vectors. The algorithm returns a consistent function of the first kind where there is one, else any
consistent function. Let :math:`X_-` be the first :math:`n` columns of the examples :math:`X`, and
:math:`j = n - \operatorname{rank} X_-`.

- Given :math:`X`, labels are uniform on the column space of :math:`X_-` in world 0 and of :math:`X` in world 1, so the
  total variation of the two laws of the training set is :math:`1 - \mathbb E\, q^{\operatorname{rank} X_- -
  \operatorname{rank} X}`.
- The algorithm is right in world 0 with probability :math:`k_q = \mathbb E\, q^{-j}`; in world 1 it is wrong on
  :math:`1 - 1/q` of the inputs, but for a chance that vanishes as :math:`d - n` grows.
- Hence no estimate of its error, even one made for it, is within :math:`(1 - 1/q) / 2` in both worlds: for
  :math:`d \gg n` its probabilities of failure add up to at least :math:`k_q`, which is .61 for :math:`q = 2`, .70
  for 3, and nears 1.

Source: Gastpar, Nachum, Shafer and Weinberger, "Fantastic Generalization Measures are Nowhere to be Found", ICLR 2024,
arXiv 2309.13658, on algorithm-dependent bounds; the constants are derived here and checked by enumeration.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .. import checks

Algorithm = Callable[[Tensor, Tensor], Tensor]
FieldEstimator = Callable[[Tensor, Tensor, Tensor], Tensor]


class FailureBound(NamedTuple):
    """What :func:`uniform_failure_bound` found: estimates off by ``tolerance`` or more, ``failures`` at least."""

    tolerance: float
    failures: float


class FieldSolution(NamedTuple):
    """Solutions of linear systems, free variables zero; one that is not ``consistent`` has none."""

    solution: Int[Tensor, "systems columns"]
    consistent: Bool[Tensor, " systems"]
    rank: Int[Tensor, " systems"]


@dataclasses.dataclass(frozen=True)
class GameReport:
    """What :meth:`LinearFieldGame.evaluate` found, each pair for worlds 0 and 1.

    Args:
        exact: How often the algorithm has no error.
        preferred: How often its function vanishes outside the first n coordinates.
        loss: Its mean error.
        failures: How often the estimate is further than ``tolerance`` from its error.
        trials: Training sets drawn in each world.
    """

    exact: tuple[float, float]
    preferred: tuple[float, float]
    loss: tuple[float, float]
    failures: tuple[float, float]
    trials: int

    @property
    def failure_sum(self) -> float:
        """The failures of both worlds together."""
        return sum(self.failures)


def uniform_failure_bound(
    total_variation: float,
    *,
    low_loss: float,
    high_loss: float,
    low_failure: float = 0.0,
    high_failure: float = 0.0,
) -> FailureBound:
    r"""Bound from below how often every estimate of an algorithm's error fails, over two families of distributions.

    If the algorithm's error is at most ``low_loss`` with probability :math:`1 - \delta_0` on one family, at least
    ``high_loss`` with probability :math:`1 - \delta_1` on another, and training sets of the two are at total variation
    :math:`TV`, then for every function of the training set the probabilities of being off by ``(high_loss - low_loss) /
    2`` or more add up to at least :math:`1 - TV - \delta_0 - \delta_1`.

    Args:
        total_variation: Between the laws of the training set, each the mixture over its family, in [0, 1].
        low_loss: Error on the family that the algorithm learns.
        high_loss: Error on the other.
        low_failure: Probability, delta_0, of a larger error on the first.
        high_failure: Probability, delta_1, of a smaller error on the second.

    Returns:
        The tolerance and the least sum of failure probabilities, at least 0; one of the two is at least half of it.

    Raises:
        ValueError: If a probability is none, or ``high_loss`` is not above ``low_loss``.

    Example:
        >>> uniform_failure_bound(0.25, low_loss=0.0, high_loss=0.5, low_failure=0.25)
        FailureBound(tolerance=0.25, failures=0.5)

    Source:
        Gastpar et al. 2024, arXiv 2309.13658, on algorithm-dependent bounds; the constants are derived here.
    """
    for value, name in (
        (total_variation, "total_variation"),
        (low_loss, "low_loss"),
        (high_loss, "high_loss"),
        (low_failure, "low_failure"),
        (high_failure, "high_failure"),
    ):
        checks.between(value, name, 0, 1)
    if high_loss <= low_loss:
        raise ValueError(f"high_loss must be above low_loss, got {high_loss} and {low_loss}")
    return FailureBound((high_loss - low_loss) / 2, max(0.0, 1 - total_variation - low_failure - high_failure))


def solve_over_field(
    matrix: Int[Tensor, "systems rows columns"], values: Int[Tensor, "systems rows"], *, order: int
) -> FieldSolution:
    """Solve linear systems over a finite field by Gaussian elimination, all at once.

    Pivots are taken from the left: where a system can be solved with some of its first columns alone, it is.

    Args:
        matrix: ``(systems, rows, columns)`` of integers, read modulo ``order``.
        values: ``(systems, rows)`` right-hand sides.
        order: The number of elements of the field, a prime.

    Returns:
        Solutions, whether there are any, and ranks.

    Raises:
        TypeError: If the numbers are not integers.
        ValueError: If ``order`` is not prime, or the shapes do not fit.

    Example:
        >>> matrix, values = torch.tensor([[[1, 1], [1, 2]]]), torch.tensor([[0, 1]])
        >>> solve_over_field(matrix, values, order=3).solution  # x + y = 0 and x + 2 y = 1 modulo 3
        tensor([[2, 1]])

    Source:
        Gaussian elimination.
    """
    _require_prime(order)
    for value, name in ((matrix, "matrix"), (values, "values")):
        checks.tensor(value, name)
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must have an integer dtype, got {value.dtype}")
    if matrix.dim() != 3 or values.shape != matrix.shape[:2]:
        raise ValueError(
            f"matrix must have shape (systems, rows, columns) and values (systems, rows), "
            f"got {tuple(matrix.shape)} and {tuple(values.shape)}"
        )
    systems, rows, columns = matrix.shape
    # Floats divide many numbers at once, integers do not; products stay below the mantissa, so they are exact.
    dtype = torch.float32 if order**2 < 2**24 else torch.float64
    # Systems last: every step then works on long contiguous rows.
    table = torch.cat([_reduced(matrix, order), _reduced(values, order)[..., None]], -1).permute(2, 1, 0).to(dtype)
    table = table.contiguous()
    free = torch.ones(rows, systems, dtype=torch.bool, device=table.device)
    pivots = torch.full((rows, systems), columns, device=table.device)
    for column in range(columns):
        if not bool(free.any()):
            break
        rest = table[column:]
        candidates = (rest[0] != 0) & free
        found = candidates.any(0)
        chosen = candidates.byte().argmax(0)[None]
        row = rest.gather(1, chosen.expand(len(rest), 1, systems))
        scale = _inverse(row[:1], order)
        row = _modulo(row * scale, order)
        # The pivot's row keeps one of itself; systems without a pivot subtract nothing.
        factors = rest[0].scatter_add(0, chosen, -torch.ones_like(rest[0, :1])) * found
        rest.addcmul_(factors, row, value=-1)
        rest.sub_(torch.div(rest, order).floor_(), alpha=order)
        free.scatter_(0, chosen, free.gather(0, chosen) & ~found)
        pivots.scatter_(0, chosen, torch.where(found, column, pivots.gather(0, chosen)))
    right = table[-1].long()
    solution = torch.zeros(columns + 1, systems, dtype=torch.int64, device=table.device)
    solution.scatter_(0, pivots, torch.where(free, 0, right))
    consistent = ~((right != 0) & free).any(0)
    return FieldSolution(solution[:columns].T.contiguous(), consistent, rows - free.sum(0))


class LinearFieldGame:
    """Linear functions over a finite field, learnt with a preference for the first coordinates.

    Args:
        order: The paper's q: number of elements of the field, a prime.
        dimension: The paper's d: coordinates of an input.
        examples: The paper's n: size of a training set, at most the dimension.

    Raises:
        ValueError: If the order is not prime, or there are more examples than dimensions.

    Example:
        >>> game = LinearFieldGame(2, dimension=60, examples=20)
        >>> round(game.recovery_probability(), 4), round(game.failure_floor(), 4)
        (0.6103, 0.6103)
        >>> always_high = lambda inputs, labels, coefficients: torch.full((len(labels),), 0.5)
        >>> report = game.evaluate(game.erm(), always_high, trials=500, generator=torch.Generator().manual_seed(0))
        >>> report.failures[1], abs(report.failures[0] - 0.61) < 0.1  # never off in world 1, mostly off in world 0
        (0.0, True)

    Source:
        Gastpar et al. 2024, arXiv 2309.13658, on algorithm-dependent bounds.
    """

    def __init__(self, order: int, *, dimension: int, examples: int) -> None:
        _require_prime(order)
        for value, name in ((dimension, "dimension"), (examples, "examples")):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if examples > dimension:
            raise ValueError(
                f"examples must be at most dimension, so that the preferred subspace exists, "
                f"got {examples} and {dimension}"
            )
        self.order, self.dimension, self.examples = order, dimension, examples

    @property
    def tolerance(self) -> float:
        """Half the error of a wrong function, ``(1 - 1/q) / 2``: an estimate this far off fails."""
        return (1 - 1 / self.order) / 2

    def corank_law(self) -> list[float]:
        """Return the probabilities that the square block of the examples has corank 0, 1, ..., n."""
        law = _rank_law(self.examples, self.examples, self.order)
        return [float(probability) for probability in reversed(law)]

    def recovery_probability(self) -> float:
        """Return k_q: how often the algorithm is right in world 0, the mean of ``q ** -corank``."""
        law = _rank_law(self.examples, self.examples, self.order)
        return float(sum(chance / self.order ** (self.examples - rank) for rank, chance in enumerate(law)))

    def total_variation(self) -> float:
        """Return the total variation between the two worlds' laws of the training set."""
        return float(1 - sum(chance * Fraction(self.order) ** (low - high) for low, high, chance in self._ranks()))

    def failure_floor(self) -> float:
        """Return the least that the failure probabilities of any estimate add up to, for the algorithm of ``erm()``.

        It is exact, for every dimension: for each training set the estimate is either below or above the middle,
        and fails in one world or the other.
        """
        q, d, n = Fraction(self.order), self.dimension, self.examples
        total = Fraction(0)
        for low, high, chance in self._ranks():
            # The masses that one training set with labels in the preferred column space has, by world and error.
            right = q**-n + q**-d
            wrong = (q**-low - q**-n) + (q**-high - q**-d)
            # Labels outside it come from world 1 alone.
            lucky = q ** (high - d)
            total += chance * (q**low * min(right, wrong) + (1 - q ** (low - high)) * min(lucky, 1 - lucky))
        return float(total)

    def sample(
        self, world: int, trials: int, *, generator: torch.Generator | None = None
    ) -> tuple[
        Int[Tensor, "trials examples dimension"], Int[Tensor, "trials examples"], Int[Tensor, "trials dimension"]
    ]:
        """Draw training sets of a world: inputs, labels, and the coefficients behind them.

        Args:
            world: 0 or 1.
            trials: Training sets.
            generator: Source of randomness; None for torch's own.
        """
        checks.one_of(world, "world", (0, 1))
        device = "cpu" if generator is None else generator.device
        shape = (trials, self.examples, self.dimension)
        inputs = torch.randint(self.order, shape, generator=generator, device=device)
        coefficients = torch.randint(self.order, (trials, self.dimension), generator=generator, device=device)
        if world == 0:
            coefficients[:, self.examples :] = 0
        # One sum of products below the square of the order times the dimension: whole numbers hold it.
        labels = (inputs * coefficients[:, None]).sum(-1) % self.order
        return inputs, labels, coefficients

    def erm(self, preferred: Int[Tensor, " coordinates"] | None = None) -> Algorithm:
        """Return the algorithm that fits the training set, with the preferred coordinates alone where it can.

        Args:
            preferred: Coordinates it would rather use; None for the first n.

        Returns:
            A function from inputs and labels to coefficients ``(trials, dimension)``.
        """
        first = torch.arange(self.examples) if preferred is None else preferred
        if first.numel() and not (int(first.min()) >= 0 and int(first.max()) < self.dimension):
            raise ValueError(f"preferred must hold coordinates in [0, {self.dimension - 1}]")
        if len(first.unique()) < len(first):
            raise ValueError("preferred names a coordinate twice")
        rest = torch.ones(self.dimension, dtype=torch.bool)
        rest[first] = False
        turned = torch.cat([first, rest.nonzero()[:, 0]])

        def fit(inputs: Tensor, labels: Tensor) -> Tensor:
            found = solve_over_field(inputs[..., turned.to(inputs.device)], labels, order=self.order)
            coefficients = torch.empty_like(found.solution)
            coefficients[:, turned.to(inputs.device)] = found.solution
            return coefficients

        return fit

    def evaluate(
        self,
        algorithm: Algorithm,
        estimator: FieldEstimator,
        *,
        trials: int = 2000,
        generator: torch.Generator | None = None,
    ) -> GameReport:
        """Play both worlds: run an algorithm and an estimate of its error, and count failures.

        Args:
            algorithm: From inputs ``(trials, examples, dimension)`` and labels ``(trials, examples)`` to coefficients
                ``(trials, dimension)``, such as that of :meth:`erm`.
            estimator: From inputs, labels and the algorithm's coefficients to estimated errors ``(trials,)``.
            trials: Training sets a world.
            generator: Source of randomness; None for torch's own.

        Returns:
            For both worlds how often the algorithm is right, its mean error, and how often the estimate is off by
            the tolerance, less a millionth for rounding, or more.

        Raises:
            ValueError: If the estimates are not finite numbers ``(trials,)``, or the coefficients have another shape.
        """
        exact, preferred, loss, failures = [], [], [], []
        for world in (0, 1):
            inputs, labels, coefficients = self.sample(world, trials, generator=generator)
            found = algorithm(inputs, labels)
            if found.shape != coefficients.shape:
                raise ValueError(
                    f"algorithm must return coefficients of shape {tuple(coefficients.shape)}, got {tuple(found.shape)}"
                )
            right = ((found - coefficients) % self.order == 0).all(1)
            # Two linear functions agree everywhere or on one input in q.
            error = 2 * self.tolerance * (~right).double()
            estimate = estimator(inputs, labels, found).double()
            if estimate.shape != error.shape:
                raise ValueError(f"estimator must return shape {tuple(error.shape)}, got {tuple(estimate.shape)}")
            checks.finite(estimate, "the estimator's errors")
            exact.append(float(right.double().mean()))
            preferred.append(float((found[:, self.examples :] % self.order == 0).all(1).double().mean()))
            loss.append(float(error.mean()))
            failures.append(float(((estimate - error).abs() >= self.tolerance - 1e-6).double().mean()))
        return GameReport(_pair(exact), _pair(preferred), _pair(loss), _pair(failures), trials)

    def _ranks(self) -> list[tuple[int, int, Fraction]]:
        """Return the joint law of the ranks of the square block and of all columns."""
        n, wide = self.examples, self.dimension - self.examples
        found = []
        for low, chance in enumerate(_rank_law(n, n, self.order)):
            # The other columns, seen modulo the block's column space, are uniform too.
            more = _rank_law(n - low, wide, self.order)
            found += [(low, low + added, chance * part) for added, part in enumerate(more)]
        return found


def _pair(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]


def _reduced(value: Tensor, order: int) -> Tensor:
    """Return integers modulo the order; dividing integers is slow, and most come reduced."""
    if value.numel() and int(value.min()) >= 0 and int(value.max()) < order:
        return value
    return value % order


def _modulo(value: Tensor, order: int) -> Tensor:
    """Return whole numbers in floats modulo the order: exact, since a quotient is never rounded up to the next one."""
    return value - order * torch.div(value, order).floor_()


def _inverse(value: Tensor, order: int) -> Tensor:
    """Return the inverse by Fermat's theorem, the power ``order - 2``."""
    result, power, exponent = torch.ones_like(value), value, order - 2
    while exponent:
        if exponent & 1:
            result = _modulo(result * power, order)
        power, exponent = _modulo(power * power, order), exponent >> 1
    return result


def _rank_law(rows: int, columns: int, order: int) -> list[Fraction]:
    """Return the exact law of the rank of a uniform matrix over the field."""
    q = Fraction(order)
    law, count = [], Fraction(1)
    for rank in range(min(rows, columns) + 1):
        law.append(count / q ** (rows * columns))
        # Matrices of one more rank, by the count of those of this one.
        count *= (q**rows - q**rank) * (q**columns - q**rank) / (q**rank * (q ** (rank + 1) - 1))
    return law


def _require_prime(order: int) -> None:
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order must be an integer, got {order!r}")
    if order < 2 or any(order % divisor == 0 for divisor in range(2, math.isqrt(order) + 1)):
        raise ValueError(f"order must be a prime, since only then do the integers modulo it form a field, got {order}")
    if order >= 2**26:
        raise ValueError(f"order must be below 2**26, so that products are exact, got {order}")
