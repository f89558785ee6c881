"""What a record says in words."""

import pytest

from minimand.bench.record import recommended, sentence

PERCENT = {"name": "accuracy", "direction": "higher is better", "unit": "%"}
PLAIN = {"name": "accuracy", "direction": "higher is better", "unit": ""}


def record(*rows, metric=PERCENT, tied=()):
    comparisons = [
        {"a": name, "b": "base", "difference": gain, "low": gain - 0.01, "high": gain + 0.01, "verdict": verdict}
        for name, gain, verdict in rows
    ]
    ranked = sorted([("base", 0.0), *((name, gain) for name, gain, _ in rows)], key=lambda pair: -pair[1])
    return {
        "kind": "compare",
        "claims": [],
        "baseline": "base",
        "metrics": [metric],
        "summary": {"accuracy": [{"name": name} for name, _ in ranked]},
        "comparisons": {"accuracy": comparisons},
        "tied_with_best": {"accuracy": list(tied)},
    }


def test_the_best_of_those_shown_better_is_recommended_and_said():
    found = record(
        ("one", 0.02, "better"), ("two", 0.05, "better"), ("three", 0.0, "no difference shown"), tied=["one"]
    )
    assert recommended(found) == "two"
    said = sentence(found)
    assert said.startswith("two beats base by 5.0 points (95 % interval 4.0 to 6.0); one beats it too")
    assert "one is not shown to differ from two" in said
    assert said.endswith("three does not differ from it")


def test_the_baseline_is_recommended_where_nobody_is_shown_better():
    found = record(("one", 0.3, "no difference shown"), ("two", -0.2, "worse"))
    assert recommended(found) == "base"
    assert sentence(found).startswith("nothing is shown to beat base: keep it; two is worse")


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        (9543.147, "9,543 (95 % interval 9,543 to 9,543)"),
        (0.1234, "0.123 (95 % interval 0.113 to 0.133)"),
        (12.3456, "12.35"),
    ],
)
def test_numbers_are_said_with_the_digits_they_hold(gain, text):
    assert f"one beats base by {text}" in sentence(record(("one", gain, "better"), metric=PLAIN))


def test_a_lone_contender_is_compared_with_nobody():
    assert sentence(record()) == "only base was run, so there is nothing to compare"
