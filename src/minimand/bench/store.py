"""The store: every cell that was ever run, in one SQLite file that survives a kill at any moment."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sqlite3
from collections.abc import Iterator, Sequence

from ..caching import user_cache
from .study import Outcome

_SCHEMA = """
CREATE TABLE IF NOT EXISTS cells (
    study TEXT NOT NULL,
    contender TEXT NOT NULL,
    settings TEXT NOT NULL,
    data TEXT NOT NULL,
    code TEXT NOT NULL,
    seed INTEGER NOT NULL,
    metrics TEXT NOT NULL,
    curves TEXT NOT NULL,
    seconds REAL NOT NULL,
    details TEXT NOT NULL DEFAULT '{}',
    created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
    PRIMARY KEY (study, contender, settings, data, code, seed)
) WITHOUT ROWID
"""


@dataclasses.dataclass(frozen=True)
class CellKey:
    """What decides a cell's outcome. Two cells with one key are the same cell.

    Args:
        study: Name of the study or comparison.
        contender: Name of the contender.
        settings: JSON of everything that was set: recipe, folds, noise, hyper-parameters.
        data: Hash of the data.
        code: Hash of minimand's own code and the versions it ran with.
        seed: Which cell of the contender.
    """

    study: str
    contender: str
    settings: str
    data: str
    code: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """A stored cell."""

    contender: str
    seed: int
    outcome: Outcome
    seconds: float


def default_path() -> pathlib.Path:
    """Return where the store lies unless told otherwise: ``$MINIMAND_STORE`` or the user's cache folder."""
    if "MINIMAND_STORE" in os.environ:
        return pathlib.Path(os.environ["MINIMAND_STORE"])
    return user_cache() / "store.sqlite"


class Store:
    """Cells by key, in a SQLite file with a write-ahead log.

    Cells that were run together are written in one transaction: after a kill, all of them are there or none.

    Args:
        path: The file; made, with its folder, if absent. ``":memory:"`` keeps nothing.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        target = default_path() if path is None else path
        if target != ":memory:":
            pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.path = str(target)
        self._connection = sqlite3.connect(self.path, timeout=60.0, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        # FULL syncs the log at each commit, so that a committed cell also survives a power cut.
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute(_SCHEMA)
        columns = {row[1] for row in self._connection.execute("PRAGMA table_info(cells)")}
        if "details" not in columns:  # a store of an earlier version
            self._connection.execute("ALTER TABLE cells ADD COLUMN details TEXT NOT NULL DEFAULT '{}'")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def put(self, cells: Sequence[tuple[CellKey, Outcome, float]]) -> None:
        """Write cells that were run together; writing a cell again changes nothing.

        Args:
            cells: Key, outcome and seconds of each.
        """
        rows = [
            (
                *dataclasses.astuple(key),
                json.dumps(dict(outcome.metrics), sort_keys=True),
                json.dumps({name: list(curve) for name, curve in outcome.curves.items()}, sort_keys=True),
                seconds,
                json.dumps(dict(outcome.details), sort_keys=True),
            )
            for key, outcome, seconds in cells
        ]
        with self._transaction():
            self._connection.executemany(
                "INSERT OR IGNORE INTO cells (study, contender, settings, data, code, seed, metrics, curves, seconds,"
                " details) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )

    def get(self, key: CellKey) -> Cell | None:
        """Return the cell of that key, or None if it has not been run."""
        row = self._connection.execute(
            "SELECT metrics, curves, seconds, details FROM cells WHERE study = ? AND contender = ? AND settings = ?"
            " AND data = ? AND code = ? AND seed = ?",
            dataclasses.astuple(key),
        ).fetchone()
        if row is None:
            return None
        metrics, curves, seconds, details = row
        outcome = Outcome(json.loads(metrics), json.loads(curves), seconds, json.loads(details))
        return Cell(key.contender, key.seed, outcome, seconds)

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM cells").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
