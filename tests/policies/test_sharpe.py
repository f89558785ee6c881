"""The Sharpe ratio as reward and loss: prefixes, streams, gradients and companions against plain numpy."""

import math

import numpy as np
import pytest
import torch

from minimand.policies import (
    AverageSharpeReward,
    SharpeLoss,
    average_sharpe_rewards,
    differential_sharpe_rewards,
    drawdowns,
    prefix_sharpe_ratios,
    sharpe_ratio,
    sortino_ratio,
)


def returns(*shape, seed=0, mean=4e-4):
    generator = torch.Generator().manual_seed(seed)
    return mean + 0.01 * torch.randn(shape, generator=generator, dtype=torch.float64)


def by_numpy(series, epsilon=1e-4, annualize=252.0):
    return math.sqrt(annualize) * np.mean(series) / (np.std(series) + epsilon)


def test_rewards_add_up_to_the_mean_of_the_prefixes_sharpe_ratios():
    log_returns = returns(3, 50)
    expected = [np.mean([by_numpy(row[: t + 1]) for t in range(50)]) for row in log_returns.numpy()]
    np.testing.assert_allclose(average_sharpe_rewards(log_returns).sum(-1), expected, rtol=1e-10)


def test_the_stream_gives_the_rewards_of_the_whole_and_its_state_the_moments():
    log_returns = returns(3, 50)
    stream = AverageSharpeReward(50, warmup=4)
    for _ in range(2):
        stream.reset()
        rewards = torch.stack([stream.step(value) for value in log_returns.unbind(1)], 1)
        torch.testing.assert_close(rewards, average_sharpe_rewards(log_returns, warmup=4), rtol=1e-10, atol=1e-12)
    rows = log_returns.numpy()
    np.testing.assert_allclose(stream.state, np.stack([np.full(3, 50.0), rows.mean(1), rows.std(1)], 1), rtol=1e-10)


def test_a_warmup_takes_the_first_rewards_away_and_leaves_the_others():
    log_returns = returns(20)
    plain, warm = average_sharpe_rewards(log_returns), average_sharpe_rewards(log_returns, warmup=5)
    assert (warm[:5] == 0).all()
    assert (plain[:5] != 0).all()
    assert torch.equal(warm[5:], plain[5:])


def test_the_second_prefix_without_a_first_return_is_one_deviation_up_or_down():
    # (0, x): mean x / 2 and deviation |x| / 2, so only the sign is left: the noise that a warmup is for.
    for value in (0.02, -0.001):
        ratio = prefix_sharpe_ratios(torch.tensor([0.0, value], dtype=torch.float64), epsilon=1e-12)[1]
        assert float(ratio) == pytest.approx(math.copysign(math.sqrt(252), value))


def test_the_sharpe_ratio_knows_no_scale_but_knows_a_shift():
    log_returns = returns(50)
    assert float(sharpe_ratio(7 * log_returns)) == pytest.approx(float(sharpe_ratio(log_returns)), rel=1e-12)
    shifted = sharpe_ratio(log_returns + 1e-3) - sharpe_ratio(log_returns)
    assert float(shifted) == pytest.approx(math.sqrt(252) * 1e-3 / log_returns.numpy().std())


def test_the_gradient_has_its_closed_form():
    log_returns = returns(30).requires_grad_()
    (gradient,) = torch.autograd.grad(sharpe_ratio(log_returns), log_returns)
    rows = log_returns.detach()
    mean, deviation = rows.mean(), rows.std(correction=0)
    expected = math.sqrt(252) / (30 * deviation) * (1 - (rows - mean) * mean / deviation**2)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)


def test_rewards_pass_gradcheck():
    log_returns = returns(2, 6).mul(10).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: average_sharpe_rewards(x, warmup=1), log_returns)
    assert torch.autograd.gradcheck(differential_sharpe_rewards, log_returns)
    assert torch.autograd.gradcheck(lambda x: SharpeLoss()(x), log_returns)


def test_cash_has_sharpe_ratio_and_gradient_zero_or_finite():
    idle = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    assert (average_sharpe_rewards(idle) == 0).all()
    average_sharpe_rewards(idle).sum().backward()
    assert torch.isfinite(idle.grad).all()


