"""A user's file in, a table out; what cannot be read is said in one sentence."""

from __future__ import annotations

import difflib
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".npz")
# Bytes that no text in any encoding we read holds, and that most binary formats show early.
_BINARY = frozenset(range(32)) - {9, 10, 12, 13, 27}


class DataError(ValueError):
    """Data that cannot be used, with one sentence that says why and what to do."""


def read_table(path: str | os.PathLike[str]) -> pl.DataFrame:
    """Read CSV, TSV, Parquet, JSON lines or NPZ (arrays ``X`` and ``y``) into a table.

    Columns of an NPZ's ``X`` are named ``x0``, ``x1``, ...; its ``y`` is named ``y``.

    Raises:
        DataError: If the file is absent, of another kind, damaged, or empty.
    """
    file = pathlib.Path(path)
    if not file.exists():
        near = nearest(file.name, (other.name for other in _siblings(file)))
        raise DataError(f"no such file: {file}{near}")
    if file.is_dir():
        raise DataError(f"{file} is a folder, not a file")
    suffix = file.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"cannot read {file.name}: its name must end in one of {', '.join(_SUFFIXES)}")
    if file.stat().st_size == 0:
        raise DataError(f"{file.name} is empty")
    if suffix in (".csv", ".tsv", ".jsonl", ".ndjson"):
        _refuse_binary(file)
    try:
        frame = _read(file, suffix)
    except DataError:
        raise
    except Exception as error:  # polars and numpy raise many kinds; a user needs the sentence, not the kind
        reason = " ".join(str(error).split())[:200]
        if "found more fields" in reason:
            reason = "a row has more fields than the header"
        raise DataError(f"cannot read {file.name} as {suffix[1:]}: {reason}") from error
    if frame.height == 0:
        raise DataError(f"{file.name} has a header but no rows")
    return frame


def file_hash(path: str | os.PathLike[str]) -> str:
    """Hash a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def content_hash(path: str | os.PathLike[str] | None) -> str:
    """Hash a file's content; nothing for no file, of which :func:`read_table` says what is wrong."""
    return "" if path is None or not os.path.isfile(path) else file_hash(path)


def require_content(path: str | os.PathLike[str] | None, content: str) -> None:
    """Raise a DataError if a file is no longer what it was: its cells would be stored as another table's."""
    if content and content_hash(path) != content:
        raise DataError(f"{path} has changed since the comparison began: run it again")


def require_column(frame: pl.DataFrame, name: str, option: str) -> None:
    """Raise a DataError with the nearest names unless the table has that column."""
    if name not in frame.columns:
        near = nearest(name, frame.columns)
        more = ", ..." if len(frame.columns) > 12 else ""
        listed = near or f"; its columns are {', '.join(frame.columns[:12])}{more}"
        raise DataError(f"{option}: there is no column {name!r}{listed}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` with the nearest names, or nothing."""
    folded = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(folded[match]) for match in close)}?" if close else ""


def _siblings(file: pathlib.Path) -> Sequence[pathlib.Path]:
    return list(file.parent.iterdir()) if file.parent.is_dir() else []


def _refuse_binary(file: pathlib.Path) -> None:
    with file.open("rb") as handle:
        head = handle.read(65536)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{file.name} is UTF-16 text: save it as UTF-8")
    if _BINARY.intersection(head):
        raise DataError(f"{file.name} is a binary file, not text, whatever its name says")


def _read(file: pathlib.Path, suffix: str) -> pl.DataFrame:
    if suffix == ".parquet":
        return pl.read_parquet(file)
    if suffix in (".jsonl", ".ndjson"):
        return pl.read_ndjson(file, infer_schema_length=None)
    if suffix == ".npz":
        return _read_npz(file)
    separator = "\t" if suffix == ".tsv" else _separator(file)
    options: dict[str, Any] = {
        "separator": separator,
        "null_values": ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"],
        "try_parse_dates": True,
        "encoding": "utf8-lossy",
    }
    try:
        return pl.read_csv(file, infer_schema_length=10_000, **options)
    except pl.exceptions.ComputeError:
        # A column that looked whole-numbered turned out otherwise further down: look at all of it.
        return pl.read_csv(file, infer_schema_length=None, **options)


def _separator(file: pathlib.Path) -> str:
    """Guess a CSV's separator from its header: semicolons and tabs are common under this name too."""
    with file.open(encoding="utf-8", errors="replace") as handle:
        header = handle.readline()
    return max(",;\t|", key=lambda mark: (header.count(mark), mark == ","))


def _read_npz(file: pathlib.Path) -> pl.DataFrame:
    if not zipfile.is_zipfile(file):
        raise DataError(f"{file.name} is not an NPZ file")
    with np.load(file, allow_pickle=False) as arrays:
        if not {"X", "y"} <= set(arrays.files):
            raise DataError(f"{file.name} must hold arrays 'X' and 'y', it holds {', '.join(arrays.files) or 'none'}")
        try:
            inputs, target = arrays["X"], arrays["y"]
        except ValueError:
            raise DataError(
                f"{file.name} holds pickled objects, which can run code when read: save plain arrays"
            ) from None
    if target.ndim != 1 or len(inputs) != len(target):
        raise DataError(
            f"{file.name}: y must be one label a row of X, got X of shape {inputs.shape} and y of shape {target.shape}"
        )
    if inputs.ndim < 2:
        raise DataError(f"{file.name}: X must have at least two dimensions, got shape {inputs.shape}")
    flat = inputs.reshape(len(inputs), -1)
    frame = pl.DataFrame(flat, schema=[f"x{column}" for column in range(flat.shape[1])], orient="row")
    return frame.with_columns(pl.Series("y", target))
