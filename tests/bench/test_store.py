"""The store keeps what it was given, once, whatever happens to the process."""

import dataclasses
import math
import sqlite3

import pytest

from minimand.bench import CellKey, Outcome, Store

KEY = CellKey("study", "contender", "{}", "data", "code", 3)


def test_a_cell_comes_back_bit_for_bit(tmp_path):
    outcome = Outcome({"a": 0.1 + 0.2, "b": math.pi, "c": math.nan}, {"curve": [1.0, 1e-300]})
    with Store(tmp_path / "store.sqlite") as store:
        store.put([(KEY, outcome, 1.5)])
    with Store(tmp_path / "store.sqlite") as store:
        cell = store.get(KEY)
    assert cell.outcome.metrics["a"] == 0.1 + 0.2
    assert cell.outcome.metrics["b"] == math.pi
    assert math.isnan(cell.outcome.metrics["c"])
    assert cell.outcome.curves == {"curve": [1.0, 1e-300]}
    assert cell.seconds == 1.5


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CellKey)])
def test_every_part_of_the_key_tells_cells_apart(tmp_path, field):
    with Store(tmp_path / "store.sqlite") as store:
        store.put([(KEY, Outcome({"a": 1.0}), 1.0)])
        other = dataclasses.replace(KEY, **{field: 4 if field == "seed" else "other"})
        assert store.get(other) is None


def test_writing_a_cell_again_changes_nothing(tmp_path):
    with Store(tmp_path / "store.sqlite") as store:
        store.put([(KEY, Outcome({"a": 1.0}), 1.0)])
        store.put([(KEY, Outcome({"a": 2.0}), 2.0)])
        assert store.get(KEY).outcome.metrics == {"a": 1.0}
        assert len(store) == 1


def test_cells_of_one_batch_are_written_together_or_not_at_all(tmp_path):
    with Store(tmp_path / "store.sqlite") as store:
        broken = Outcome({"a": object()})
        with pytest.raises(TypeError):
            store.put([(KEY, Outcome({"a": 1.0}), 1.0), (dataclasses.replace(KEY, seed=4), broken, 1.0)])
        assert len(store) == 0


def test_the_log_is_written_ahead(tmp_path):
    path = tmp_path / "folder" / "store.sqlite"
    with Store(path):
        assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_two_processes_may_write_at_once(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store(path) as one, Store(path) as two:
        one.put([(KEY, Outcome({"a": 1.0}), 1.0)])
        two.put([(dataclasses.replace(KEY, seed=4), Outcome({"a": 2.0}), 1.0)])
        assert len(one) == len(two) == 2


def test_details_come_back(tmp_path):
    details = {"edges": [[0, 1], [2, 0]], "names": ["a", "b", "c"]}
    with Store(tmp_path / "store.sqlite") as store:
        store.put([(KEY, Outcome({"a": 1.0}, details=details), 1.0)])
    with Store(tmp_path / "store.sqlite") as store:
        assert store.get(KEY).outcome.details == details


def test_a_store_of_an_earlier_version_is_read_and_written(tmp_path):
    path = tmp_path / "store.sqlite"
    with Store(path) as store:
        store.put([(KEY, Outcome({"a": 1.0}), 1.0)])
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE cells DROP COLUMN details")
    with Store(path) as store:
        assert store.get(KEY).outcome == Outcome({"a": 1.0}, {}, 1.0)
        other = dataclasses.replace(KEY, seed=4)
        store.put([(other, Outcome({"a": 2.0}, details={"b": 1}), 1.0)])
        assert store.get(other).outcome.details == {"b": 1}
