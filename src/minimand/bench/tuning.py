"""Tuning: the same number of trials for every contender, on validation data only.

Trials are proposed without looking at any result (a quasi-random sequence, or a list), tried by all cells at once,
and each cell keeps the one that was best on its own validation data. So no cell's test data, which are other
cells' training data, can leak into its settings, and trials are trained side by side like cells.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .classification import COMMON_SPACE, Range, Split, TrainClassifier
from .study import BatchedContender, Metric, Outcome, Run

_ACCURACY = Metric("accuracy")


class Selected:
    """A contender that chooses among settings on validation data carved from its training data.

    Args:
        contender: What is trained; takes ``run.settings``.
        proposals: Settings to choose from; the first wins ties.
        metric: What decides, on validation data.
    """

    def __init__(
        self,
        contender: BatchedContender,
        proposals: Sequence[Mapping[str, Any]],
        *,
        metric: Metric = _ACCURACY,
    ) -> None:
        if not proposals:
            raise ValueError("proposals is empty: give at least one setting")
        self.contender = contender
        self.proposals = tuple(dict(proposal) for proposal in proposals)
        self.metric = metric

    def __call__(self, data: Split, run: Run) -> Outcome:
        """Choose, train and measure one cell."""
        return self.batch([data], [run])[0]

    def batch(self, datas: Sequence[Split], runs: Sequence[Run]) -> list[Outcome]:
        """Choose, train and measure several cells."""
        chosen = [0] * len(datas)
        if len(self.proposals) > 1:
            inner = [data.validation(run.stream("validation")) for data, run in zip(datas, runs, strict=True)]
            best = [-math.inf] * len(datas)
            for number, settings in enumerate(self.proposals):
                tried = self.contender.batch(inner, [dataclasses.replace(run, settings=settings) for run in runs])
                for cell, outcome in enumerate(tried):
                    value = self.metric.sign * outcome.metrics[self.metric.name]
                    if value > best[cell]:
                        best[cell], chosen[cell] = value, number
        settled = [
            dataclasses.replace(run, settings=self.proposals[number]) for run, number in zip(runs, chosen, strict=True)
        ]
        return self.contender.batch(datas, settled)


def propose(space: Mapping[str, Range], trials: int, seed: int) -> list[dict[str, Any]]:
    """Propose settings: the defaults first, then Optuna's quasi-Monte Carlo (Sobol) sequence over ``space``.

    Args:
        space: Range of each hyper-parameter.
        trials: How many settings in all, the defaults among them.
        seed: Scrambles the sequence.

    Raises:
        ValueError: If Optuna is not installed or ``trials`` is below 1.
    """
    if trials < 1:
        raise ValueError(f"tune must be at least 1 trial, got {trials}")
    try:
        import optuna
    except ImportError:
        raise ValueError("tuning needs Optuna: pip install 'minimand[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(bounds.low, bounds.high, log=bounds.log)
        for name, bounds in sorted(space.items())
    }
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(sampler=optuna.samplers.QMCSampler(scramble=True, seed=seed))
    proposals: list[dict[str, Any]] = [{}]
    # Sobol points start once the sampler knows the search space, which the first, discarded trial tells it.
    for number in range(trials):
        trial = study.ask(distributions)
        if number:
            proposals.append(dict(trial.params))
        study.tell(trial, 0.0)
    return proposals[:trials]


def tuned(contender: TrainClassifier, trials: int, *, seed: int = 0, metric: Metric = _ACCURACY) -> Selected:
    """Let a contender choose among ``trials`` proposals over the common and its own hyper-parameters."""
    return Selected(contender, propose({**COMMON_SPACE, **contender.space}, trials, seed), metric=metric)


class UnderConditions:
    """A contender measured under several conditions, such as levels of label noise.

    Its data are a mapping from condition to split; its metrics are named ``"accuracy, CONDITION"``.

    Args:
        contender: Trained anew under each condition.
    """

    def __init__(self, contender: BatchedContender) -> None:
        self.contender = contender

    def __call__(self, data: Mapping[str, Split], run: Run) -> Outcome:
        """Train and measure one cell under every condition."""
        return self.batch([data], [run])[0]

    def batch(self, datas: Sequence[Mapping[str, Split]], runs: Sequence[Run]) -> list[Outcome]:
        """Train and measure several cells under every condition."""
        conditions = list(datas[0])
        found = {name: self.contender.batch([data[name] for data in datas], runs) for name in conditions}
        outcomes = []
        for cell in range(len(datas)):
            metrics: dict[str, float] = {}
            curves: dict[str, Sequence[float]] = {}
            seconds = 0.0
            for name in conditions:
                outcome = found[name][cell]
                metrics |= {f"{metric}, {name}": value for metric, value in outcome.metrics.items()}
                curves |= {f"{curve}, {name}": values for curve, values in outcome.curves.items()}
                seconds += outcome.seconds or 0.0
            outcomes.append(Outcome(metrics, curves, seconds))
        return outcomes
