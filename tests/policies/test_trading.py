"""The market: exact costs against a root finder, drift, no look-ahead, and the backtest against a plain loop."""

import math

import pytest
import scipy.optimize
import torch

from minimand.policies import (
    PriceHistory,
    TradingEnvironment,
    drift,
    portfolio_log_returns,
    price_image,
    walk_forward,
    wealth_after_trade,
)


def simplex(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)


def history(days=40, assets=3, seed=1, channels=1):
    generator = torch.Generator().manual_seed(seed)
    moves = 0.02 * torch.randn(days, assets, channels, generator=generator, dtype=torch.float64)
    return PriceHistory(moves.cumsum(0).exp())


def left_by_bisection(old, new, cost):
    return scipy.optimize.brentq(lambda mu: 1 - mu - cost * abs(old - mu * new).sum(), 0, 1, xtol=1e-14)


@pytest.mark.parametrize("cost", [0.0025, 0.1, 0.9])
def test_what_is_left_after_a_trade_solves_the_self_financing_equation(cost):
    held, target = simplex(50, 5, seed=0), simplex(50, 5, seed=1)
    target[:10, 2] = 0.0
    target[:10] /= target[:10].sum(-1, keepdim=True)
    held[5:15, 3] = 0.0
    held[5:15] /= held[5:15].sum(-1, keepdim=True)
    left = wealth_after_trade(held, target, cost=cost)
    for row in range(50):
        old, new = held[row, 1:].numpy(), target[row, 1:].numpy()
        root = left_by_bisection(old, new, cost)
        assert float(left[row]) == pytest.approx(root, rel=1e-11)


def test_no_trade_costs_nothing_and_the_papers_charge_agrees_to_first_order():
    held, target = simplex(20, 4), simplex(20, 4, seed=1)
    assert torch.equal(wealth_after_trade(held, held, cost=0.3), torch.ones(20, dtype=torch.float64))
    assert torch.equal(wealth_after_trade(held, held, cost=0.3, exact=False), torch.ones(20, dtype=torch.float64))
    first_order = 1 - 0.01 * (held - target)[:, 1:].abs().sum(-1)
    torch.testing.assert_close(wealth_after_trade(held, target, cost=0.01, exact=False), first_order)
    gap = [
        float(
            (wealth_after_trade(held, target, cost=c) - wealth_after_trade(held, target, cost=c, exact=False))
            .abs()
            .max()
        )
        for c in (0.01, 0.001)
    ]
    assert gap[0] > 0
    assert gap[1] == pytest.approx(gap[0] / 100, rel=0.1)


def test_from_cash_to_one_asset_and_back_leave_what_shares_say():
    cash, asset = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    assert float(wealth_after_trade(cash, asset, cost=0.25)) == pytest.approx(1 / 1.25)
    assert float(wealth_after_trade(asset, cash, cost=0.25)) == pytest.approx(0.75)


def test_the_cost_is_differentiable():
    held, target = simplex(3, 4), torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: wealth_after_trade(held, x.softmax(-1), cost=0.1), target)


