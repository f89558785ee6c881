"""What a strategy would have earned: it trades day by day, is handed the past and nothing else, and is drawn.

Source: Huang, Zhou and Song 2024, arXiv 2412.18563 (evaluation); Magdon-Ismail et al. 2004 (drawdowns).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from .price_history import PriceHistory
from .sharpe import drawdowns, sharpe_ratio, sortino_ratio
from .trading import all_cash, check_weights, drift, wealth_after_trade

if TYPE_CHECKING:
    import matplotlib.figure

Strategy = Callable[[PriceHistory, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Backtest:
    """What a strategy earned, day by day.

    Args:
        log_returns: ``(days,)``, costs paid.
        weights: ``(days, assets + 1)``, cash first, after each day's trade.
        turnover: ``(days,)``: what was bought or sold of the assets, as a fraction of wealth.
        dates: Of the days on which the returns were earned, where the history has any.
    """

    log_returns: Float[Tensor, " days"]
    weights: Float[Tensor, "days holdings"]
    turnover: Float[Tensor, " days"]
    dates: tuple[str, ...] | None = None

    def wealth(self) -> Float[Tensor, " days"]:
        """Return wealth at the end of each day, 1 at the start: the equity curve."""
        return self.log_returns.cumsum(0).exp()

    def drawdowns(self) -> Float[Tensor, " days"]:
        """Return how far wealth stands below its highest so far, as a fraction."""
        return drawdowns(self.log_returns)

    def summary(self, *, annualize: float = 252.0) -> dict[str, float]:
        """Return the figures of merit.

        Args:
            annualize: Days a year.
        """
        worst = float(self.drawdowns().max())
        growth = float(self.log_returns.mean()) * annualize
        return {
            "sharpe": float(sharpe_ratio(self.log_returns, annualize=annualize, epsilon=1e-8)),
            "sortino": float(sortino_ratio(self.log_returns, annualize=annualize)),
            "calmar": growth / worst if worst > 0 else float("inf") if growth > 0 else 0.0,
            "annual log-return": growth,
            "annual volatility": float(self.log_returns.std(correction=0)) * annualize**0.5,
            "maximum drawdown": worst,
            "days won": float((self.log_returns > 0).double().mean()),
            "turnover": float(self.turnover.mean()),
        }

    def draw(self, *, name: str = "strategy", others: Mapping[str, Backtest] | None = None) -> matplotlib.figure.Figure:
        """Draw the equity curve, on a logarithmic scale, and the drawdown below it.

        Args:
            name: What the curves are called in the legend.
            others: Backtests over the same days to draw beside it, by name.

        Returns:
            The figure: ``figure.savefig("equity.svg")`` writes it.

        Raises:
            ValueError: If another backtest has the same name, another number of days or other dates.

        Example:
            >>> backtest = Backtest(torch.tensor([0.1, -0.2]), torch.ones(2, 2) / 2, torch.zeros(2))
            >>> [axes.get_ylabel() for axes in backtest.draw().axes]
            ['wealth', 'drawdown (%)']
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        others = {} if others is None else others
        if name in others:
            raise ValueError(f"others must have names other than {name!r}, that of this backtest")
        for other, backtest in others.items():
            if len(backtest.log_returns) != len(self.log_returns) or backtest.dates != self.dates:
                raise ValueError(f"others must cover the days of this backtest, {other!r} covers different ones")
        figure = Figure(figsize=(9, 5), layout="constrained")
        equity, depth = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for label, backtest in {name: self, **others}.items():
            wealth = torch.cat([backtest.log_returns.new_ones(1), backtest.wealth()])
            fallen = torch.cat([backtest.log_returns.new_zeros(1), -100 * backtest.drawdowns()])
            width = 1.8 if backtest is self else 1.0
            equity.plot(wealth.detach().cpu(), label=label, linewidth=width)
            depth.plot(fallen.detach().cpu(), label=label, linewidth=width)
        equity.set_yscale("log")
        equity.set_ylabel("wealth")
        low, high = equity.get_ylim()
        equity.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6))
        equity.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        equity.yaxis.set_minor_locator(NullLocator())
        equity.legend()
        depth.set_ylabel("drawdown (%)")
        depth.set_xlabel("day" if self.dates is None else "date")
        depth.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if self.dates is not None:
            depth.xaxis.set_major_formatter(FuncFormatter(lambda day, _: _date(self.dates, day)))
        for axes in (equity, depth):
            axes.grid(alpha=0.3)
        return figure


def walk_forward(
    strategy: Strategy,
    history: PriceHistory,
    *,
    start: int,
    every: int = 1,
    cost: float = 0.0025,
    exact: bool = True,
) -> Backtest:
    """Let a strategy trade from one day to the end of a history, handing it the past and nothing else.

    Args:
        strategy: ``(past, held) -> weights``: prices up to and including the present close, and the weights held, cash
            first, in; new weights out, either ``(assets + 1,)``, cash first, or ``(assets,)``, fully invested.
        history: Prices.
        start: Day, counted from 0, at whose close the first trade takes place.
        every: Days from one decision to the next; in between nothing is traded and weights drift.
        cost: kappa in [0, 1).
        exact: As for :func:`wealth_after_trade`.

    Returns:
        One row a day after ``start``.

    Raises:
        ValueError: If there is no day after ``start``, a setting is out of range, or the strategy returns weights off
            the simplex.

    Example:
        >>> history = PriceHistory(torch.tensor([[1.0, 1.0], [2.0, 1.0], [2.0, 2.0]]))
        >>> walk_forward(lambda past, held: torch.tensor([0.5, 0.5]), history, start=0, cost=0.0).wealth()
        tensor([1.5000, 2.2500])

    Source:
        Huang, Zhou and Song 2024, arXiv 2412.18563, the evaluation.
    """
    checks.between(cost, "cost", 0.0, 1.0, high_open=True)
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if not 0 <= start < len(history) - 1:
        raise ValueError(f"start must lie in [0, {len(history) - 2}], got {start}")
    relatives = history.relatives()
    held = all_cash(torch.zeros_like(relatives[0]))
    chosen, returns, turnover = [], [], []
    for day in range(start, len(history) - 1):
        weights = _holdings(strategy(history[: day + 1], held.clone()), held) if (day - start) % every == 0 else held
        left = wealth_after_trade(held, weights, cost=cost, exact=exact)
        turnover.append((held - left * weights)[1:].abs().sum())
        returns.append(left.log() + (weights * relatives[day]).sum().log())
        chosen.append(weights)
        held = drift(weights, relatives[day])
    dates = None if history.dates is None else history.dates[start + 1 :]
    return Backtest(torch.stack(returns), torch.stack(chosen), torch.stack(turnover), dates)


def _holdings(weights: Tensor, held: Tensor) -> Tensor:
    """Check what a strategy returned, and put cash in front where it names only the assets."""
    checks.floating(weights, "strategy's weights")
    if weights.shape == (len(held) - 1,):
        weights = torch.cat([weights.new_zeros(1), weights])
    if weights.shape != held.shape:
        raise ValueError(
            f"strategy's weights must have shape ({len(held)},) or, without cash, ({len(held) - 1},), "
            f"got {tuple(weights.shape)}"
        )
    check_weights(weights, "strategy's weights")
    return weights.detach().to(held)


def _date(dates: tuple[str, ...] | None, day: float) -> str:
    """Return the date of a tick, without the time of day; day 0 is the start, before the first return."""
    index = round(day) - 1
    return dates[index][:10] if dates is not None and 0 <= index < len(dates) else ""