def test_the_differential_sharpe_ratio_adds_up_to_the_change_of_the_sharpe_ratio():
    # The error of one step is of order rate^2: over rate^-1 steps the sum misses by an order of rate.
    errors = []
    for rate in (1e-2, 1e-3, 1e-4):
        log_returns = returns(int(1 / rate))
        mean, square = 0.0, 1e-4
        for value in log_returns.tolist():
            mean, square = mean + rate * (value - mean), square + rate * (value**2 - square)
        change = mean / math.sqrt(square - mean**2)
        errors.append(abs(rate * float(differential_sharpe_rewards(log_returns, rate=rate).sum()) - change))
    assert errors[2] < 2e-4
    assert errors[2] < errors[0] / 20


def test_the_differential_sharpe_ratio_is_the_derivative_in_the_rate():
    value, history = 0.013, returns(40)
    rewards = differential_sharpe_rewards(torch.cat([history, torch.tensor([value], dtype=torch.float64)]), rate=0.05)
    mean, square = 0.0, 1e-4
    for past in history.tolist():
        mean, square = mean + 0.05 * (past - mean), square + 0.05 * (past**2 - square)
    rate = torch.zeros((), dtype=torch.float64, requires_grad=True)
    first, second = mean + rate * (value - mean), square + rate * (value**2 - square)
    (derivative,) = torch.autograd.grad(first / (second - first**2).sqrt(), rate)
    assert float(rewards[-1]) == pytest.approx(float(derivative), rel=1e-9)


def test_drawdowns_and_sortino_are_those_of_brute_force():
    log_returns = returns(80, seed=3)
    wealth = np.concatenate([[1.0], np.exp(np.cumsum(log_returns.numpy()))])
    worst = [1 - wealth[t] / wealth[: t + 1].max() for t in range(1, 81)]
    np.testing.assert_allclose(drawdowns(log_returns), worst, rtol=1e-9, atol=1e-14)
    losses = np.minimum(log_returns.numpy(), 0)
    expected = math.sqrt(252) * log_returns.numpy().mean() / np.sqrt((losses**2).mean())
    assert float(sortino_ratio(log_returns)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.untyped
def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="log_returns must vary"):
        sharpe_ratio(torch.ones(3))
    with pytest.raises(ValueError, match="log_returns contains NaN"):
        average_sharpe_rewards(torch.tensor([0.0, float("nan")]))
    with pytest.raises(ValueError, match="log_returns is empty"):
        drawdowns(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="a scalar"):
        sharpe_ratio(torch.tensor(1.0))
    with pytest.raises(TypeError, match="floating-point"):
        sharpe_ratio(torch.arange(3))
    with pytest.raises(ValueError, match="warmup must be from 0 to 2"):
        average_sharpe_rewards(torch.zeros(3), warmup=3)
    with pytest.raises(ValueError, match="epsilon must be"):
        prefix_sharpe_ratios(torch.zeros(3), epsilon=0.0)
    with pytest.raises(ValueError, match="rate must lie"):
        differential_sharpe_rewards(torch.zeros(3), rate=1.0)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        AverageSharpeReward(0)
    stream = AverageSharpeReward(1)
    stream.step(torch.zeros(2))
    with pytest.raises(ValueError, match="must have shape"):
        stream.step(torch.zeros(3))
    with pytest.raises(ValueError, match="horizon of 1 steps"):
        stream.step(torch.zeros(2))


def test_descending_the_loss_raises_the_sharpe_ratio():
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    moves = 0.01 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moves[:, 0] += 0.005
    before = sharpe_ratio(moves @ weights.detach().softmax(-1), epsilon=SharpeLoss().epsilon)
    assert torch.equal(SharpeLoss()((moves @ weights.softmax(-1))[None]), -before)
    optimizer = torch.optim.SGD([weights], lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        SharpeLoss()((moves @ weights.softmax(-1))[None]).backward()
        optimizer.step()
    assert sharpe_ratio(moves @ weights.detach().softmax(-1)) > before + 0.1
    assert weights.argmax() == 0
