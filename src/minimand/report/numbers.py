"""Numbers as people read them: as many digits as the interval earns, a true minus, a dash where there is none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

DASH = "—"
_MINUS = "−"
_THIN = "\u202f"


def finite(value: Any) -> float | None:
    """Return ``value`` as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def decimals(intervals: Iterable[Sequence[Any]], values: Iterable[Any], *, percent: bool = False) -> int | None:
    """Choose how many decimals a column of numbers shares.

    Args:
        intervals: ``(low, high)`` of each row. Half the typical width decides: its first digit shows for percent,
            its first two otherwise.
        values: The numbers themselves, which decide where no interval has a width.
        percent: Whether the numbers are percent, which keep at least one decimal.

    Returns:
        The number of decimals, or None where only scientific notation is short enough.
    """
    ends = [(finite(low), finite(high)) for low, high in intervals]
    halves = [(high - low) / 2 for low, high in ends if low is not None and high is not None and high > low]
    sizes = [abs(number) for number in map(finite, values) if number]
    if sizes and max(sizes) >= 1e7:
        return None
    # Without intervals three digits of the typical number do.
    typical = statistics.median(halves) if halves else statistics.median(sizes) / 10 if sizes else 1.0
    wanted = -math.floor(math.log10(typical)) + (0 if percent else 1)
    if wanted > 6:
        return None
    return max(wanted, 1 if percent else 0)


def number(value: Any, places: int | None = None, *, signed: bool = False) -> str:
    """Write a number with so many decimals (None: three digits), or a dash if there is none."""
    real = finite(value)
    if real is None:
        return DASH
    text = f"{abs(real):.3g}" if places is None else f"{abs(real):,.{places}f}".replace(",", _THIN)
    if not any(digit in text.partition("e")[0] for digit in "123456789"):
        return text
    sign = _MINUS if real < 0 else "+" if signed else ""
    return sign + text.replace("e-", f"e{_MINUS}")


def interval(low: Any, high: Any, places: int | None = None, *, signed: bool = False) -> str:
    """Write ``low to high``, or one dash if either end is missing or infinite."""
    if finite(low) is None or finite(high) is None:
        return DASH
    return f"{number(low, places, signed=signed)} to {number(high, places, signed=signed)}"


def p_value(value: Any) -> str:
    """Write a p-value."""
    real = finite(value)
    if real is None:
        return DASH
    return "< 0.001" if real < 0.001 else f"{real:.3f}"


def duration(seconds: Any) -> str:
    """Write how long something took, in the unit a person would use."""
    real = finite(seconds)
    if real is None:
        return DASH
    if real < 60:
        return f"{real:.2g} s" if real < 10 else f"{real:.0f} s"
    minutes, rest = divmod(round(real), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def tight(text: str) -> str:
    """Keep a percent sign on the line of its number."""
    return text.replace(" %", "\u00a0%")


def factor(unit: str) -> float:
    """Return what a stored number is multiplied by before it is shown: 100 for percent."""
    return 100.0 if unit == "%" else 1.0


def scaled(value: Any, by: float) -> float | None:
    """Return ``value`` times ``by``, or None if it is not a finite number."""
    real = finite(value)
    return None if real is None else real * by
