"""Why a solver stopped, and the budget that makes sure it does.

Every iterative solver of minimand takes ``max_iter`` and ``max_seconds``, never runs past them, and says in the
``status`` of its result which of these ended it.
"""

from __future__ import annotations

import enum
import math
import time


class Stop(enum.StrEnum):
    """Why a solver stopped."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    TIME_LIMIT = "time limit"
    STALLED = "stalled"  # no step improves any more, short of the tolerance

    @property
    def success(self) -> bool:
        """Whether the tolerance was met."""
        return self is Stop.CONVERGED


class Budget:
    """How long a solver may go on.

    Args:
        max_iter: Most iterations, at least 0.
        max_seconds: Most seconds of wall clock, at least 0; None for no limit. Looked at between iterations: an
            iteration that has begun is finished.

    Example:
        >>> budget = Budget(2, None)
        >>> [budget.spent(iteration) for iteration in range(3)]
        [None, None, <Stop.ITERATION_LIMIT: 'iteration limit'>]
    """

    def __init__(self, max_iter: int, max_seconds: float | None = None) -> None:
        if isinstance(max_iter, bool) or not isinstance(max_iter, int):
            raise TypeError(f"max_iter must be an integer, got {max_iter!r}")
        if max_iter < 0:
            raise ValueError(f"max_iter must be at least 0, got {max_iter}")
        if max_seconds is not None and (math.isnan(max_seconds) or max_seconds < 0):
            raise ValueError(f"max_seconds must be a number of at least 0 or None, got {max_seconds}")
        self.max_iter = max_iter
        self.max_seconds = math.inf if max_seconds is None else max_seconds
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def spent(self, iteration: int) -> Stop | None:
        """Return why to stop before iteration ``iteration`` (counted from 0), or None to go on."""
        if iteration >= self.max_iter:
            return Stop.ITERATION_LIMIT
        if self.seconds >= self.max_seconds:
            return Stop.TIME_LIMIT
        return None
