"""The backtest: no look-ahead, figures of merit against plain numpy, and curves that show what was earned."""

import io
import math

import numpy as np
import pytest
import torch

from minimand.policies import PriceHistory, walk_forward


def history(days=40, assets=3, seed=1, dates=None):
    generator = torch.Generator().manual_seed(seed)
    moves = 0.02 * torch.randn(days, assets, generator=generator, dtype=torch.float64)
    return PriceHistory(moves.cumsum(0).exp(), dates=dates)


def momentum(past, held):
    return (50 * past.log_returns()[-5:].mean(0) + held[1:]).softmax(-1)


def equal(past, held):
    return torch.full((3,), 1 / 3).double()


def test_scrambling_the_future_changes_nothing_that_was_done_before():
    true = history()
    scrambled = true.prices.clone()
    scrambled[25:] = 1 / scrambled[25:].flip(0)
    one, other = (walk_forward(momentum, prices, start=8) for prices in (true, PriceHistory(scrambled)))
    # The close of day 24 decides the weights of row 16; day 25 is what they earn.
    assert torch.equal(one.weights[:17], other.weights[:17])
    assert torch.equal(one.log_returns[:16], other.log_returns[:16])
    assert not torch.equal(one.log_returns[16], other.log_returns[16])
    assert not torch.equal(one.weights[17], other.weights[17])


@pytest.mark.parametrize("every", [1, 4])
def test_a_strategy_is_handed_the_days_up_to_its_decision_and_no_more(every):
    prices, lengths = history(), []

    def remembers(past, held):
        lengths.append(len(past))
        assert torch.equal(past.prices, prices.prices[: len(past)])
        return equal(past, held)

    walk_forward(remembers, prices, start=8, every=every)
    assert lengths == list(range(9, 40, every))


def test_between_decisions_nothing_is_traded():
    backtest = walk_forward(equal, history(), start=4, every=5)
    assert (backtest.turnover.reshape(7, 5)[:, 1:] < 1e-15).all()
    assert (backtest.turnover.reshape(7, 5)[:, 0] > 0).all()


def test_what_is_lost_of_a_days_growth_is_the_cost_of_its_turnover():
    backtest = walk_forward(momentum, history(), start=8, cost=0.05)
    growth = (backtest.weights * history().relatives()[8:]).sum(1)
    torch.testing.assert_close(backtest.log_returns.exp(), (1 - 0.05 * backtest.turnover) * growth)


def test_buying_once_and_holding_earns_the_mean_of_the_price_relatives():
    prices = history()
    backtest = walk_forward(equal, prices, start=4, every=100, cost=0.0)
    assert float(backtest.wealth()[-1]) == pytest.approx(float((prices.prices[-1] / prices.prices[4]).mean()))


def test_the_figures_of_merit_are_those_of_numpy():
    backtest = walk_forward(momentum, history(300), start=8, cost=0.001)
    returns = backtest.log_returns.numpy()
    wealth = np.concatenate([[1.0], np.exp(returns.cumsum())])
    worst = (1 - wealth / np.maximum.accumulate(wealth)).max()
    expected = {
        "sharpe": math.sqrt(252) * returns.mean() / returns.std(),
        "sortino": math.sqrt(252) * returns.mean() / np.sqrt((np.minimum(returns, 0) ** 2).mean()),
        "calmar": 252 * returns.mean() / worst,
        "annual log-return": 252 * returns.mean(),
        "annual volatility": math.sqrt(252) * returns.std(),
        "maximum drawdown": worst,
        "days won": (returns > 0).mean(),
        "turnover": backtest.turnover.numpy().mean(),
    }
    assert backtest.summary() == pytest.approx(expected, rel=1e-5)


def test_the_drawing_shows_wealth_and_drawdown_from_the_start_for_every_strategy():
    dates = tuple(f"2024-01-{day:02d} 00:00:00" for day in range(1, 32))
    prices = history(31, dates=dates)
    one, other = walk_forward(momentum, prices, start=8), walk_forward(equal, prices, start=8)
    figure = one.draw(name="momentum", others={"equal weight": other})
    equity, depth = figure.axes
    for line, backtest in zip(equity.lines, (one, other), strict=True):
        np.testing.assert_allclose(line.get_ydata(), [1.0, *backtest.wealth().tolist()])
    for line, backtest in zip(depth.lines, (one, other), strict=True):
        np.testing.assert_allclose(line.get_ydata(), [0.0, *(-100 * backtest.drawdowns()).tolist()])
    assert equity.get_yscale() == "log"
    assert [text.get_text() for text in equity.get_legend().get_texts()] == ["momentum", "equal weight"]
    # Tick 1 is the first return, earned on the day after the start.
    assert depth.xaxis.get_major_formatter()(1.0) == "2024-01-10"
    file = io.StringIO()
    figure.savefig(file, format="svg")
    assert "drawdown" in file.getvalue()


@pytest.mark.untyped
def test_bad_input_is_refused_by_name():
    prices = history()
    with pytest.raises(ValueError, match="start must lie in"):
        walk_forward(momentum, prices, start=39)
    with pytest.raises(ValueError, match="every must be"):
        walk_forward(momentum, prices, start=9, every=0)
    with pytest.raises(ValueError, match=r"cost must lie in \[0.0, 1.0\)"):
        walk_forward(momentum, prices, start=9, cost=1.0)
    with pytest.raises(ValueError, match="strategy's weights must have shape"):
        walk_forward(lambda past, held: torch.ones(7) / 7, prices, start=9)
    with pytest.raises(ValueError, match="strategy's weights must be at least 0 and add up to 1"):
        walk_forward(lambda past, held: torch.ones(3).double(), prices, start=9)
    backtest = walk_forward(equal, prices, start=9)
    with pytest.raises(ValueError, match="others must cover the days of this backtest, 'later' covers different ones"):
        backtest.draw(others={"later": walk_forward(equal, prices, start=10)})
    with pytest.raises(ValueError, match="others must have names other than 'strategy'"):
        backtest.draw(others={"strategy": backtest})
