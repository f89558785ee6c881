"""The words of a study: problem, contender, cell, outcome, metric, claim."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a study measures.

    Args:
        name: Key of the number in an outcome's metrics.
        direction: ``"higher is better"`` or ``"lower is better"``.
        unit: Shown behind the number; ``"%"`` shows a fraction in percent and its differences in points.
    """

    name: str
    direction: str = "higher is better"
    unit: str = ""

    def __post_init__(self) -> None:
        if self.direction not in ("higher is better", "lower is better"):
            raise ValueError(f"direction must be 'higher is better' or 'lower is better', got {self.direction!r}")

    @property
    def sign(self) -> int:
        """1 if higher is better, -1 if lower is."""
        return 1 if self.direction == "higher is better" else -1


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one contender beats another on a metric by more than a margin.

    Args:
        contender: Who is claimed to be better.
        beats: Whom.
        metric: Name of the metric; None means the study's first.
        margin: By how much, in the metric's own units and direction. Negative claims no more than "not worse by
            more than this".
        says: The claim in words, for people.
    """

    contender: str
    beats: str
    metric: str | None = None
    margin: float = 0.0
    says: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a contender is told besides the data: which cell this is, and the settings under trial.

    Args:
        seed: Every random number of the cell follows from it.
        settings: Hyper-parameters that replace the contender's defaults (chosen by tuning).
    """

    seed: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def stream(self, name: str) -> int:
        """Derive the seed of a named, independent stream of random numbers."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a cell found.

    Args:
        metrics: One number a metric.
        curves: Numbers over training, one list a curve.
        seconds: What the cell cost. None: the engine's own measurement.
        details: What else was found and a report may draw, JSON-able: a graph, the times of a survival curve.
    """

    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Contender(Protocol):
    """A method or baseline as it takes part in a study: any callable ``(data, run) -> Outcome``."""

    def __call__(self, data: Any, run: Run) -> Outcome:
        """Train and measure one cell."""
        ...


@runtime_checkable
class BatchedContender(Protocol):
    """A contender that can train several cells at once, with the outcomes it gives one by one."""

    def __call__(self, data: Any, run: Run) -> Outcome:
        """Train and measure one cell."""
        ...

    def batch(self, datas: Sequence[Any], runs: Sequence[Run]) -> list[Outcome]:
        """Train and measure several cells together."""
        ...


@dataclasses.dataclass(frozen=True)
class Presentation:
    """What a comparison does and shows that others do not; each part may be None.

    Args:
        prepare: Does once what all cells need, telling what is under way, and may complete the study.
        code: Lines of Python that train the contender of that name.
        figures: Draws what the report shows besides its charts: dicts of ``title``, ``caption`` and ``svg``, the last
            an ``<svg>`` element whose texts are escaped.
        summary: What ``--json`` prints besides.
        lines: What the terminal shows besides, line by line, of that summary.
    """

    prepare: Callable[[Study, Callable[[str], None]], Study] | None = None
    code: Callable[[Study, str], str] | None = None
    figures: Callable[[Study, dict[str, Any]], list[dict[str, str]]] | None = None
    summary: Callable[[Study, dict[str, Any]], dict[str, Any]] | None = None
    lines: Callable[[dict[str, Any]], Sequence[str]] | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A rerunnable experiment that tests a method's central claim.

    Args:
        method: The catalogue's name of the method (or of the comparison).
        problem: ``(source, seed) -> data``, deterministic. ``source`` is None for the built-in data.
        contenders: Name to contender, baselines first.
        metrics: What is measured; the first decides.
        claims: What is claimed; the first is the method's central claim.
        seeds: How many cells each contender runs by default.
        test_train_ratio: Size of a test set over that of its training set when cells resample one data set (the
            correction of Nadeau and Bengio); 0 when every seed draws fresh, independent data.
        about: One sentence on what the problem is, for people.
        notes: What a reader must know to read the result: limits, deviations from the paper.
        source: Passed to ``problem``: where a user's data come from; None for the built-in data.
        data: The data in a few words, for people.
        data_key: Hash of the data, which decides with the settings and the code whether a cell was already run.
        settings: Everything that was set and decides the outcome, JSON-able.
        presentation: What it does and shows that others do not.
    """

    method: str
    problem: Callable[[Any, int], Any]
    contenders: Mapping[str, Contender]
    metrics: tuple[Metric, ...]
    claims: tuple[Claim, ...] = ()
    seeds: int = 5
    test_train_ratio: float = 0.0
    about: str = ""
    notes: str = ""
    source: Any = None
    data: str = "built-in"
    data_key: str = "built-in"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    presentation: Presentation = Presentation()

    def __post_init__(self) -> None:
        if not self.contenders:
            raise ValueError("a study needs contenders")
        if not self.metrics:
            raise ValueError("a study needs a metric")
        names = {metric.name for metric in self.metrics}
        for claim in self.claims:
            for who in (claim.contender, claim.beats):
                if who not in self.contenders:
                    raise ValueError(f"the claim names {who!r}, which is not a contender of {self.method!r}")
            if claim.metric is not None and claim.metric not in names:
                raise ValueError(f"the claim names {claim.metric!r}, which is not a metric of {self.method!r}")

    def metric(self, name: str | None = None) -> Metric:
        """Return the metric of that name, or the first."""
        if name is None:
            return self.metrics[0]
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)
