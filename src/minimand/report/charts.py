"""The geometry of the charts: where each mark goes, in percent of the width and in percent or pixels of the height.

The template draws with it. Horizontal positions are percentages, so that a chart fills whatever width the page
has while its text keeps its size: one drawing serves a desk and a phone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .numbers import decimals, finite, number

_MOST_POINTS = 120
_LABEL_PITCH = 18


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps numbers to 0..100 and knows its ticks.

    Args:
        low: What lies at 0.
        high: What lies at 100.
        log: Whether the scale is logarithmic.
        ticks: ``(position, label)`` of each tick.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...] = ()

    def __call__(self, value: Any) -> float | None:
        """Return the position of ``value``, held inside the scale; None if it is not a finite number."""
        real = finite(value)
        if real is None:
            return None
        if self.log:
            if real <= 0:
                return 0.0
            share = math.log(real / self.low) / math.log(self.high / self.low)
        else:
            share = (real - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)


def scale(values: Iterable[Any], *, log: bool = False, pad: float = 0.05, most_ticks: int = 4) -> Scale:
    """Fit a scale to numbers, with round ticks.

    Args:
        values: The numbers that must fit; what is not finite is left out.
        log: Logarithmic, if all numbers are positive and far enough apart to deserve it.
        pad: Share of the range left free at both ends.
        most_ticks: No more intervals between ticks than this.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    reals = [real for real in map(finite, values) if real is not None] or [0.0, 1.0]
    low, high = min(reals), max(reals)
    log = log and low > 0 and high / low >= 5
    if log:
        stretch = (high / low) ** pad
        low, high = low / stretch, high * stretch
        subs = (1.0,) if high / low > 200 else (1.0, 2.0, 5.0)
        places = LogLocator(subs=subs, numticks=12).tick_values(low, high)
    else:
        # A range lost in rounding would divide by zero.
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
            reach = abs(high) * 0.05 or 1.0
            low, high = low - reach, high + reach
        margin = pad * (high - low)
        low, high = low - margin, high + margin
        places = MaxNLocator(most_ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    inside = [float(place) for place in places if low <= place <= high]
    bare = Scale(low, high, log)
    return dataclasses.replace(bare, ticks=tuple((bare(place) or 0.0, label) for place, label in _labels(inside, log)))


def rank_scale(count: int) -> Scale:
    """Return a scale for average ranks of so many contenders, with a tick at the best rank there can be."""
    step = next((step for step in (1, 5, 10) if count <= 8 * step), max(count // 8, 1))
    bare = scale([1, count])
    ticks = [1, *(rank for rank in range(step, count + 1, step) if rank > 1)]
    return dataclasses.replace(bare, ticks=tuple((bare(tick) or 0.0, str(tick)) for tick in ticks))


def _labels(ticks: list[float], log: bool) -> list[tuple[float, str]]:
    if log or len(ticks) < 2:
        return [(tick, number(tick, None)) for tick in ticks]
    step = ticks[1] - ticks[0]
    exact = (d for d in range(7) if all(abs(round(tick, d) - tick) < 1e-6 * step for tick in ticks))
    places = None if max(map(abs, ticks)) >= 1e6 else next(exact, None)
    return [(tick, number(tick, places)) for tick in ticks]


def cliques(ranks: Sequence[float], distance: float) -> list[list[tuple[int, int]]]:
    """Find the maximal runs of sorted ranks that lie within a critical difference, packed into columns.

    Args:
        ranks: Average ranks, ascending.
        distance: The critical difference.

    Returns:
        Columns of ``(first, last)`` row indices; runs in one column do not touch.
    """
    columns: list[list[tuple[int, int]]] = []
    reached = -1
    for first in range(len(ranks)):
        last = max(index for index in range(first, len(ranks)) if ranks[index] - ranks[first] <= distance)
        if last == first or last <= reached:
            continue
        reached = last
        for column in columns:
            if column[-1][1] < first:
                column.append((first, last))
                break
        else:
            columns.append([(first, last)])
    return columns


def spread_labels(wanted: Sequence[float], height: float, pitch: float = _LABEL_PITCH) -> list[float]:
    """Move labels apart as little as possible (least squares) until none overlaps; order is kept.

    Args:
        wanted: Where each label would like to be, ascending, in pixels.
        height: Labels stay between half a pitch and ``height`` minus half a pitch.
        pitch: Least distance between labels.
    """
    from scipy.optimize import isotonic_regression

    if not wanted:
        return []
    count = len(wanted)
    free = isotonic_regression([y - index * pitch for index, y in enumerate(wanted)]).x
    top, bottom = pitch / 2, height - pitch / 2 - (count - 1) * pitch
    return [round(min(max(z, top), bottom) + index * pitch, 1) for index, z in enumerate(free.tolist())]


def frontier(points: Sequence[tuple[float, float]], sign: int) -> list[int]:
    """Return which ``(cost, score)`` no other point beats in both, cheapest first."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -sign * points[index][1]))
    best, kept = -math.inf, []
    for index in order:
        if sign * points[index][1] > best:
            best = sign * points[index][1]
            kept.append(index)
    return kept


def cost(rows: Sequence[Mapping[str, Any]], sign: int) -> dict[str, Any] | None:
    """Lay out seconds against score: points, their labels at the right, and the frontier.

    Args:
        rows: ``name``, ``seconds`` and ``mean`` (in shown units) of each contender; what lacks a number is left out.
        sign: 1 if higher is better, -1 if lower is.
    """
    kept = [row for row in rows if finite(row["seconds"]) is not None and finite(row["mean"]) is not None]
    if len(kept) < 2:
        return None
    height = max(260, _LABEL_PITCH * len(kept) + 8)
    across = scale((row["seconds"] for row in kept), log=True, pad=0.08)
    upward = scale((row["mean"] for row in kept), pad=0.08, most_ticks=5)
    points: list[dict[str, Any]] = [
        {"row": row, "x": across(row["seconds"]), "y": round(height * (1 - (upward(row["mean"]) or 0) / 100), 1)}
        for row in kept
    ]
    points.sort(key=lambda point: (point["y"], -point["x"]))
    for point, label in zip(points, spread_labels([point["y"] for point in points], height), strict=True):
        point["label"] = label
    best = frontier([(point["row"]["seconds"], point["row"]["mean"]) for point in points], sign)
    for index, point in enumerate(points):
        point["best"] = index in best
    corners = [points[index] for index in best]
    steps = [
        step
        for here, there in itertools.pairwise(corners)
        for step in (
            (here["x"], here["y"], there["x"], here["y"]),
            (there["x"], here["y"], there["x"], there["y"]),
        )
    ]
    return {
        "height": height,
        "points": points,
        "steps": steps,
        "x_ticks": [(place, label) for place, label in across.ticks if across.low > 0 or place >= (across(0) or 0)],
        "y_ticks": [(round(height * (1 - place / 100), 1), label) for place, label in upward.ticks],
    }


def curves(cells: Sequence[Mapping[str, Any]], name: str, order: Sequence[str]) -> dict[str, Any] | None:
    """Lay out one training curve of every contender: the mean over seeds and the range of the seeds.

    Args:
        cells: The record's cells.
        name: Which curve.
        order: Contenders, in the order of the panels.
    """
    found: dict[str, list[Sequence[Any]]] = {}
    for cell in cells:
        curve = (cell.get("curves") or {}).get(name)
        if curve:
            found.setdefault(cell["contender"], []).append(curve)
    reals = [real for runs in found.values() for run in runs for real in map(finite, run) if real is not None]
    if not reals:
        return None
    # Losses of different methods live on different scales; a wide spread is only readable on a log axis.
    upward = scale(reals, log=max(reals) > 50 * min(reals) > 0, pad=0.04, most_ticks=3)
    length = max(len(run) for runs in found.values() for run in runs)
    panels = []
    for contender in order:
        if contender not in found:
            continue
        steps = [(100 * index / max(length - 1, 1), _moments(found[contender], index)) for index in _thin(length)]
        means = [mean for _, (mean, _, _) in steps if mean is not None]
        panels.append(
            {
                "name": contender,
                "line": _path([(x, upward(mean)) for x, (mean, _, _) in steps]),
                "band": _band([(x, upward(low), upward(high)) for x, (_, low, high) in steps]),
                "last": means[-1] if means else None,
                "runs": len(found[contender]),
            }
        )
    ticks = upward.ticks if len(upward.ticks) < 5 else upward.ticks[:: math.ceil(len(upward.ticks) / 4)]
    ticks = tuple((round(100 - place, 2), label) for place, label in ticks)
    return {
        "name": name,
        "panels": panels,
        "places": decimals((), [panel["last"] for panel in panels]),
        "ticks": ticks,
        "steps": length,
        "log": upward.log,
    }


def _thin(length: int) -> list[int]:
    count = min(length, _MOST_POINTS)
    return sorted({round(index * (length - 1) / max(count - 1, 1)) for index in range(count)})


def _moments(runs: Sequence[Sequence[Any]], index: int) -> tuple[float | None, float | None, float | None]:
    here = [real for run in runs if index < len(run) for real in [finite(run[index])] if real is not None]
    return (sum(here) / len(here), min(here), max(here)) if here else (None, None, None)


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """Draw a line through the points, broken where there is no number; a lone point becomes a dot."""
    parts, pen_down = [], False
    for x, y in points:
        if y is not None:
            # "h0" gives a piece of one point the round cap that makes it visible.
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {100 - y:.1f}{'' if pen_down else 'h0'}")
        pen_down = y is not None
    return "".join(parts)


def _band(points: Sequence[tuple[float, float | None, float | None]]) -> str:
    parts = []
    piece: list[tuple[float, float, float]] = []
    for x, low, high in [*points, (0.0, None, None)]:
        if low is not None and high is not None:
            piece.append((x, 100 - low, 100 - high))
            continue
        if len(piece) > 1:
            there = "L".join(f"{x:.1f} {top:.1f}" for x, _, top in piece)
            back = "L".join(f"{x:.1f} {bottom:.1f}" for x, bottom, _ in reversed(piece))
            parts.append(f"M{there}L{back}Z")
        piece = []
    return "".join(parts)
