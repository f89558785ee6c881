"""The trading environment against gymnasium's loop over numpy environments, its mathematics against plain loops."""

import math

import gymnasium
import numpy as np
import scipy.optimize
import torch

from benchmarks.timing import paired_ratio
from minimand.policies import (
    PortfolioPolicy,
    PriceHistory,
    TradingEnvironment,
    portfolio_log_returns,
    train_portfolio,
    wealth_after_trade,
)

DAYS, ASSETS, CHANNELS, WINDOW, HORIZON, EPISODES, COST = 2500, 10, 4, 50, 128, 64, 0.0025
GENERATOR = torch.Generator().manual_seed(0)
PRICES = (0.01 * torch.randn(DAYS, ASSETS, CHANNELS, generator=GENERATOR)).cumsum(0).exp()
ACTIONS = torch.randn(HORIZON, EPISODES, ASSETS + 1, generator=GENERATOR)
STARTS = torch.randint(WINDOW - 1, DAYS - HORIZON, (EPISODES,), generator=GENERATOR)


class OneEpisode(gymnasium.Env):
    """One episode in plain numpy, as environments of this kind are written: image, first-order cost, Sharpe reward."""

    def __init__(self, start):
        self.prices = PRICES.numpy()
        self.start = start
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (CHANNELS, WINDOW + 1, ASSETS), np.float32)
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (ASSETS + 1,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Begin in cash."""
        self.day, self.count, self.mean, self.squares = self.start, 0, 0.0, 0.0
        self.held = np.eye(ASSETS + 1, dtype=np.float32)[0]
        return self._image(), {}

    def step(self, action):
        """Trade, pay, live through a day and be rewarded."""
        shifted = np.exp(action - action.max())
        weights = shifted / shifted.sum()
        cost = COST * np.abs(self.held[1:] - weights[1:]).sum()
        relatives = np.concatenate([[1.0], self.prices[self.day + 1, :, 0] / self.prices[self.day, :, 0]])
        growth = float(weights @ relatives)
        log_return = math.log((1 - cost) * growth)
        self.held = (weights * relatives / growth).astype(np.float32)
        self.day, self.count = self.day + 1, self.count + 1
        change = log_return - self.mean
        self.mean += change / self.count
        self.squares += change * (log_return - self.mean)
        reward = math.sqrt(252) * self.mean / (math.sqrt(self.squares / self.count) + 1e-4) / HORIZON
        return self._image(), reward, False, False, {}

    def _image(self):
        seen = self.prices[self.day - WINDOW + 1 : self.day + 1] / self.prices[self.day, :, :1]
        top = np.broadcast_to(self.held[1:], (CHANNELS, 1, ASSETS))
        return np.concatenate([top, seen.transpose(2, 0, 1)], 1).astype(np.float32)


def test_stepping_sixty_four_episodes_beats_gymnasiums_loop_over_numpy_environments(record):
    ours = TradingEnvironment(
        PriceHistory(PRICES), window=WINDOW, horizon=HORIZON, cost=COST, num_episodes=EPISODES, exact=False
    )
    exact = TradingEnvironment(PriceHistory(PRICES), window=WINDOW, horizon=HORIZON, cost=COST, num_episodes=EPISODES)
    peer = gymnasium.vector.SyncVectorEnv([lambda start=start: OneEpisode(start) for start in STARTS.tolist()])

    def trade(environment):
        environment.reset(STARTS)
        for action in ACTIONS:
            last = environment.step(action.softmax(-1))
        return last

    def trade_by_loop():
        peer.reset()
        for action in ACTIONS.numpy():
            last = peer.step(action)
        return last

    # Both see the same in the end.
    np.testing.assert_allclose(trade(ours).observation.image, trade_by_loop()[0], rtol=1e-3, atol=1e-5)
    ratio = paired_ratio(lambda: trade(ours), trade_by_loop, rounds=7, warmup=1)
    record("64 episodes of 128 days against gymnasium's SyncVectorEnv", ratio.median, unit="x", target="<= 0.33")
    record("days a second, ours", HORIZON * EPISODES / ratio.ours_seconds, unit="/s")
    record("days a second, gymnasium", HORIZON * EPISODES / ratio.peer_seconds, unit="/s")
    solved = paired_ratio(lambda: trade(exact), trade_by_loop, rounds=5, warmup=1)
    record("the same with exact costs, ours only", solved.median, unit="x")
    assert ratio.median <= 0.33


def test_exact_costs_beat_a_root_finder_row_by_row(record):
    held, target = ACTIONS[0].double().softmax(-1), ACTIONS[1].double().softmax(-1)
    old, new = held[:, 1:].numpy(), target[:, 1:].numpy()

    def by_root_finder():
        return [
            scipy.optimize.brentq(lambda mu, a=a, b=b: 1 - mu - COST * np.abs(a - mu * b).sum(), 0, 1)
            for a, b in zip(old, new, strict=True)
        ]

    np.testing.assert_allclose(wealth_after_trade(held, target, cost=COST), by_root_finder(), rtol=1e-9)
    ratio = paired_ratio(lambda: wealth_after_trade(held, target, cost=COST), by_root_finder, inner=3)
    record("exact costs of 64 trades against scipy's brentq", ratio.median, unit="x", target="<= 0.33")
    assert ratio.median <= 0.33


def test_the_returns_of_a_period_beat_a_loop_over_its_days(record):
    """What ascent of a Sharpe ratio differentiates, forward and backward: all days at once against one by one."""
    history = PriceHistory(PRICES)
    relatives = torch.stack([history.relatives()[start : start + HORIZON] for start in STARTS.tolist()])
    logits = ACTIONS.transpose(0, 1).clone().requires_grad_()

    def at_once():
        logits.grad = None
        returns = portfolio_log_returns(logits.softmax(-1), relatives, cost=COST, exact=False)
        returns.sum().backward()
        return returns

    def day_by_day():
        logits.grad = None
        held, returns = torch.eye(ASSETS + 1)[0].expand(EPISODES, -1), []
        for action, moves in zip(logits.unbind(1), relatives.unbind(1), strict=True):
            weights = action.softmax(-1)
            cost = COST * (held - weights)[:, 1:].abs().sum(-1)
            grown = weights * moves
            returns.append((1 - cost).log() + grown.sum(-1).log())
            held = grown / grown.sum(-1, keepdim=True)
        torch.stack(returns, 1).sum().backward()
        return torch.stack(returns, 1)

    torch.testing.assert_close(at_once(), day_by_day(), rtol=1e-4, atol=1e-6)
    ratio = paired_ratio(at_once, day_by_day)
    record("returns of 64 periods of 128 days against a loop over days", ratio.median, unit="x", target="<= 0.5")
    assert ratio.median <= 0.5


def test_training_spends_its_time_on_the_network_and_not_on_the_market(record):
    """An iteration of training against its gradient steps alone, which any implementation has to take."""
    torch.manual_seed(0)
    policy = PortfolioPolicy(ASSETS, num_channels=CHANNELS, window=WINDOW)
    history = PriceHistory(PRICES)
    image, progress = torch.rand(256, *policy.shape) + 0.5, torch.zeros(256, 3)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-6)
    epochs, steps = 2, 16 * HORIZON

    def gradient_steps():
        for _ in range(epochs * steps // 256):
            mean, value = policy(image, progress)
            optimizer.zero_grad()
            (mean.square().mean() + value.square().mean()).backward()
            optimizer.step()

    def iteration():
        train_portfolio(policy, history, num_episodes=16, epochs=epochs, lr=1e-6, max_iter=1)

    ratio = paired_ratio(iteration, gradient_steps, rounds=3, warmup=1)
    record("an iteration of training (2 epochs) against its gradients alone", ratio.median, unit="x", target="<= 2")
    record("days trained on a second, the paper's image, 2 epochs", steps / ratio.ours_seconds, unit="/s")
    assert ratio.median <= 2
