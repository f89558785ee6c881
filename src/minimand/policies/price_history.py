"""Prices of several assets day by day: checked once, read from a file, sliced without a glimpse of the future."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks

_MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"]


@dataclasses.dataclass(frozen=True)
class PriceHistory:
    """Prices, one row a day; days, assets and dates keep together when it is sliced.

    Args:
        prices: ``(days, assets)`` closing prices, or ``(days, assets, channels)`` with the close in the first channel
            and, as a rule, high, low and open after it. All finite and above 0.
        names: One an asset; numbered if None.
        dates: One a day, rising; None where days have none.

    Attributes:
        prices: ``(days, assets, channels)``.

    Raises:
        TypeError: If prices are no floating-point tensor.
        ValueError: If a price is missing, infinite, zero or negative, of which the first is named; if there are fewer
            than two days; or if names or dates do not fit or dates do not rise.

    Example:
        >>> history = PriceHistory(torch.tensor([[10.0, 5.0], [11.0, 5.0], [11.0, 6.0]]), names=("A", "B"))
        >>> history.relatives()
        tensor([[1.0000, 1.1000, 1.0000],
                [1.0000, 1.0000, 1.2000]])
        >>> len(history[:2])
        2

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563, the price tensor.
    """

    prices: Tensor
    names: tuple[str, ...] | None = None
    dates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        checks.floating(self.prices, "prices")
        if self.prices.dim() not in (2, 3) or 0 in self.prices.shape:
            raise ValueError(
                f"prices must have shape (days, assets) or (days, assets, channels), got {tuple(self.prices.shape)}"
            )
        if self.prices.dim() == 2:
            object.__setattr__(self, "prices", self.prices[..., None])
        days, assets, _ = self.prices.shape
        if days < 2:
            raise ValueError(f"prices must cover at least two days, got {days}")
        if self.names is None:
            object.__setattr__(self, "names", tuple(f"asset {number}" for number in range(assets)))
        elif len(self.names) != assets:
            raise ValueError(f"names must be one an asset, {assets}, got {len(self.names)}")
        if self.dates is not None:
            self._check_dates(self.dates)
        good = torch.isfinite(self.prices) & (self.prices > 0)
        if not bool(good.all()):
            self._refuse(good)

    def __len__(self) -> int:
        return len(self.prices)

    def __getitem__(self, days: slice) -> PriceHistory:
        """Return some days, in order, as a view: their prices were checked already."""
        if not isinstance(days, slice) or (days.step or 1) < 1:
            raise TypeError("a history is sliced by a range of days with a positive step")
        if not len(range(*days.indices(len(self)))):
            raise ValueError(f"a history of {len(self)} days has none from {days.start} to {days.stop}")
        part = object.__new__(PriceHistory)
        object.__setattr__(part, "prices", self.prices[days])
        object.__setattr__(part, "names", self.names)
        object.__setattr__(part, "dates", None if self.dates is None else self.dates[days])
        return part

    def relatives(self) -> Float[Tensor, "changes holdings"]:
        """Return each day's closing price over that of the day before, with 1 for cash in front."""
        close = self.prices[..., 0]
        return torch.cat([torch.ones_like(close[1:, :1]), close[1:] / close[:-1]], 1)

    def log_returns(self) -> Float[Tensor, "changes assets"]:
        """Return the change of the logarithm of each closing price."""
        return self.prices[..., 0].log().diff(dim=0)

    def _check_dates(self, dates: tuple[str, ...]) -> None:
        if len(dates) != len(self):
            raise ValueError(f"dates must be one a day, {len(self)}, got {len(dates)}")
        for before, after in itertools.pairwise(dates):
            if before == after:
                raise ValueError(f"dates must rise: {after} comes twice")
            if before > after:
                raise ValueError(f"dates must rise: {after} comes after {before}; sort the rows by date")

    def _refuse(self, good: Tensor) -> None:
        day, asset, channel = (~good).nonzero()[0].tolist()
        value = float(self.prices[day, asset, channel])
        assert self.names is not None
        name = f"{self.names[asset]!r}" + (f" (channel {channel})" if channel else "")
        when = f"day {day}" if self.dates is None else f"{self.dates[day]}"
        count = int((~good).sum())
        more = "" if count == 1 else f", and {count - 1} more prices cannot be used"
        if value != value:
            advice = "fill gaps forward with the last price, or leave out the asset or the days"
            raise ValueError(f"prices have a gap: {name} has no price (NaN) on {when}{more}; {advice}")
        kind = "a zero" if value == 0 else "an infinite" if abs(value) == float("inf") else "a negative"
        raise ValueError(f"prices must be finite and above 0: {name} has {kind} price, {value}, on {when}{more}")


def read_prices(
    path: str | os.PathLike[str], *, date: str | None = None, dtype: torch.dtype = torch.float64
) -> PriceHistory:
    r"""Read closing prices from a CSV file: one row a day, one column an asset.

    A column of dates is recognised by its name (``date``, in any case, or no name at all) and may be absent. Fields
    are separated by commas, semicolons or tabs.

    Args:
        path: Of the file, UTF-8.
        date: Name of the column of dates; None to recognise it.
        dtype: Of the prices.

    Returns:
        The history, named after the columns.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no table, a column is not numeric, or the prices are refused by
            :class:`PriceHistory`: gaps, zeros, negative numbers, dates that do not rise.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "prices.csv")
        >>> _ = file.write_text("date,A,B\n2024-01-02,10,5\n2024-01-03,11,5\n")
        >>> read_prices(file).names
        ('A', 'B')

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563, whose data are a table of this kind.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    with file.open(encoding="utf-8-sig", errors="replace") as handle:
        header = handle.readline()
    separator = max(",;\t", key=lambda mark: (header.count(mark), mark == ","))
    try:
        frame = pl.read_csv(file, separator=separator, null_values=_MISSING, infer_schema_length=None)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"cannot read {file.name} as a table: {' '.join(str(error).split())[:200]}") from error
    if date is not None and date not in frame.columns:
        raise ValueError(f"date: {file.name} has no column {date!r}, its columns are {', '.join(frame.columns[:12])}")
    found = [name for name in frame.columns if name.strip().casefold() in ("date", "")]
    column = date if date is not None else found[0] if found else None
    dates = None
    if column is not None:
        if frame[column].null_count():
            raise ValueError(f"{file.name}: there is a row without a date in column {column!r}")
        dates = _iso(frame[column], file.name)
        frame = frame.drop(column)
    for name, kind in frame.schema.items():
        # A column of nothing but gaps has no type; the history will say that its prices are missing.
        if not kind.is_numeric() and frame[name].null_count() < frame.height:
            raise ValueError(f"{file.name}: column {name!r} must hold prices, it holds text; name the dates with date=")
    if not frame.width or frame.height < 2:
        raise ValueError(
            f"{file.name} must hold at least two days of one asset, it has {frame.height} rows and {frame.width} assets"
        )
    values = frame.select(pl.all().cast(pl.Float64).fill_null(float("nan"))).to_numpy(order="c")
    return PriceHistory(torch.tensor(values, dtype=dtype), names=tuple(frame.columns), dates=dates)


def _iso(column: pl.Series, file: str) -> tuple[str, ...]:
    """Return dates as text that sorts as they do; a mere count of days or a number like 20240102 sorts as it is."""
    if column.dtype.is_integer():
        width = len(str(column.max()))
        return tuple(str(value).zfill(width) for value in column)
    try:
        return tuple(str(value) for value in column.cast(pl.String).str.to_datetime(strict=True))
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{file}: column {column.name!r} must hold dates such as 2024-01-31") from error
