"""A folder of feature files, one a slide, and a table of times and events: read, checked, and loaded as needed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from .readers import DataError, file_hash, nearest, read_table, require_column

_SUFFIXES = (".h5", ".hdf5", ".npz", ".safetensors")
# Slides are kept in memory up to this many bytes a process, and read anew beyond.
_KEPT_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Bags of instances with the times and events of those they come from.

    Args:
        bags: ``(instances, features)`` each, float32; may be read as they are asked for.
        time: ``(bags,)``, float64.
        event: ``(bags,)`` booleans: whether the event was seen.
        unit: ``(bags,)`` numbers of the patients: no fold splits one.
        names: Of the bags.
    """

    bags: Sequence[Tensor]
    time: Tensor
    event: Tensor
    unit: Tensor
    names: tuple[str, ...]

    def take(self, index: Tensor) -> Cohort:
        """Keep some bags."""
        places = index.tolist()
        names = tuple(self.names[place] for place in places)
        return Cohort(Chosen(self.bags, places), self.time[index], self.event[index], self.unit[index], names)

    def __len__(self) -> int:
        return len(self.time)


class Chosen(Sequence[Tensor]):
    """Some of the bags of another sequence, which are not read before they are asked for."""

    def __init__(self, bags: Sequence[Tensor], places: Sequence[int]) -> None:
        self.bags, self.places = bags, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: Any) -> Any:
        return self.bags[self.places[place]]


class SlideFiles(Sequence[Tensor]):
    """The features of slides, read from their files when asked for; the first gigabyte of them is kept.

    Args:
        paths: One file a slide.
        key: Name of the array within a file, or None for ``"features"``, or the only one there is.
    """

    def __init__(self, paths: Sequence[pathlib.Path], key: str | None = None) -> None:
        self.paths, self.key = tuple(paths), key
        self._kept: dict[int, Tensor] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: Any) -> Any:
        kept = self._kept.get(place)
        if kept is not None:
            return kept
        features = read_features(self.paths[place], self.key)
        if self._bytes + features.nbytes <= _KEPT_BYTES:
            self._kept[place] = features
            self._bytes += features.nbytes
        return features


def read_features(path: str | os.PathLike[str], key: str | None = None) -> Tensor:
    """Read the features of one slide, ``(instances, features)`` in float32; nothing is unpickled.

    Args:
        path: HDF5, NPZ or safetensors. A leading dimension of one is dropped.
        key: Name of the array; None for ``"features"``, or the only array that the file holds.

    Raises:
        DataError: If the file cannot be used, with one sentence that says why.
    """
    file = pathlib.Path(path)
    suffix = file.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"cannot read {file.name}: its name must end in one of {', '.join(_SUFFIXES)}")
    if not file.is_file():
        raise DataError(f"no such file: {file}")
    if suffix in (".h5", ".hdf5"):
        array = _read_hdf5(file, key)
    elif suffix == ".npz":
        array = _read_npz(file, key)
    else:
        array = _read_safetensors(file, key)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise DataError(f"{file.name}: features must have shape (instances, features), got {tuple(array.shape)}")
    if 0 in array.shape:
        raise DataError(f"{file.name} holds an empty bag: its features have shape {tuple(array.shape)}")
    if not (array.is_floating_point() or array.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)):
        raise DataError(f"{file.name}: features must be real numbers, got {array.dtype}")
    array = array.float()
    bad = int((~torch.isfinite(array)).sum())
    if bad:
        raise DataError(f"{file.name} holds {bad:,} features that are NaN or infinite")
    return array


def read_slides(
    folder: str | os.PathLike[str],
    table: str | os.PathLike[str],
    *,
    slide: str,
    time: str,
    event: str,
    patient: str | None = None,
    key: str | None = None,
) -> Cohort:
    """Read a table of times and events and find the feature file of each of its slides.

    Every file is read once, so that one that cannot be used is told of before any training.

    Args:
        folder: Of files named after slides: ``NAME.h5``, ``NAME.hdf5``, ``NAME.npz`` or ``NAME.safetensors``.
        table: CSV, TSV, Parquet or JSON lines, one slide a row.
        slide: Column of the slides' names.
        time: Column of the times, in any unit, above 0.
        event: Column that says whether the event was seen: 1 or true, else 0 or false.
        patient: Column of the patients, whose slides no fold splits; None if every slide is a patient.
        key: Name of the array within a file.

    Raises:
        DataError: If the data cannot be used, with one sentence that says why.
    """
    place = pathlib.Path(folder)
    if not place.is_dir():
        raise DataError(f"{folder} is {'a file' if place.exists() else 'not there'}: give a folder of feature files")
    frame = read_table(table)
    for column, option in ((slide, "--id"), (time, "--time"), (event, "--event"), (patient, "--patient")):
        if column is not None:
            require_column(frame, column, option)
            missing = frame[column].null_count()
            if missing:
                raise DataError(f"{option}: column {column!r} has {missing} missing values")
    names = frame[slide].cast(pl.Utf8).to_list()
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise DataError(f"--id: {repeated[0]!r} stands in {names.count(repeated[0])} rows of column {slide!r}")
    bags = SlideFiles(_files(place, names), key)
    times, seen = _times(frame[time], time), _events(frame[event], event)
    if not seen.any():
        raise DataError(f"--event: column {event!r} holds no event, so there is nothing to learn from")
    width = None
    for path, features in zip(bags.paths, bags, strict=True):
        if width is not None and features.shape[1] != width[0]:
            raise DataError(f"{path.name} has {features.shape[1]} features an instance, {width[1]} has {width[0]}")
        width = width or (features.shape[1], path.name)
    unit = np.arange(len(names)) if patient is None else frame[patient].rank("dense").to_numpy().astype(np.int64) - 1
    return Cohort(bags, torch.from_numpy(times), torch.from_numpy(seen), torch.from_numpy(unit), tuple(names))


