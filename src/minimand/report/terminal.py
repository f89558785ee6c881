"""A record as tables in a terminal: as wide as the terminal allows, plain where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from . import html
from .numbers import DASH, interval, number

# Below this width the intervals of the means give way: those of the differences decide.
_WIDE = 100
_STYLES = {
    "better": "blue",
    "worse": "yellow",
    "same": "dim",
    "baseline": "",
    "confirmed": "bold blue",
    "refuted": "bold yellow",
    "inconclusive": "bold",
}


@dataclasses.dataclass(frozen=True)
class _Leaderboard:
    view: dict[str, Any]
    baseline: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view, wide = self.view, options.max_width >= _WIDE
        unit = f" {view['unit']}" if view["unit"] else ""
        table = _table()
        table.add_column("#", justify="right", no_wrap=True)
        # Names may break between their words; only a word longer than this is cut.
        longest = max((len(word) for row in view["rows"] for word in row["name"].split()), default=0)
        table.add_column("contender", overflow="fold", min_width=min(max(longest, 8), 10))
        table.add_column(Text(f"{view['name']}{unit}"), justify="right")
        if wide:
            table.add_column("95 % interval", justify="right", no_wrap=True)
        table.add_column("gain", justify="right", no_wrap=True)
        table.add_column("95 % interval", justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        table.add_column("s", justify="right", no_wrap=True)
        for row in view["rows"]:
            table.add_row(*(Text(cell, style) for cell, style in _cells(row, view, wide)))
        yield table
        points = " in points" if view["unit"] == "%" else ""
        better = "higher" if view["sign"] > 0 else "lower"
        yield Text(f"{better} is better; gain: paired difference to {self.baseline}{points}", "dim")


def leaderboard(record: Mapping[str, Any], metric: str | None = None) -> _Leaderboard:
    """Return the leaderboard of one metric, for ``rich`` to print.

    Args:
        record: What the bench wrote.
        metric: Which metric; None means the first.

    Raises:
        ValueError: If the record has no such metric.
    """
    html.check(record)
    chosen = next((one for one in record["metrics"] if metric in (None, one["name"])), None)
    if chosen is None:
        raise ValueError(f"metric must be one of {[one['name'] for one in record['metrics']]}, got {metric!r}")
    return _Leaderboard(html.table(record, chosen), record["baseline"])


def claims(record: Mapping[str, Any]) -> Table:
    """Return the claims of a reproduction and their verdicts, for ``rich`` to print."""
    table = _table()
    table.add_column("claim", ratio=1, min_width=20)
    table.add_column("margin", justify="right", no_wrap=True)
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for claim in html.claims(record):
        verdict = claim["verdict"] or DASH
        table.add_row(
            Text(claim["says"] or f"{claim['contender']} beats {claim['beats']}"),
            Text(claim["margin"]),
            Text(claim["difference"]),
            Text(claim["interval"]),
            Text(verdict, _STYLES.get(verdict, "")),
        )
    return table


def _cells(row: Mapping[str, Any], view: Mapping[str, Any], wide: bool) -> list[tuple[str, str]]:
    style, places = _STYLES[row["standing"]], view["gain_places"]
    baseline = row["standing"] == "baseline"
    word = {"same": "no difference shown"}.get(row["standing"], row["standing"])
    ranges = [(interval(row["low"], row["high"], view["places"]), "dim")] if wide else []
    return [
        (number(row["rank"]), "dim"),
        (row["name"], "bold" if row["rank"] == 1 else ""),
        (number(row["mean"], view["places"]), "bold" if row["rank"] == 1 else ""),
        *ranges,
        ("" if baseline else number(row["gain"], places, signed=True), style),
        ("" if baseline else interval(row["gain_low"], row["gain_high"], places, signed=True), "dim"),
        (word if baseline or row["known"] else DASH, style),
        (number(row["seconds"], view["seconds_places"]), "dim"),
    ]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
