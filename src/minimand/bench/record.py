"""The record of a run: cells, statistics, verdicts, settings, versions, machine. Reports read nothing else."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from . import statistics
from .engine import Results, as_dict, versions
from .store import Cell
from .study import Metric, Study

SCHEMA = 1


def make_record(
    study: Study,
    results: Results,
    *,
    kind: str,
    problem: str,
    seconds: float,
    code: str = "",
) -> dict[str, Any]:
    """Judge the cells of a study and put down everything that a reader needs.

    Args:
        study: What was run.
        results: Its cells.
        kind: ``"compare"`` or ``"reproduce"``.
        problem: Name of the problem.
        seconds: What the whole run took, wall clock.
        code: Lines that train the winner.

    Returns:
        A JSON-able dict. Numbers that are not finite are None.
    """
    names = [name for name in study.contenders if any(cell.contender == name for cell in results.cells)]
    baseline = next(iter(study.contenders))
    metrics = [metric for metric in study.metrics if any(metric.name in cell.outcome.metrics for cell in results.cells)]
    summary = {metric.name: _summary(study, results.cells, names, metric) for metric in metrics}
    compared = {metric.name: _comparisons(study, results.cells, names, baseline, metric) for metric in metrics}
    claims = [_claim(study, results.cells, index) for index in range(len(study.claims))]
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind,
        "study": study.method,
        "method": study.method if kind == "reproduce" else None,
        "problem": problem,
        "data": study.data,
        "about": study.about,
        "notes": study.notes,
        "metrics": [dataclasses.asdict(metric) for metric in metrics],
        "contenders": names,
        "baseline": baseline,
        "cells": [
            {
                "contender": cell.contender,
                "seed": cell.seed,
                "metrics": dict(cell.outcome.metrics),
                "curves": {name: list(curve) for name, curve in cell.outcome.curves.items()},
                "seconds": cell.seconds,
                **({"details": dict(cell.outcome.details)} if cell.outcome.details else {}),
            }
            for cell in results.cells
        ],
        "summary": summary,
        "comparisons": compared,
        "tied_with_best": {
            metric.name: _tied(study, results.cells, summary[metric.name], metric) for metric in metrics
        },
        "critical_difference": {metric.name: _ranks(results.cells, names, metric) for metric in metrics},
        "claims": claims,
        "verdict": claims[0]["verdict"] if claims else None,
        "sentence": "",
        "settings": {"test_train_ratio": study.test_train_ratio, **study.settings},
        "versions": {"python": platform.python_version(), **versions()},
        "machine": {"system": platform.system(), "processor": _processor(), "cores": os.cpu_count()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "code": code,
        "figures": [],
        "failures": [as_dict(failure) for failure in results.failures],
    }
    record["recommended"] = recommended(record)
    record["sentence"] = sentence(record)
    return _json_able(record)


def recommended(record: Mapping[str, Any], metric: str | None = None) -> str | None:
    """Name whom to use: the best of those that are shown to beat the baseline, or the baseline if nobody is."""
    if not record["metrics"]:
        return None
    rows = record["comparisons"][_metric(record, metric)["name"]]
    better = [row for row in rows if row["verdict"] == "better"]
    return max(better, key=lambda row: row["difference"])["a"] if better else record["baseline"]


def sentence(record: Mapping[str, Any], metric: str | None = None) -> str:
    """Say in one sentence what a user should do about a comparison, or whether a claim holds."""
    if record["kind"] == "reproduce" and record["claims"]:
        claim = record["claims"][0]
        unit = _metric(record, claim["metric"])
        return f"{claim['verdict']}: {claim['says']} ({_difference(claim, unit)})"
    if not record["metrics"]:
        return "no cell came back"
    shown = _metric(record, metric)
    rows = record["summary"][shown["name"]]
    comparisons = record["comparisons"][shown["name"]]
    baseline = record["baseline"]
    better = [row for row in comparisons if row["verdict"] == "better"]
    worse = [row for row in comparisons if row["verdict"] == "worse"]
    undecided = [row for row in comparisons if row["verdict"] == "no difference shown"]
    if not comparisons:
        return f"only {rows[0]['name']} was run, so there is nothing to compare"
    parts = []
    if better:
        best = next(row for row in better if row["a"] == recommended(record, shown["name"]))
        parts.append(f"{best['a']} beats {baseline} by {_difference(best, shown)}")
        others = [row["a"] for row in better if row is not best]
        if others:
            parts.append(f"{_names(others)} {'beats' if len(others) == 1 else 'beat'} it too")
    else:
        parts.append(f"nothing is shown to beat {baseline}: keep it")
    tied = [name for name in record.get("tied_with_best", {}).get(shown["name"], []) if name != baseline]
    if better and tied:
        parts.append(f"{_names(tied)} {'is' if len(tied) == 1 else 'are'} not shown to differ from {rows[0]['name']}")
    if worse:
        parts.append(f"{_names([row['a'] for row in worse])} {'is' if len(worse) == 1 else 'are'} worse")
    if undecided and (better or worse):
        parts.append(
            f"the rest do not differ from {baseline}"
            if len(undecided) > 1
            else f"{undecided[0]['a']} does not differ from it"
        )
    return "; ".join(parts)


def write_evidence(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a study's record as shipped evidence: curves and details left out, numbers as measured."""
    numbers = ("contender", "seed", "metrics", "seconds")
    slim = {**record, "cells": [{"curves": {}, **{name: cell[name] for name in numbers}} for cell in record["cells"]]}
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    part.write_text(json.dumps(slim, indent=1, sort_keys=True, allow_nan=False) + "\n")
    part.replace(target)


