"""The tables in a terminal."""

import io

import pytest
from records import make_record, small_record
from rich.console import Console

from minimand.report import html as page
from minimand.report import numbers, terminal


def printed(renderable, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_the_terminals_leaderboard_fits_eighty_columns_and_is_plain_when_piped(record):
    for metric in record["metrics"]:
        text = printed(terminal.leaderboard(record, metric["name"]))
        view = page.table(record, metric)
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 80
        for row in view["rows"]:
            assert numbers.number(row["mean"], view["places"]) in text
            assert f"{numbers.number(row['seconds'], view['seconds_places'])}\n" in text
        wide = printed(terminal.leaderboard(record, metric["name"]), 140)
        assert all(numbers.interval(row["low"], row["high"], view["places"]) in wide for row in view["rows"])


def test_the_terminal_shows_claims_and_takes_names_as_text():
    record = make_record(("base", "[red]x[/red]", "third"), seeds=3, kind="reproduce")
    assert "[red]x[/red]" in printed(terminal.leaderboard(record))
    text = printed(terminal.claims(record))
    assert all(verdict in text for verdict in ("confirmed", "inconclusive", "refuted"))
    assert max(map(len, text.splitlines())) <= 80


def test_the_terminal_refuses_a_metric_that_is_not_there():
    with pytest.raises(ValueError, match=r"metric must be one of .* got 'speed'"):
        terminal.leaderboard(small_record(), "speed")
