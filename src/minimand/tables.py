"""A table's features: mixed columns in, one float32 matrix out."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

# What a stored encoder may consist of besides scikit-learn's own, plainly named types (see `load_encoder`).
_TRUSTED = ("minimand.tables.", "skrub.", "polars.datatypes.", "numpy.dtype", "sklearn.", "scipy.sparse.")


class TableEncoder(TransformerMixin, BaseEstimator):
    """Encode a table for a network: every column scaled to mean 0 and variance 1, missing values filled and flagged.

    Numbers and booleans pass as they are. Dates, categories and text of many distinct values are encoded by skrub's
    ``TableVectorizer`` (date parts, one-hot, and TF-IDF reduced by SVD). Missing numbers become the column's mean,
    with an indicator column beside. Everything is learnt from the rows given to ``fit``.

    Args:
        random_state: Seed of the SVD of text columns.

    Attributes:
        n_features_in_: Number of columns seen.
        n_features_out_: Number of features made.
    """

    def __init__(self, *, random_state: int | None = 0) -> None:
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> TableEncoder:
        """Learn from a polars or pandas data frame, or a two-dimensional array of numbers."""
        self.fit_transform(X)
        return self

    def fit_transform(self, X: Any, y: Any = None) -> NDArray[np.float32]:
        """Learn from the rows of ``X`` and encode them."""
        frame = as_frame(X)
        self.n_features_in_ = frame.width
        self.columns_ = frame.columns
        numbers = frame.select(cs.numeric() | cs.boolean()).columns
        others = [name for name in frame.columns if name not in numbers]
        self.numbers_, self.others_ = numbers, others
        parts = []
        if numbers:
            self.number_pipeline_ = _filled_and_scaled()
            parts.append(self.number_pipeline_.fit_transform(_as_matrix(frame.select(numbers))))
        if others:
            self.other_pipeline_ = make_pipeline(_vectorizer(self.random_state), *_filled_and_scaled())
            parts.append(self.other_pipeline_.fit_transform(frame.select(others)))
        encoded = _joined(parts)
        self.n_features_out_ = encoded.shape[1]
        return encoded

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Encode the rows of ``X``."""
        frame = as_frame(X)
        missing = [name for name in self.columns_ if name not in frame.columns]
        if missing:
            raise ValueError(f"X lacks the columns {', '.join(missing)} that the encoder was fitted on")
        parts = []
        if self.numbers_:
            parts.append(self.number_pipeline_.transform(_as_matrix(frame.select(self.numbers_))))
        if self.others_:
            parts.append(self.other_pipeline_.transform(frame.select(self.others_)))
        return _joined(parts)


def as_frame(X: Any) -> pl.DataFrame:
    """Return ``X`` (polars, pandas or a two-dimensional array) as a polars data frame."""
    if isinstance(X, pl.DataFrame):
        return X
    if hasattr(X, "iloc"):
        import pandas as pd

        columns = {}
        for name in X.columns:
            column = X[name]
            if isinstance(column.dtype, pd.CategoricalDtype):
                column = column.astype(column.cat.categories.dtype)
            columns[str(name)] = pl.Series(
                str(name), column.to_numpy(dtype=object, na_value=None).tolist(), strict=False
            )
        return pl.DataFrame(columns)
    array = np.asarray(X)
    if array.ndim != 2:
        raise ValueError(f"X must have two dimensions, got shape {array.shape}")
    return pl.DataFrame(array, schema=[f"x{column}" for column in range(array.shape[1])], orient="row")


def save_encoder(encoder: TableEncoder, path: str | os.PathLike[str]) -> None:
    """Store a fitted encoder as a skops file: JSON and plain arrays, no pickle."""
    import skops.io

    skops.io.dump(encoder, path)


def load_encoder(path: str | os.PathLike[str]) -> TableEncoder:
    """Load an encoder stored by :func:`save_encoder`; a file that names any other kind of object is refused."""
    import skops.io

    named = skops.io.get_untrusted_types(file=path)
    foreign = [name for name in named if not name.startswith(_TRUSTED)]
    if foreign:
        raise ValueError(f"{path} names types that no encoder of minimand holds: {', '.join(foreign)}")
    return skops.io.load(path, trusted=named)


def _vectorizer(random_state: int | None) -> Any:
    from skrub import StringEncoder, TableVectorizer

    return TableVectorizer(high_cardinality=StringEncoder(random_state=random_state))


def _filled_and_scaled() -> Pipeline:
    return make_pipeline(SimpleImputer(add_indicator=True, keep_empty_features=True), StandardScaler(copy=False))


def _as_matrix(frame: pl.DataFrame) -> NDArray[np.float32]:
    matrix = frame.cast(pl.Float32).to_numpy()
    # An infinity would make every mean infinite; it carries no more than "missing".
    return np.where(np.isfinite(matrix), matrix, np.float32(np.nan)) if not np.isfinite(matrix).all() else matrix


def _joined(parts: list[Any]) -> NDArray[np.float32]:
    arrays = [np.asarray(part, dtype=np.float32) for part in parts]
    return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1))