def short_json(record: Mapping[str, Any], report: str | None) -> dict[str, Any]:
    """Return what ``--json`` prints: one metric's leaderboard and comparisons."""
    metric = record["metrics"][0]["name"] if record["metrics"] else None
    rows = record["summary"].get(metric, [])
    short: dict[str, Any] = {
        "problem": record["problem"],
        "data": record["data"],
        "metric": metric,
        "cells": len(record["cells"]),
        "seconds": record["seconds"],
        "contenders": [{key: row[key] for key in ("name", "mean", "low", "high", "seconds")} for row in rows],
        "best": rows[0]["name"] if rows else None,
        "comparisons": [
            {key: row[key] for key in ("a", "b", "difference", "low", "high", "p", "verdict")}
            for row in record["comparisons"].get(metric, [])
        ],
        "report": report,
    }
    if record["kind"] == "reproduce":
        claims = record["claims"]
        short |= {
            "method": record["method"],
            "claim": claims[0]["says"] if claims else None,
            "verdict": record["verdict"],
            "claims": claims,
        }
    return short


def _values(cells: Sequence[Cell], name: str, metric: str) -> dict[int, float]:
    return {
        cell.seed: float(cell.outcome.metrics[metric])
        for cell in cells
        if cell.contender == name and metric in cell.outcome.metrics
    }


def _summary(study: Study, cells: Sequence[Cell], names: Sequence[str], metric: Metric) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in names:
        values = list(_values(cells, name, metric.name).values())
        finite = [value for value in values if value == value and abs(value) != float("inf")]
        low, high = statistics.mean_interval(finite, test_train_ratio=study.test_train_ratio)
        mean = sum(finite) / len(finite) if finite else float("nan")
        spent = [cell.seconds for cell in cells if cell.contender == name]
        rows.append({"name": name, "mean": mean, "low": low, "high": high, "seconds": sum(spent) / len(spent)})
    rows.sort(key=lambda row: (row["mean"] != row["mean"], -metric.sign * row["mean"]))
    return [{**row, "rank": rank} for rank, row in enumerate(rows, start=1)]


