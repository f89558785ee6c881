"""Paired timing: ours and the peer in turn, in one run, so that the ratio survives a noisy machine."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times the peer's time ours takes: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    ours_seconds: float
    peer_seconds: float


def paired_ratio(
    ours: Callable[[], object], peer: Callable[[], object], *, rounds: int = 15, warmup: int = 2, inner: int = 1
) -> Ratio:
    """Time ``ours`` and ``peer`` alternately and return the ratio of each pair.

    Args:
        ours: Called without arguments.
        peer: What it is compared with.
        rounds: Counted pairs.
        warmup: Uncounted pairs first.
        inner: Calls a timing, for things too short to time once.
    """

    def clock(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - start) / inner

    pairs = [(clock(ours), clock(peer)) for _ in range(warmup + rounds)][warmup:]
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    quarter = len(ratios) // 4
    return Ratio(
        median=statistics.median(ratios),
        low=ratios[quarter],
        high=ratios[-1 - quarter],
        ours_seconds=statistics.median(mine for mine, _ in pairs),
        peer_seconds=statistics.median(theirs for _, theirs in pairs),
    )
