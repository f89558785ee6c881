r"""Two worlds of random labels, in which no estimate of the error is good for every algorithm.

The domain has :math:`v` points, labels are uniformly random, and :math:`n` examples are drawn with replacement. In
world 0 the algorithm's function is the labelling itself; in world 1 it agrees with the labels seen and guesses the
others. The law of training set and function together is the same in both worlds, by Bayes' rule: given what was seen,
the labels of the rest are uniform, whichever of the two is the true one. But the error is 0 in world 0 and
:math:`\mathrm{Bin}(u, 1/2) / v` in world 1, :math:`u` the number of points not seen. So for every estimate the
probabilities of being off by more than :math:`e` in the two worlds add up to at least

.. math:: P\bigl[\mathrm{Bin}(u, \tfrac12) > 2 e v\bigr],

which is attained by the estimate that always says :math:`e`. Where :math:`v \gg n` it nears 1 for every
:math:`e < 1/4`.

Source: Gastpar, Nachum, Shafer and Weinberger, "Fantastic Generalization Measures are Nowhere to be Found", ICLR 2024,
arXiv 2309.13658, on algorithm-independent bounds; the constants are derived here and checked by enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor

from .. import checks

ShatteredEstimator = Callable[[Tensor, Tensor], Tensor]


class ShatteredGame:
    """Random labels of a few points, learnt by an algorithm that knows them, or by one that guesses.

    Args:
        points: The paper's size of a shattered set: number of points.
        examples: Size of a training set.

    Raises:
        ValueError: If a number is not a whole one of at least 1.

    Example:
        >>> game = ShatteredGame(100, examples=10)
        >>> game.failure_floor(0.2) > 0.7
        True
        >>> never_wrong = lambda seen, labelling: torch.zeros(len(labelling))
        >>> game.evaluate(never_wrong, tolerance=0.2, trials=100, generator=torch.Generator().manual_seed(0))
        (0.0, 1.0)

    Source:
        Gastpar et al. 2024, arXiv 2309.13658, on algorithm-independent bounds.
    """

    def __init__(self, points: int, *, examples: int) -> None:
        for value, name in ((points, "points"), (examples, "examples")):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.points, self.examples = points, examples

    def unseen_law(self) -> NDArray[np.float64]:
        """Return the probabilities that 0, 1, ..., v points are not in the training set."""
        unseen = np.arange(self.points + 1) / self.points
        law = np.zeros(self.points + 1)
        law[-1] = 1.0
        for _ in range(self.examples):
            newly_seen = np.append((law * unseen)[1:], 0.0)
            law = law * (1 - unseen) + newly_seen
        return law

    def failure_floor(self, tolerance: float) -> float:
        """Return the least that the failures of any estimate, off by more than ``tolerance``, add up to."""
        checks.between(tolerance, "tolerance", 0, 1)
        limit = math.floor(2 * tolerance * self.points + 1e-6)
        return float(self.unseen_law() @ binom.sf(limit, np.arange(self.points + 1), 0.5))

    def sample(
        self, world: int, trials: int, *, generator: torch.Generator | None = None
    ) -> tuple[Bool[Tensor, "trials points"], Int[Tensor, "trials points"], Int[Tensor, "trials points"]]:
        """Draw training sets of a world: which points were seen, the function learnt, and the true labels.

        Args:
            world: 0, in which the algorithm knows the labels, or 1.
            trials: Training sets.
            generator: Source of randomness; None for torch's own.
        """
        checks.one_of(world, "world", (0, 1))
        device = "cpu" if generator is None else generator.device
        shape = (trials, self.points)
        truth = torch.randint(2, shape, generator=generator, device=device)
        drawn = torch.randint(self.points, (trials, self.examples), generator=generator, device=device)
        seen = torch.zeros(shape, dtype=torch.bool, device=device).scatter_(1, drawn, True)
        if world == 0:
            return seen, truth, truth
        guessed = torch.randint(2, shape, generator=generator, device=device)
        return seen, torch.where(seen, truth, guessed), truth

    def evaluate(
        self,
        estimator: ShatteredEstimator,
        *,
        tolerance: float,
        trials: int = 2000,
        generator: torch.Generator | None = None,
    ) -> tuple[float, float]:
        """Count how often an estimate is off by more than ``tolerance``, in world 0 and in world 1.

        Args:
            estimator: From the points seen and the function learnt, both ``(trials, points)``, to estimated errors
                ``(trials,)``. It knows no more: the training labels are the function's values on the points seen.
            tolerance: How far it may be off, and a millionth more for rounding.
            trials: Training sets a world.
            generator: Source of randomness; None for torch's own.
        """
        checks.between(tolerance, "tolerance", 0, 1)
        failures = []
        for world in (0, 1):
            seen, learnt, truth = self.sample(world, trials, generator=generator)
            estimate = estimator(seen, learnt).double()
            checks.finite(estimate, "the estimator's errors")
            error = (learnt != truth).double().mean(1)
            failures.append(float(((estimate - error).abs() > tolerance + 1e-6).double().mean()))
        return failures[0], failures[1]
