"""A record as one HTML file that needs nothing else: no network, no other file, no server."""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from . import charts
from .numbers import DASH, decimals, duration, factor, finite, interval, number, p_value, scaled, tight

_HERE = pathlib.Path(__file__).parent
_PHONE_LINE = 34
_NEEDED = ("metrics", "contenders", "baseline", "cells", "summary")


def render(record: Mapping[str, Any]) -> str:
    """Draw a record as a page.

    Args:
        record: What the bench wrote: a plain dict, read from JSON or not.

    Returns:
        One HTML document. The same record gives the same text.

    Raises:
        ValueError: If the record is of another schema or lacks a part that no page can do without.

    Example:
        >>> from minimand import report
        >>> report.render({"schema": 2})
        Traceback (most recent call last):
        ValueError: record has schema 2; this version of minimand reads schema 1
    """
    check(record)
    script = _read("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(**_page(record), script=script, script_hash=f"sha256-{digest}", style=_read("style.css"))


def write(record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a record's page to a file, all of it or, on failure, nothing.

    Args:
        record: See :func:`render`.
        path: The file; replaced if it exists. Its folder must exist.

    Raises:
        OSError: If the file cannot be written; what was there before is untouched.
    """
    target = pathlib.Path(path)
    # A lone surrogate, as in a file name that is not UTF-8, must not cost the reader the page.
    page = render(record).encode("utf-8", errors="replace")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def check(record: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a page or table can be made of the record."""
    if record.get("schema") != 1:
        raise ValueError(f"record has schema {record.get('schema')!r}; this version of minimand reads schema 1")
    missing = [name for name in _NEEDED if name not in record]
    if missing:
        raise ValueError(f"record lacks {', '.join(missing)}")
    if not record["metrics"]:
        raise ValueError("record has no metrics")


def standing(row: Mapping[str, Any] | None, *, baseline: bool) -> str:
    """Say in one word how a contender stands to the baseline: baseline, better, worse or same."""
    if baseline:
        return "baseline"
    verdict = (row or {}).get("verdict")
    return verdict if verdict in ("better", "worse") else "same"


def table(record: Mapping[str, Any], metric: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what the leaderboard of one metric shows, in the units it is shown in.

    Args:
        record: The record.
        metric: One of its metrics.

    Returns:
        The metric's name and unit, the decimals of its columns, and one row a contender, best first.
    """
    name, unit = metric["name"], metric.get("unit") or ""
    by = factor(unit)
    against = {row["a"]: row for row in record.get("comparisons", {}).get(name, [])}
    ranked = list(record["summary"].get(name, []))
    ranked += [{"name": one} for one in record["contenders"] if one not in {row["name"] for row in ranked}]
    rows = []
    for entry in ranked:
        versus = against.get(entry["name"])
        rows.append(
            {
                "name": entry["name"],
                "rank": finite(entry.get("rank")),
                "seconds": finite(entry.get("seconds")),
                "standing": standing(versus, baseline=entry["name"] == record["baseline"]),
                "known": versus is not None and finite(versus.get("difference")) is not None,
                **{key: scaled(entry.get(key), by) for key in ("mean", "low", "high")},
                **{
                    f"gain_{key}" if key != "difference" else "gain": scaled((versus or {}).get(key), by)
                    for key in ("difference", "low", "high", "bootstrap_low", "bootstrap_high")
                },
                "p": finite((versus or {}).get("p")),
                "p_adjusted": finite((versus or {}).get("p_adjusted")),
            }
        )
        # One cell has no spread: an interval of no width would claim certainty.
        if rows[-1]["low"] == rows[-1]["high"] and _cells(record, entry["name"], name) < 2:
            rows[-1]["low"] = rows[-1]["high"] = None
    percent = unit == "%"
    gains = [(row["gain_low"], row["gain_high"]) for row in rows]
    times = [row["seconds"] for row in rows if row["seconds"]]
    return {
        "name": name,
        "unit": unit,
        "sign": 1 if metric.get("direction", "higher is better") == "higher is better" else -1,
        "factor": by,
        "places": decimals([(row["low"], row["high"]) for row in rows], [row["mean"] for row in rows], percent=percent),
        "gain_places": decimals(gains, [row["gain"] for row in rows], percent=percent),
        "seconds_places": 0 if times and max(times) >= 100 else 1 if times and max(times) >= 10 else 2,
        "rows": rows,
    }


def _cells(record: Mapping[str, Any], contender: str, metric: str) -> int:
    mine = (cell for cell in record["cells"] if cell["contender"] == contender)
    return sum(finite((cell.get("metrics") or {}).get(metric)) is not None for cell in mine)


def _page(record: Mapping[str, Any]) -> dict[str, Any]:
    metrics = [_metric(record, metric) for metric in record["metrics"]]
    order = [row["name"] for row in metrics[0]["rows"]]
    names = sorted({name for cell in record["cells"] for name in cell.get("curves") or {}})
    data, _, size = str(record.get("data") or "").partition(": ")
    reproduce = record.get("kind") == "reproduce"
    study, verdict = str(record.get("study") or ""), record.get("verdict")
    return {
        "record": record,
        "reproduce": reproduce,
        "title": (record.get("method") or study) if reproduce else (data or study),
        "size": data if reproduce else size,
        "verdict": verdict,
        # The mark above the sentence says the verdict already.
        "sentence": str(record.get("sentence") or "").removeprefix(f"{verdict}: "),
        "metrics": metrics,
        "seen": {row["standing"] for view in metrics for row in view["rows"]},
        "standings": {row["name"]: row["standing"] for row in metrics[0]["rows"]},
        "curves": [drawn for name in names if (drawn := charts.curves(record["cells"], name, order))],
        "figures": record.get("figures") or [],
        "claims": claims(record),
        "seeds": len({cell["seed"] for cell in record["cells"]}),
        "date": _date(record.get("date"), "{0.day} {0:%B %Y}"),
        "moment": _date(record.get("date"), "{0:%Y-%m-%d %H:%M %Z}"),
        "duration": duration(record.get("seconds")),
        "failures": record.get("failures") or [],
        "facts": [
            (head, pairs)
            for head, key in (("Settings", "settings"), ("Versions", "versions"), ("Machine", "machine"))
            if (pairs := _flat(record.get(key)))
        ],
    }


def _metric(record: Mapping[str, Any], metric: Mapping[str, Any]) -> dict[str, Any]:
    view = table(record, metric)
    rows, by, name = view["rows"], view["factor"], view["name"]
    dots: dict[str, list[dict[str, Any]]] = {}
    seeds = sorted({cell["seed"] for cell in record["cells"]})
    for cell in record["cells"]:
        value = scaled((cell.get("metrics") or {}).get(name), by)
        if value is not None:
            height = 50.0 if len(seeds) == 1 else 18 + 64 * seeds.index(cell["seed"]) / (len(seeds) - 1)
            dots.setdefault(cell["contender"], []).append({"seed": cell["seed"], "value": value, "y": round(height, 1)})
    ends = [row[key] for row in rows for key in ("low", "mean", "high")]
    every = [*ends, *(dot["value"] for found in dots.values() for dot in found)]
    across = charts.scale(every)
    for row in rows:
        row["dots"] = [{**dot, "x": across(dot["value"])} for dot in dots.get(row["name"], [])]
    letters = [
        len(number(row["mean"], view["places"]) + interval(row["low"], row["high"], view["places"]))
        + len(number(row["gain"], view["gain_places"], signed=True))
        + len(interval(row["gain_low"], row["gain_high"], view["gain_places"], signed=True))
        for row in rows
    ]
    baseline = next((row["mean"] for row in rows if row["standing"] == "baseline"), None)
    return {
        **view,
        "baseline": baseline,
        # On a phone, two numbers and their intervals share a line if they are short.
        "stacked": max(letters) > _PHONE_LINE,
        "small": charts.scale(ends),
        "across": across,
        "cost": charts.cost(rows, view["sign"]),
        "ranks": _ranks(record, name, {row["name"]: row["standing"] for row in rows}),
    }


def _ranks(record: Mapping[str, Any], metric: str, standings: Mapping[str, str]) -> dict[str, Any] | None:
    found = (record.get("critical_difference") or {}).get(metric)
    if not found:
        return None
    ranks = sorted((rank, name) for name, value in found["ranks"].items() if (rank := finite(value)) is not None)
    distance = finite(found.get("cd"))
    if len(ranks) < 2 or distance is None:
        return None
    return {
        "rows": [{"name": name, "rank": rank, "standing": standings.get(name, "same")} for rank, name in ranks],
        "cd": distance,
        "cliques": charts.cliques([rank for rank, _ in ranks], distance),
        "across": charts.rank_scale(len(ranks)),
        "reach": min(ranks[0][0] + distance, len(ranks)),
    }


def claims(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the claims with their numbers written out, in the units they are shown in."""
    return [_claim(record, claim) for claim in record.get("claims") or []]


def _claim(record: Mapping[str, Any], claim: Mapping[str, Any]) -> dict[str, Any]:
    unit = next((one.get("unit") or "" for one in record["metrics"] if one["name"] == claim.get("metric")), "")
    by = factor(unit)
    low, high, margin = (scaled(claim.get(key), by) for key in ("low", "high", "margin"))
    difference = scaled(claim.get("difference"), by)
    places = decimals([(low, high)], [difference], percent=unit == "%")
    # A margin is a round number of the claim's own: no digits beyond those it has.
    return {
        **claim,
        "unit": "points" if unit == "%" else unit,
        "difference": number(difference, places, signed=True),
        "interval": interval(low, high, places, signed=True),
        "margin": DASH if margin is None else number(float(f"{margin:.6g}"), None, signed=True),
        "p": p_value(claim.get("p")),
    }


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return []
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            pairs += _flat(item, f"{name}, ")
        elif isinstance(item, float):
            pairs.append((name, f"{item:.6g}" if finite(item) is not None else DASH))
        elif isinstance(item, Sequence) and not isinstance(item, str):
            pairs.append((name, ", ".join(str(one) for one in item) or DASH))
        else:
            text = item if isinstance(item, str) else json.dumps(item, default=str)
            pairs.append((name, DASH if item is None or text == "" else text))
    return pairs


def _date(value: Any, form: str) -> str:
    try:
        return form.format(datetime.datetime.fromisoformat(str(value))).strip()
    except ValueError:
        return str(value or "")


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "interval": interval, "p_value": p_value, "tight": tight}
    return environment.get_template("template.html.j2")
