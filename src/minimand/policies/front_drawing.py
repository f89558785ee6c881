"""Drawings of a Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _GREY = "#2f6db3", "#8a8a8a"


def draw_front(returns: Tensor, reference: Tensor, names: Sequence[str] | None) -> Figure:
    """Draw policies against two objectives, or across more.

    Args:
        returns: Expected returns, ``(policies, objectives)``.
        reference: Where the hypervolume is measured from.
        names: Of the objectives.
    """
    from matplotlib.figure import Figure

    count = returns.shape[1]
    if names is None:
        names = [f"objective {i + 1}" for i in range(count)]
    if len(names) != count:
        raise ValueError(f"names must name {count} objectives, got {len(names)}")
    if not len(returns):
        raise ValueError("the archive is empty: there is nothing to draw")
    figure = Figure(figsize=(5.0, 4.0) if count < 3 else (max(5.0, 1.1 * count), 4.0), layout="constrained")
    axes = figure.add_subplot()
    if count == 1:
        axes.plot(range(len(returns)), returns[:, 0].cpu(), "o", color=_BLUE)
        axes.set(xlabel="policy", ylabel=names[0])
    elif count == 2:
        _plane(axes, returns.cpu(), reference.cpu(), names)
    else:
        _parallel(axes, returns.cpu(), names)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{len(returns)} policies", fontsize=10, loc="left")
    return figure


def _plane(axes, returns: Tensor, reference: Tensor, names: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    points = returns[returns[:, 0].argsort()]
    x, y = points.T.tolist()
    # What lies below the staircase is the hypervolume.
    axes.fill_between(
        [float(reference[0]), *x], [y[0], *y], float(reference[1]), step="pre", color=_BLUE, alpha=0.12, linewidth=0
    )
    axes.plot(x, y, "o", color=_BLUE, markersize=4)
    axes.plot(*reference.tolist(), marker="+", color=_GREY, markersize=9, clip_on=False)
    axes.annotate("reference", reference.tolist(), (6, 6), textcoords="offset points", color=_GREY, fontsize=8)
    axes.set(xlabel=names[0], ylabel=names[1])


def _parallel(axes, returns: Tensor, names: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    low, high = returns.amin(0), returns.amax(0)
    shares = (returns - low) / (high - low).clamp_min(1e-12)
    axes.plot(range(len(names)), shares.T.tolist(), color=_BLUE, alpha=min(1.0, 0.15 + 10 / len(returns)), linewidth=1)
    for place in range(len(names)):
        axes.axvline(place, color=_GREY, linewidth=0.6)
        for value, height, side in ((low, 0.0, "top"), (high, 1.0, "bottom")):
            offset = -0.02 if side == "top" else 0.02
            axes.text(
                place, height + offset, f"{float(value[place]):.3g}", ha="center", va=side, fontsize=8, color=_GREY
            )
    axes.set(yticks=[], ylim=(-0.12, 1.12))
    axes.set_xticks(range(len(names)), names)
    axes.spines[["left", "bottom"]].set_visible(False)
