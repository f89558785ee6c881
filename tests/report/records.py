"""Records as the bench writes them, drawn at random but the same each time."""

from __future__ import annotations

import math

import numpy as np

from minimand.bench.record import sentence
from minimand.bench.statistics import average_ranks, compare, critical_difference, holm, mean_interval

NAMES = (
    "cross-entropy",
    "label smoothing 0.1",
    "focal gamma=2",
    "generalized cross-entropy q=0.7",
    "symmetric cross-entropy",
    "aldr-kl",
    "ldr-kl",
    "comp-sum",
    "ensloss",
    "tempnet",
    "z-loss",
    "saf",
    "aggregate (logistic + mean absolute error, reweighted)",
    "correctness",
    "cs-ib",
)
# Name, unit, direction, level of the baseline, spread of what contenders gain, noise of a seed.
METRICS = (
    ("accuracy", "%", "higher is better", 0.91, 0.02, 0.008),
    ("balanced accuracy", "%", "higher is better", 0.905, 0.02, 0.008),
    ("macro F1", "%", "higher is better", 0.903, 0.02, 0.009),
    ("log loss", "", "lower is better", 0.42, 0.08, 0.025),
    ("Brier score", "", "lower is better", 0.151, 0.02, 0.008),
    ("calibration error", "%", "lower is better", 0.062, 0.012, 0.004),
    ("worst-class recall", "%", "higher is better", 0.78, 0.04, 0.03),
)
CODE = """import torch
from minimand import losses

loss = losses.ALDRKLLoss(num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
for inputs, target in loader:
    optimizer.zero_grad()
    loss(model(inputs), target).backward()
    optimizer.step()
"""


def make_record(names=NAMES, *, seeds=10, metrics=METRICS, epochs=40, kind="compare"):
    """Draw a record: contenders with true gains, seeds they share, and the bench's own statistics."""
    names, random = list(names), np.random.default_rng(7)
    cells = []
    gains = {name: random.normal(size=len(metrics)) for name in names}
    for seed in range(seeds):
        shared = random.normal(size=len(metrics))
        for place, name in enumerate(names):
            gain = 0.6 * gains[name] + 0.7 * gains[name][0] - 0.3 if place else np.zeros(len(metrics))
            own = random.normal(size=len(metrics))
            found = {
                metric: level
                + (1 if way.startswith("higher") else -1) * spread * gain[k]
                + noise * (0.7 * shared[k] + 0.7 * own[k])
                for k, (metric, _, way, level, spread, noise) in enumerate(metrics)
            }
            cells.append(
                {
                    "contender": name,
                    "seed": seed,
                    "metrics": {metric: float(value) for metric, value in found.items()},
                    "curves": draw_curves(random, gain[0], epochs),
                    "seconds": float((0.4 + 0.09 * place + (1.9 if "ens" in name else 0)) * random.uniform(0.95, 1.1)),
                }
            )
    return summarise(names, metrics, cells, kind)


def draw_curves(random, gain, epochs):
    """Draw the curves of one cell; none for no epochs."""
    if not epochs:
        return {}
    steps = np.arange(epochs)
    loss = 2.2 * np.exp(-steps / (7 - gain)) + 0.25 - 0.05 * gain + 0.03 * random.normal(size=epochs)
    score = 0.9 + 0.015 * gain - 0.75 * np.exp(-steps / (4 - 0.5 * gain)) + 0.008 * random.normal(size=epochs)
    return {"training loss": loss.tolist(), "validation accuracy": score.tolist()}