def folder_hash(folder: str | os.PathLike[str], table: str | os.PathLike[str]) -> str:
    """Hash a table's content, and names, sizes and dates of a folder's feature files, which may be many gigabytes."""
    known = hashlib.blake2b(file_hash(table).encode(), digest_size=16)
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix.lower() in _SUFFIXES:
            stat = path.stat()
            known.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return known.hexdigest()


def _files(folder: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    found: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _SUFFIXES:
            continue
        if path.stem in found:
            raise DataError(f"slide {path.stem!r} has two files: {found[path.stem].name} and {path.name}")
        found[path.stem] = path
    if not found:
        raise DataError(f"{folder} holds no feature file: their names must end in one of {', '.join(_SUFFIXES)}")
    absent = [name for name in names if name not in found]
    if absent:
        near = nearest(absent[0], found)
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        raise DataError(f"{folder} has no feature file of slide {absent[0]!r}{more}{near}")
    return [found[name] for name in names]


def _times(column: pl.Series, name: str) -> np.ndarray:
    if not column.dtype.is_numeric():
        raise DataError(f"--time: column {name!r} must hold numbers, got {column.dtype}")
    times = column.cast(pl.Float64).to_numpy()
    if not np.isfinite(times).all():
        raise DataError(f"--time: column {name!r} holds {int((~np.isfinite(times)).sum())} NaN or infinite times")
    if (times < 0).any():
        raise DataError(f"--time: column {name!r} holds negative times such as {times.min():g}")
    return times.copy()


def _events(column: pl.Series, name: str) -> np.ndarray:
    if column.dtype == pl.Boolean:
        return column.to_numpy().copy()
    words = {"true": 1.0, "false": 0.0}
    if column.dtype == pl.Utf8:
        folded = [words.get(value.casefold()) for value in column.to_list()]
        values = np.array([np.nan if value is None else value for value in folded])
    elif column.dtype.is_numeric():
        values = column.cast(pl.Float64).to_numpy()
    else:
        values = np.array([np.nan])
    if not np.isin(values, (0.0, 1.0)).all():
        raise DataError(f"--event: column {name!r} must hold 1 where the event was seen and 0 where it was not")
    return values == 1


def _read_hdf5(file: pathlib.Path, key: str | None) -> Tensor:
    try:
        import h5py
    except ImportError:
        raise DataError(f"{file.name}: reading HDF5 needs h5py: pip install 'minimand[slides]'") from None
    try:
        with h5py.File(file, "r") as stored:
            arrays = [name for name, item in stored.items() if isinstance(item, h5py.Dataset)]
            return _tensor(file, stored[_chosen(file, arrays, key)][()])
    except (OSError, KeyError) as error:
        raise DataError(f"{file.name} is damaged or no HDF5 file: {' '.join(str(error).split())[:120]}") from None


def _read_npz(file: pathlib.Path, key: str | None) -> Tensor:
    if not zipfile.is_zipfile(file):
        raise DataError(f"{file.name} is not an NPZ file")
    try:
        with np.load(file, allow_pickle=False) as stored:
            return _tensor(file, stored[_chosen(file, stored.files, key)])
    except DataError:
        raise
    except ValueError:
        raise DataError(f"{file.name} holds pickled objects, which can run code when read: save plain arrays") from None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DataError(f"{file.name} is damaged: {error}") from None


def _read_safetensors(file: pathlib.Path, key: str | None) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor(_chosen(file, list(stored.keys()), key))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file.name} is damaged or no safetensors file: {error}") from None


def _chosen(file: pathlib.Path, names: Sequence[str], key: str | None) -> str:
    if key is None and len(names) == 1:
        return names[0]
    wanted = "features" if key is None else key
    if wanted not in names:
        listed = ", ".join(map(repr, names)) or "none"
        raise DataError(f"{file.name} holds no array {wanted!r}, it holds {listed}: name one with --key")
    return wanted


def _tensor(file: pathlib.Path, array: Any) -> Tensor:
    values = np.asarray(array)
    if values.dtype.kind not in "iuf":
        raise DataError(f"{file.name}: features must be real numbers, got dtype {values.dtype}")
    return torch.from_numpy(values.astype(np.float32))
