"""A budget ends what would go on."""

import math

import pytest

from minimand.stopping import Budget, Stop


def test_iterations_are_counted_from_zero():
    budget = Budget(3)
    assert [budget.spent(i) for i in range(4)] == [None, None, None, Stop.ITERATION_LIMIT]
    assert Budget(0).spent(0) is Stop.ITERATION_LIMIT


def test_time_runs_out(monkeypatch):
    now = iter([10.0, 10.5, 11.0])
    monkeypatch.setattr("minimand.stopping.time.perf_counter", lambda: next(now))
    budget = Budget(100, 1.0)
    assert budget.spent(0) is None
    assert budget.spent(1) is Stop.TIME_LIMIT


def test_only_a_met_tolerance_is_success():
    assert [stop.success for stop in Stop] == [stop is Stop.CONVERGED for stop in Stop]
    assert str(Stop.TIME_LIMIT) == "time limit"


def test_budgets_that_are_none_are_refused():
    for bad in (-1, -5):
        with pytest.raises(ValueError, match="max_iter"):
            Budget(bad)
    for bad in (1.0, "3", True):
        with pytest.raises(TypeError, match="max_iter"):
            Budget(bad)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_seconds"):
            Budget(1, bad)