def summarise(names, metrics, cells, kind):
    """Put statistics around the cells."""
    summary, comparisons, differences = {}, {}, {}
    for metric, _, way, *_ in metrics:
        sign = 1 if way.startswith("higher") else -1
        scores = {name: [cell["metrics"][metric] for cell in cells if cell["contender"] == name] for name in names}
        ranks = average_ranks(scores, sign=sign)
        rows = []
        for name in names:
            low, high = mean_interval(scores[name])
            seconds = float(np.mean([cell["seconds"] for cell in cells if cell["contender"] == name]))
            rows.append(
                {"name": name, "mean": float(np.mean(scores[name])), "low": low, "high": high, "seconds": seconds}
            )
        rows.sort(key=lambda row: -sign * row["mean"])
        summary[metric] = [{**row, "rank": place} for place, row in enumerate(rows, 1)]
        found = [compare(scores[name], scores[names[0]], sign=sign) for name in names[1:]]
        comparisons[metric] = [
            {
                "a": name,
                "b": names[0],
                **{
                    key: getattr(one, key)
                    for key in ("difference", "low", "high", "bootstrap_low", "bootstrap_high", "p")
                },
                "p_adjusted": p,
                "verdict": "no difference shown" if not p < 0.05 else "better" if one.difference > 0 else "worse",
            }
            for name, one, p in zip(names[1:], found, holm([one.p for one in found]), strict=True)
        ]
        if len(names) > 2:
            differences[metric] = {"ranks": ranks, "cd": critical_difference(len(names), len(cells) // len(names))}
    record = {
        "schema": 1,
        "kind": kind,
        "study": "classify",
        "method": None,
        "problem": "classify",
        "data": "digits with 30 % label noise: 1797 rows, 64 columns, 10 classes",
        "about": "Handwritten digits whose training labels are wrong three times in ten; test labels are clean.",
        "notes": "Every seed draws new label noise and a new split.\nAccuracy is measured on clean labels.",
        "metrics": [{"name": name, "unit": unit, "direction": way} for name, unit, way, *_ in metrics],
        "contenders": names,
        "baseline": names[0],
        "cells": cells,
        "summary": summary,
        "comparisons": comparisons,
        "critical_difference": differences,
        "claims": [],
        "verdict": None,
        "sentence": "",
        "settings": {
            "seeds": len(cells) // len(names),
            "epochs": 40,
            "recipe": {"optimizer": "SGD", "learning rate": 0.1, "batch size": 128},
            "hidden layers": [256, 256],
        },
        "versions": {"minimand": "0.1.0", "torch": "2.6.0", "python": "3.12.4"},
        "machine": {"processor": "x86_64", "cores": 8, "memory": "32 GiB", "accelerator": None},
        "date": "2026-01-06T14:02:11+00:00",
        "seconds": 754.2,
        "code": CODE,
    }
    if kind == "reproduce":
        record |= claimed(names, comparisons, metrics[0][0])
    record["sentence"] = sentence(record)
    return record


def claimed(names, comparisons, metric):
    """Make a reproduction of a comparison: a confirmed, an inconclusive and a refuted claim."""
    keys = ("difference", "low", "high", "p")
    rows = sorted(comparisons[metric], key=lambda row: -row["low"])
    chosen = [(rows[0], "confirmed"), (rows[len(rows) // 2], "inconclusive"), (rows[-1], "refuted")]
    says = ("It resists wrong labels better than cross-entropy does", "", "Smoothing never hurts")
    claims = [
        {
            "says": text,
            "contender": row["a"],
            "beats": names[0],
            "metric": metric,
            "margin": 0.004,
            "verdict": verdict,
            **{key: row[key] for key in keys},
        }
        for (row, verdict), text in zip(chosen, says, strict=True)
    ]
    return {
        "study": "aldr-kl",
        "method": "aldr-kl",
        "claims": claims,
        "verdict": "confirmed",
    }


def small_record(names=("one", "two"), **changes):
    """Make a record of few contenders, one metric, three seeds and no curves."""
    return make_record(names, **{"seeds": 3, "metrics": METRICS[:1], "epochs": 0, **changes})


def broken_record():
    """Make a record full of holes: NaN, None, infinity, cells that failed and a contender that never ran."""
    record = make_record(NAMES[:4], seeds=3, metrics=METRICS[:2])
    holes = {"low": -math.inf, "high": math.inf}
    record["summary"]["accuracy"][1] |= {"mean": math.nan, "low": None, "high": math.inf, "seconds": None, "rank": None}
    record["comparisons"]["accuracy"][0] |= {"difference": math.nan, "p": math.nan, "p_adjusted": None, **holes}
    record["cells"][0]["metrics"]["accuracy"] = None
    record["cells"][1]["metrics"] = {}
    record["cells"][2]["curves"] = {"training loss": [1.0, None, math.nan, 0.5, math.inf]}
    record["contenders"].append("never ran")
    record["failures"] = [
        {"contender": "never ran", "seed": seed, "error": "FloatingPointError: loss is <NaN>"} for seed in range(3)
    ]
    record["critical_difference"]["accuracy"]["ranks"]["never ran"] = None
    record["critical_difference"].pop("balanced accuracy")
    return record
