"""Portfolio: does a reward that adds up to the average Sharpe ratio earn more than what needs no learning?

Six markets of real prices, disjoint or nearly so in time, are traded by walk-forward, and so is a market made with a
signal that can be learned. Needs the price histories of bokeh-sampledata and universal-portfolios.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import itertools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from minimand.bench import Claim, Metric, Outcome, Run, Study
from minimand.policies import (
    Backtest,
    PortfolioPolicy,
    PriceHistory,
    SharpeLoss,
    TradingEnvironment,
    average_sharpe_rewards,
    differential_sharpe_rewards,
    maximum_sharpe,
    minimum_variance,
    risk_parity,
    shrunk_moments,
    train_portfolio,
    walk_forward,
)

Strategy = Callable[[PriceHistory, Tensor], Tensor]
Rewards = Callable[[Tensor], Tensor]

MARKETS = ("nyse_o", "nyse_n", "us stocks", "msci", "sp500", "tse")
ASSETS, WINDOW, HORIZON, EPISODES, VALIDATION = 5, 4, 64, 32, 250
REAL_COST, MADE_COST = 0.0025, 0.0005
DAY, WEEK, MONTH, NEVER = 1, 5, 21, 10**9

REAL, DEPTH, GROWTH, TURNOVER, MADE, TRAINING = METRICS = (
    Metric("Sharpe ratio, real prices"),
    Metric("maximum drawdown, real prices", "lower is better", "%"),
    Metric("annual log-return, real prices", unit="%"),
    Metric("turnover a day, real prices", "lower is better", "%"),
    Metric("Sharpe ratio, known signal"),
    Metric("average Sharpe ratio in training, known signal"),
)


@dataclasses.dataclass(frozen=True)
class Market:
    """Prices, the day from which they are traded, and what trading costs.

    Args:
        history: All prices.
        start: Day at whose close trading begins; all days up to it may be learned from.
        cost: Of a trade, as a fraction of it.
        folds: So many times, at equal distances from ``start``, is learned anew from what has become the past.
        iterations: Of training, from one validation to the next; there are three in a fold.
    """

    history: PriceHistory
    start: int
    cost: float
    folds: int
    iterations: int


def problem(source: Any, seed: int) -> tuple[Market, Market]:
    """Take five assets at random from one market of real prices, and make a market with a signal."""
    generator = torch.Generator().manual_seed(seed)
    return _real(MARKETS[seed % len(MARKETS)], generator), _made(generator)


def _real(name: str, generator: torch.Generator) -> Market:
    prices = _us_stocks() if name == "us stocks" else _relatives(name)
    chosen = torch.randperm(prices.shape[1], generator=generator)[:ASSETS].sort().values
    return Market(PriceHistory(prices[:, chosen].float()), 2 * len(prices) // 3, REAL_COST, folds=2, iterations=2)


def _made(generator: torch.Generator, days: int = 5000) -> Market:
    """Make log-returns of which a quarter of yesterday's, less the mean over assets, comes again."""
    volatility = torch.linspace(0.008, 0.02, ASSETS)
    own = volatility * torch.randn(days, ASSETS, generator=generator)
    common = 0.004 * torch.randn(days, 1, generator=generator)
    returns = [torch.zeros(ASSETS)]
    for shock in own + common:
        returns.append(0.0003 + 0.25 * (returns[-1] - returns[-1].mean()) + shock)
    return Market(PriceHistory(torch.stack(returns).cumsum(0).exp()), 4 * days // 5, MADE_COST, folds=1, iterations=6)


@functools.cache
def _relatives(name: str) -> Tensor:
    """Read prices over those of the first day, as the package has them."""
    frame = pl.read_csv(_package("universal", "--no-deps universal-portfolios") / "data" / f"{name}.csv")
    return torch.from_numpy(frame.to_numpy(order="c").astype(np.float64))


@functools.cache
def _us_stocks() -> Tensor:
    """Read close, high, low and open, adjusted for splits and dividends, of the four stocks with a long history."""
    frame = pl.read_csv(_package("bokeh_sampledata", "bokeh-sampledata") / "_data" / "stocks.csv.gz")
    names = ("Close", "High", "Low", "Open")
    frame = frame.with_columns(pl.col(names) * pl.col("Adj Close") / pl.col("Close"))
    tables = [frame.filter(pl.col("Ticker") == ticker) for ticker in ("AAPL", "GOOG", "IBM", "MSFT")]
    common = functools.reduce(lambda days, table: days & set(table["Date"]), tables, set(tables[0]["Date"]))
    tables = [table.filter(pl.col("Date").is_in(list(common))).sort("Date").select(names) for table in tables]
    return torch.stack([torch.from_numpy(table.to_numpy(order="c").astype(np.float64)) for table in tables], 1)


def _package(module: str, name: str) -> pathlib.Path:
    """Find a package's folder without running its code."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"the price histories are missing: pip install {name}")
    return pathlib.Path(next(iter(found.submodule_search_locations)))


def all_cash(past: PriceHistory, held: Tensor) -> Tensor:
    """Hold nothing but cash."""
    return torch.eye(len(held))[0]


def equal_weight(past: PriceHistory, held: Tensor) -> Tensor:
    """Hold every asset alike."""
    return torch.full((len(held) - 1,), 1 / (len(held) - 1))


def estimated(solve: Callable[[Tensor, Tensor], Tensor], lookback: int) -> Strategy:
    """Let a portfolio be solved for from the shrunk moments of the last days."""

    def trade(past: PriceHistory, held: Tensor) -> Tensor:
        mean, covariance = shrunk_moments(past[-lookback - 1 :].relatives()[:, 1:].double() - 1)
        if solve is maximum_sharpe and not bool((mean > 0).any()):
            return all_cash(past, held)
        return solve(mean, covariance)

    return trade


class Static:
    """A strategy without learning; which of its settings is traded, the last year before trading decides.

    Args:
        choices: Strategies and how often each decides, of which one is chosen anew in every fold.
    """

    def __init__(self, *choices: tuple[Strategy, int]) -> None:
        self.choices = choices

    def __call__(self, data: tuple[Market, Market], run: Run) -> Outcome:
        """Trade both markets."""
        return _measured([self._trade(market) for market in data])

    def _trade(self, market: Market) -> Backtest:
        parts = []
        for start, end in _folds(market):
            tried = [_validated(strategy, market, start, every) for strategy, every in self.choices]
            strategy, every = self.choices[tried.index(max(tried))]
            parts.append(walk_forward(strategy, market.history[:end], start=start, every=every, cost=market.cost))
        return _joined(parts)


Learn = Callable[[PortfolioPolicy, Market, int, torch.Generator], float]


class Learned:
    """A policy that learns from all days before a fold but the last year, which decides how long it should have.

    Args:
        learn: Trains a policy in place on the days before one, and returns the average Sharpe ratio of its episodes, or
            NaN if it does not look.
        make: Makes the policy.
    """

    def __init__(self, learn: Learn, make: Callable[..., PortfolioPolicy] = PortfolioPolicy) -> None:
        self.learn = learn
        self.make = make

    def __call__(self, data: tuple[Market, Market], run: Run) -> Outcome:
        """Train on both markets and trade them."""
        traded = [self._trade(market, run.stream(name)) for market, name in zip(data, ("real", "made"), strict=True)]
        return _measured([backtest for backtest, _ in traded], traded[1][1])

    def _trade(self, market: Market, seed: int) -> tuple[Backtest, list[float]]:
        generator = torch.Generator().manual_seed(seed)
        _, assets, channels = market.history.prices.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = self.make(assets, num_channels=channels, window=WINDOW, width=4, hidden=32)
        parts, reached = [], []
        for start, end in _folds(market):
            tried = [(_validated(policy.strategy(), market, start, DAY), copy.deepcopy(policy))]
            for _ in range(3):
                reached.append(self.learn(policy, market, start + 1 - VALIDATION, generator))
                tried.append((_validated(policy.strategy(), market, start, DAY), copy.deepcopy(policy)))
            _, policy = max(tried, key=lambda each: each[0])
            parts.append(walk_forward(policy.strategy(), market.history[:end], start=start, cost=market.cost))
        return _joined(parts), reached


def by_ppo(reward: Rewards, *, averages_sharpe: bool = False) -> Learn:
    """Let a policy learn by proximal policy optimisation.

    Args:
        reward: As for :func:`train_portfolio`.
        averages_sharpe: Whether the rewards add up to the average Sharpe ratio.
    """

    def learn(policy: PortfolioPolicy, market: Market, days: int, generator: torch.Generator) -> float:
        training = train_portfolio(
            policy,
            market.history[:days],
            reward=reward,
            horizon=HORIZON,
            cost=market.cost,
            num_episodes=EPISODES,
            lr=3e-3,
            gamma=0.95,
            lam=0.8,
            epochs=4,
            max_iter=market.iterations,
            generator=generator,
        )
        return sum(training.rewards[-2:]) / 2 if averages_sharpe else math.nan

    return learn


def by_ascent(policy: PortfolioPolicy, market: Market, days: int, generator: torch.Generator) -> float:
    """Let a policy ascend the Sharpe ratio of its episodes itself, through the market: prices are known afterwards."""
    environment = TradingEnvironment(
        market.history[:days],
        window=WINDOW,
        horizon=HORIZON,
        cost=market.cost,
        num_episodes=EPISODES,
        generator=generator,
    )
    optimizer, loss = torch.optim.Adam(policy.parameters(), lr=1e-2), SharpeLoss()
    for _ in range(market.iterations):
        observation, done = environment.reset(), False
        log_returns = []
        while not done:
            observation, log_return, done = environment.step(policy.act(observation.image))
            log_returns.append(log_return)
        optimizer.zero_grad()
        loss(torch.stack(log_returns, 1)).backward()
        optimizer.step()
    return math.nan


class ClippedPolicy(PortfolioPolicy):
    """A policy whose actions are clipped to [0, 1] before the softmax, as in the released code."""

    def weights(self, action: Tensor) -> Tensor:
        """Turn actions into weights that are all near each other."""
        return action.clamp(0, 1).softmax(-1)


def _folds(market: Market) -> list[tuple[int, int]]:
    """Return where each fold starts, and where its history ends."""
    edges = np.linspace(market.start, len(market.history) - 1, market.folds + 1).astype(int).tolist()
    return [(start, end + 1) for start, end in itertools.pairwise(edges)]


def _validated(strategy: Strategy, market: Market, start: int, every: int) -> float:
    """Return the Sharpe ratio in the year before a fold."""
    validation = walk_forward(
        strategy, market.history[: start + 1], start=start - VALIDATION, every=every, cost=market.cost
    )
    return validation.summary()["sharpe"]


def _joined(parts: Sequence[Backtest]) -> Backtest:
    """Put the folds one after another; each begins in cash and pays for its first trade."""
    return Backtest(
        torch.cat([part.log_returns for part in parts]),
        torch.cat([part.weights for part in parts]),
        torch.cat([part.turnover for part in parts]),
    )


def _measured(backtests: Sequence[Backtest], reached: Sequence[float] = (math.nan,)) -> Outcome:
    real, made = (backtest.summary() for backtest in backtests)
    # As many points whatever the market, so that curves can be laid over each other.
    points = torch.linspace(0, len(backtests[0].log_returns) - 1, 100).long()
    curves = {
        "equity, real prices": backtests[0].wealth()[points].tolist(),
        "drawdown, real prices": backtests[0].drawdowns()[points].tolist(),
    }
    values = (
        *(real[name] for name in ("sharpe", "maximum drawdown", "annual log-return", "turnover")),
        made["sharpe"],
        reached[-1],
    )
    return Outcome({metric.name: value for metric, value in zip(METRICS, values, strict=True)}, curves)


def cash(data: tuple[Market, Market], run: Run) -> Outcome:
    """Hold nothing but cash, whose Sharpe ratio is 0 by convention."""
    return _measured([walk_forward(all_cash, market.history, start=market.start) for market in data], (0.0,))


def over_lookbacks(solve: Callable[[Tensor, Tensor], Tensor]) -> Static:
    """Let an estimated portfolio, rebalanced monthly, choose how many days it is estimated from."""
    return Static(*((estimated(solve, lookback), MONTH) for lookback in (60, 125, 250, 500)))


def _claim(contender: str, beats: str, metric: Metric, says: str, margin: float = 0.0) -> Claim:
    return Claim(contender, beats=beats, metric=metric.name, margin=margin, says=says)


OURS = "average-Sharpe reward"
warm = functools.partial(average_sharpe_rewards, warmup=10)

study = Study(
    method="portfolio",
    problem=problem,
    contenders={
        "cash": cash,
        "equal weight": Static(*((equal_weight, every) for every in (MONTH, WEEK, DAY, NEVER))),
        "minimum variance": over_lookbacks(lambda mean, covariance: minimum_variance(covariance)),
        "maximum Sharpe": over_lookbacks(maximum_sharpe),
        "risk parity": over_lookbacks(lambda mean, covariance: risk_parity(covariance).weights),
        "log-return reward": Learned(by_ppo(lambda log_returns: 100 * log_returns)),
        "differential Sharpe reward": Learned(by_ppo(differential_sharpe_rewards)),
        OURS: Learned(by_ppo(warm, averages_sharpe=True)),
        "average-Sharpe reward, as released": Learned(
            by_ppo(functools.partial(average_sharpe_rewards, epsilon=1e-7)), ClippedPolicy
        ),
        "ascent of the Sharpe ratio": Learned(by_ascent),
    },
    metrics=METRICS,
    claims=(
        _claim(OURS, "equal weight", REAL, "on real prices it beats equal weight after costs"),
        _claim(OURS, "minimum variance", REAL, "on real prices it beats minimum variance"),
        _claim(OURS, "maximum Sharpe", REAL, "on real prices it beats maximum Sharpe"),
        _claim(OURS, "risk parity", REAL, "on real prices it beats risk parity"),
        _claim(OURS, "log-return reward", REAL, "on real prices it beats rewarding log-returns"),
        _claim(OURS, "equal weight", DEPTH, "on real prices its drawdown is smaller than that of equal weight"),
        _claim(OURS, "cash", TRAINING, "training reaches a positive average Sharpe ratio"),
        _claim(OURS, "equal weight", MADE, "a known signal is found: by 0.5 above equal weight", 0.5),
        _claim(OURS, "maximum Sharpe", MADE, "with a known signal it beats maximum Sharpe", 0.5),
        _claim(OURS, "log-return reward", MADE, "with a known signal it beats rewarding log-returns"),
        _claim(OURS, "differential Sharpe reward", MADE, "with a known signal it beats the differential Sharpe ratio"),
        _claim(OURS, "average-Sharpe reward, as released", MADE, "clipped actions, as released, hide the signal", 0.5),
        _claim("ascent of the Sharpe ratio", OURS, MADE, "but ascending the Sharpe ratio itself beats any reward"),
    ),
    seeds=len(MARKETS),
    about="Five assets of each of six real markets, and five with a signal, are traded by walk-forward.",
    data="price histories of bokeh-sampledata and universal-portfolios: NYSE 1962-84 and 1985-2010, US stocks "
    "2004-13, MSCI, S&P 500, TSE",
    notes=(
        "A cell is a market: five assets at random (four where there are four), of whose days the last third is traded "
        "in two folds at a cost of 0.25 % of what is bought or sold. Everyone chooses among four settings by the "
        "Sharpe ratio of the year before a fold: equal weight how often to rebalance, the estimated portfolios how "
        "many days to look back, the policies how long to train (0 to 3 times 2 iterations of 2,048 days on real "
        "prices, 6 with the signal, whose cost is 0.05 %). Rate, discount and lambda are the same for all rewards and "
        "were set on made markets of other seeds. The average-Sharpe reward has a warm-up of ten days and an epsilon "
        "of 1e-4; as released it has none, 1e-7, and actions clipped to [0, 1]. Training has at most 36,864 days, the "
        "paper's 9 million, and images 4 days instead of 50. The assets are survivors, closes are prices that one may "
        "not get, and in old ones the bounce between bid and ask looks like a signal. The paper's Chinese stocks are "
        "in no package; none of its figures is reproduced."
    ),
)