def test_drifted_weights_add_up_to_one_and_are_shares_of_the_grown_wealth():
    weights, relatives = simplex(20, 4), simplex(20, 4, seed=1) + 0.5
    moved = drift(weights, relatives)
    torch.testing.assert_close(moved.sum(-1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(
        moved / weights / relatives, (1 / (weights * relatives).sum(-1, keepdim=True)).expand(20, 4)
    )


def test_without_cost_a_day_earns_the_log_of_the_weighted_relative_and_cash_earns_nothing():
    relatives = history().relatives()
    weights = simplex(4).expand(39, 4)
    torch.testing.assert_close(portfolio_log_returns(weights, relatives, cost=0.0), (relatives @ weights[0]).log())
    cash = torch.tensor([1.0, 0, 0, 0]).double().expand(39, 4)
    assert (portfolio_log_returns(cash, relatives) == 0).all()


def test_geometric_growth_as_in_the_released_code_is_never_above_arithmetic_growth():
    relatives, weights = history().relatives(), simplex(39, 4)
    arithmetic = portfolio_log_returns(weights, relatives, cost=0.0)
    geometric = (weights * relatives.log()).sum(-1)
    assert (geometric <= arithmetic).all()
    variance = (weights * relatives.log().square()).sum(-1) - geometric.square()
    torch.testing.assert_close(arithmetic - geometric, variance / 2, rtol=0.1, atol=1e-6)


def test_softmax_of_actions_clipped_to_the_unit_interval_can_hardly_leave_equal_weight():
    # Why actions are not clipped before the softmax, as they are in the released code.
    actions = torch.rand(2000, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
    weights = actions.softmax(-1)
    assert float(weights.min()) >= 1 / (1 + 10 * math.e) - 1e-12
    assert float(weights.max()) <= math.e / (math.e + 10) + 1e-12
    extreme = torch.eye(11, dtype=torch.float64)[0]
    assert float(extreme.softmax(-1)[0]) == pytest.approx(math.e / (math.e + 10))
    assert float((1 - extreme).softmax(-1)[0]) == pytest.approx(1 / (1 + 10 * math.e))


def test_environment_backtest_and_the_vectorised_form_agree():
    prices, weights = history(channels=2), simplex(30, 4)
    environment = TradingEnvironment(prices, window=5, horizon=30, num_episodes=1, cost=0.01)
    environment.reset(torch.tensor([6]))
    stepped = torch.stack([environment.step(row[None]).log_return[0] for row in weights])
    relatives = prices.relatives()[6:36]
    torch.testing.assert_close(stepped, portfolio_log_returns(weights, relatives, cost=0.01))
    rows = iter(weights)
    backtest = walk_forward(lambda past, held: next(rows), prices[:37], start=6, cost=0.01)
    torch.testing.assert_close(backtest.log_returns, stepped)
    wealth, held = 1.0, torch.tensor([1.0, 0, 0, 0]).double()
    for row, moves in zip(weights, relatives, strict=True):
        spent = left_by_bisection(held[1:].numpy(), row[1:].numpy(), 0.01)
        shares = wealth * spent * row * moves
        wealth, held = float(shares.sum()), shares / shares.sum()
    assert float(backtest.wealth()[-1]) == pytest.approx(wealth, rel=1e-9)


def test_an_image_shows_the_last_days_over_the_last_close_and_the_weights_on_top():
    prices, held = history(channels=4).prices, simplex(2, 4)
    image = price_image(prices, torch.tensor([9, 20]), held, window=6)
    assert image.shape == (2, 4, 7, 3)
    for row, day in enumerate((9, 20)):
        for channel in range(4):
            torch.testing.assert_close(image[row, channel, 0], held[row, 1:])
            torch.testing.assert_close(
                image[row, channel, 1:], prices[day - 5 : day + 1, :, channel] / prices[day, :, 0]
            )


def test_an_observation_does_not_move_with_later_prices():
    true = history()
    scrambled = true.prices.clone()
    scrambled[16:] = scrambled[16:].flip(0)
    images = []
    for prices in (true, PriceHistory(scrambled)):
        environment = TradingEnvironment(prices, window=5, horizon=6, num_episodes=1)
        seen = [environment.reset(torch.tensor([10])).image]
        seen += [environment.step(simplex(1, 4)).observation.image for _ in range(6)]
        images.append(torch.cat(seen))
    assert torch.equal(images[0][:6], images[1][:6])
    assert not torch.equal(images[0][6], images[1][6])


def test_episodes_start_anywhere_a_window_is_full_and_an_episode_fits():
    environment = TradingEnvironment(
        history(12), window=5, horizon=4, num_episodes=500, generator=torch.Generator().manual_seed(0)
    )
    environment.reset()
    assert set(environment._day.tolist()) == set(range(4, 8))
    for step in range(4):
        assert environment.step(simplex(500, 4)).done is (step == 3)


def test_progress_holds_the_moments_of_the_episode():
    environment = TradingEnvironment(history(), window=5, horizon=10, num_episodes=2)
    assert (environment.reset().progress == 0).all()
    steps = [environment.step(simplex(2, 4, seed=seed)) for seed in range(4)]
    returns = torch.stack([step.log_return for step in steps], 1)
    expected = [torch.full((2,), 0.4).double(), 252 * returns.mean(1), math.sqrt(252) * returns.std(1, correction=0)]
    torch.testing.assert_close(steps[-1].observation.progress, torch.stack(expected, 1))


@pytest.mark.untyped
def test_bad_input_is_refused_by_name():
    held, prices = torch.tensor([0.5, 0.5]), history()
    with pytest.raises(ValueError, match="target must be at least 0 and add up to 1"):
        wealth_after_trade(held, torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="held must be at least 0"):
        wealth_after_trade(torch.tensor([1.5, -0.5]), held)
    with pytest.raises(ValueError, match=r"cost must lie in \[0.0, 1.0\)"):
        wealth_after_trade(held, held, cost=1.0)
    with pytest.raises(ValueError, match="target must have the shape of held"):
        wealth_after_trade(held, held[None])
    with pytest.raises(ValueError, match="at least one asset"):
        wealth_after_trade(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="relatives must be above 0"):
        drift(held, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="relatives must have the shape"):
        drift(held, torch.ones(3))
    with pytest.raises(ValueError, match="initial must have the shape"):
        portfolio_log_returns(held[None], torch.ones(1, 2), initial=held[None])
    with pytest.raises(ValueError, match="at least window \\+ horizon = 41"):
        TradingEnvironment(prices, window=31, horizon=10)
    with pytest.raises(ValueError, match="window must be at least 1"):
        TradingEnvironment(prices, window=0)
    environment = TradingEnvironment(prices, window=5, horizon=10, num_episodes=2)
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step(simplex(2, 4))
    with pytest.raises(ValueError, match="start must lie in"):
        environment.reset(torch.tensor([3, 5]))
    with pytest.raises(ValueError, match="start must have shape"):
        environment.reset(torch.tensor([5]))
    environment.reset()
    with pytest.raises(ValueError, match="weights must have shape"):
        environment.step(simplex(3, 4))