def _comparisons(
    study: Study, cells: Sequence[Cell], names: Sequence[str], baseline: str, metric: Metric
) -> list[dict[str, Any]]:
    reference = _values(cells, baseline, metric.name)
    rows = []
    for name in names:
        if name == baseline or not reference:
            continue
        values = _values(cells, name, metric.name)
        both = sorted(values.keys() & reference.keys())
        result = statistics.compare(
            [values[seed] for seed in both],
            [reference[seed] for seed in both],
            sign=metric.sign,
            test_train_ratio=study.test_train_ratio,
        )
        rows.append({"a": name, "b": baseline, **dataclasses.asdict(result)})
    for row, adjusted in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        real = adjusted < 0.05
        row["p_adjusted"] = adjusted
        row["verdict"] = ("better" if row["difference"] > 0 else "worse") if real else "no difference shown"
    return rows


def _tied(study: Study, cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], metric: Metric) -> list[str]:
    """Name the contenders that the best one is not shown to beat."""
    best = _values(cells, rows[0]["name"], metric.name)
    p_values = []
    for row in rows[1:]:
        values = _values(cells, row["name"], metric.name)
        both = sorted(values.keys() & best.keys())
        pairs = [best[seed] for seed in both], [values[seed] for seed in both]
        p_values.append(statistics.compare(*pairs, test_train_ratio=study.test_train_ratio).p)
    adjusted = statistics.holm(p_values)
    # "not below" rather than "above": a p-value that cannot be had shows no difference either.
    return [row["name"] for row, p in zip(rows[1:], adjusted, strict=True) if not p < 0.05]


def _claim(study: Study, cells: Sequence[Cell], index: int) -> dict[str, Any]:
    claim = study.claims[index]
    metric = study.metric(claim.metric)
    ours, theirs = (_values(cells, who, metric.name) for who in (claim.contender, claim.beats))
    both = sorted(ours.keys() & theirs.keys())
    result = statistics.compare(
        [ours[seed] for seed in both],
        [theirs[seed] for seed in both],
        sign=metric.sign,
        test_train_ratio=study.test_train_ratio,
    )
    says = claim.says or f"{claim.contender} beats {claim.beats} on {metric.name}"
    return {
        "says": says,
        "contender": claim.contender,
        "beats": claim.beats,
        "metric": metric.name,
        "margin": claim.margin,
        **dataclasses.asdict(result),
        "verdict": statistics.verdict(result, claim.margin),
    }


def _ranks(cells: Sequence[Cell], names: Sequence[str], metric: Metric) -> dict[str, Any] | None:
    table = {name: _values(cells, name, metric.name) for name in names}
    shared = sorted(set.intersection(*(set(values) for values in table.values()))) if table else []
    if len(names) < 3 or len(shared) < 2:
        return None
    scores = {name: [values[seed] for seed in shared] for name, values in table.items()}
    return {
        "ranks": statistics.average_ranks(scores, sign=metric.sign),
        "cd": statistics.critical_difference(len(names), len(shared)),
    }


def _metric(record: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    return next(metric for metric in record["metrics"] if name is None or metric["name"] == name)


def _difference(row: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    numbers = [row["difference"], row["low"], row["high"]]
    if any(number is None or number != number for number in numbers):
        return "no pair of cells to compare"
    in_percent = metric["unit"] == "%"
    scaled = [(100 if in_percent else 1) * number for number in numbers]
    unit = " points" if in_percent else f" {metric['unit']}".rstrip()
    # Four digits say all that an interval can hold, whatever the metric's scale.
    largest = max((abs(number) for number in scaled if math.isfinite(number)), default=0.0)
    digits = 1 if in_percent else max(0, 3 - max(0, math.floor(math.log10(largest or 1.0))))
    difference, low, high = (f"{number:,.{digits}f}" for number in scaled)
    return f"{difference}{unit} (95 % interval {low} to {high})"


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _processor() -> str:
    with open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else open(os.devnull) as info:
        for line in info:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _json_able(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _json_able(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_able(item) for item in value]
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    return str(value)
